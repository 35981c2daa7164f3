"""What stops a step before it does harm: NaN and infinity, and memory that does not suffice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from reference.training.errors import UserError

# The metrics that tell the terms of a loss apart.
TERMS = {"policy_loss": "policy", "kl": "KL", "entropy": "entropy"}
MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def where_not_finite(
    losses: Sequence[Tensor],
    metrics: Sequence[Mapping[str, Tensor]],
    parameters: Iterable[tuple[str, nn.Parameter]],
) -> str:
    """Which micro-batch's loss, in which term, or whose gradient is NaN or infinite.

    Args:
        losses, metrics: of each micro-batch of an optimiser step.
        parameters: with their names and their gradients, not yet clipped.
    """
    for number, (loss, found) in enumerate(zip(losses, metrics, strict=True), 1):
        if not math.isfinite(loss.item()):
            values = {term: found[name].item() for name, term in TERMS.items() if name in found}
            wrong = [f"{term} {x}" for term, x in values.items() if not math.isfinite(x)]
            of = f": {', '.join(wrong)}" if wrong else ""
            return f"the loss of micro-batch {number} of {len(losses)} is {loss.item()}{of}"
    wrong = [
        name
        for name, each in parameters
        if each.grad is not None and not each.grad.isfinite().all()
    ]
    if not wrong:
        return "the norm of the gradient overflows"
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"the gradient of {wrong[0]}{more} is not finite"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device has no memory left, or the CPU; each allocator says it in its own way."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in MEMORY)
    )


@contextmanager
def enough_memory(doing: str, remedy: str) -> Iterator[None]:
    """Where memory does not suffice, a UserError that says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory while {doing}: {remedy}") from None
