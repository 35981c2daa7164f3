"""Errors for the user when values are not finite or memory runs out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from reference.training.errors import UserError

LOSS_TERMS = {  # by metric
    "policy_loss": "policy",
    "kl": "KL",
    "divergence": "divergence",
    "entropy": "entropy",
    "nll_loss": "cross-entropy",
}
OUT_OF_MEMORY_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory")


def describe_non_finite(
    losses: Sequence[Tensor],
    metrics: Sequence[Mapping[str, Tensor]],
    parameters: Iterable[tuple[str, nn.Parameter]],
) -> str:
    """Say which micro-batch's loss, in which term, or whose gradient is NaN or infinite."""
    for number, (loss, values) in enumerate(zip(losses, metrics, strict=True), 1):
        if not math.isfinite(loss.item()):
            wrong = [
                f"{term} {values[name].item()}"
                for name, term in LOSS_TERMS.items()
                if name in values and not values[name].isfinite()
            ]
            detail = f": {', '.join(wrong)}" if wrong else ""
            return f"the loss of micro-batch {number} of {len(losses)} is {loss.item()}{detail}"
    wrong = [
        name
        for name, param in parameters
        if param.grad is not None and not param.grad.isfinite().all()
    ]
    if not wrong:
        return "the norm of the gradient overflows"
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"the gradient of {wrong[0]}{more} is not finite"


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for the errors by which allocators of GPUs and CPUs report a lack of memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in str(error).lower() for words in OUT_OF_MEMORY_MESSAGES)
    )


@contextmanager
def out_of_memory_error(doing: str, remedy: str) -> Iterator[None]:
    """Turn an error about memory into a UserError that says what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory while {doing}: {remedy}") from None
