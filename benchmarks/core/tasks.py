"""Tasks of the benchmarks and their least cost: bytes from logits, matmuls from hidden states.

A task is a set of outputs and their gradient under a fixed upstream gradient. Its cost is what the
result needs, whatever an implementation does: a slow one shows a low percentage of the roof.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.core.problem import Problem

PHASES = ("forward", "backward", "both")
# Upstream gradients other than 1: entropies and log-probs are used together.
UPSTREAM = {"entropy": 0.1}


class Passes(NamedTuple):
    """Passes over the logits of the tokens."""

    reads: int
    writes: int


class Matmuls(NamedTuple):
    """Matmuls with the LM head; each takes 2·V·H operations per token."""

    logits: int  # of the policy or the reference policy
    gradients: int  # d_hidden, d_weight


@dataclass(frozen=True)
class Task:
    name: str
    level: str  # "logits" or "hidden"
    outputs: tuple[str, ...]  # outputs whose values are compared; gradients always are
    cost: dict[str, Passes | Matmuls] = field(hash=False)  # by measured phase
    reference: bool = False  # needs the tensors of a reference policy
    skips_inert: bool = False  # tokens with advantage 0 need no gradient

    def bytes(self, problem: Problem, phase: str) -> int | None:
        """Count the bytes that must move, at the level of logits.

        Masked rows are not read; their gradient, 0, is written.
        """
        if self.level != "logits":
            return None
        reads, writes = self.cost[phase]
        row = problem.logits.shape[-1] * problem.logits.element_size()
        return row * (reads * problem.num_active + writes * problem.N)

    def flops(self, problem: Problem, phase: str) -> int | None:
        """Count the operations of the matmuls, at the level of hidden states."""
        if self.level != "hidden":
            return None
        logits, gradients = self.cost[phase]
        with_gradient = problem.num_with_gradient if self.skips_inert else problem.num_active
        token_matmuls = logits * problem.num_active + gradients * with_gradient
        return 2 * problem.weight.numel() * token_matmuls


def gradients(outputs: dict[str, Tensor], problem: Problem, **keywords: Any) -> dict[str, Tensor]:
    """Compute the gradients of the outputs under UPSTREAM, by leaf."""
    leaves = problem.leaves
    total = sum(UPSTREAM.get(name, 1.0) * output.sum() for name, output in outputs.items())
    grads = torch.autograd.grad(total, list(leaves.values()), **keywords)
    return dict(zip(leaves, grads, strict=True))


# Statistics of a row take one read; their gradient takes another and one write.
_STATS = {"forward": Passes(1, 0), "backward": Passes(1, 1), "both": Passes(2, 1)}
_KL = {"forward": Passes(2, 0), "backward": Passes(2, 1), "both": Passes(4, 1)}
# The gradient of a loss is known once the row has been read.
_LOSS = {"forward": Passes(1, 0), "both": Passes(1, 1)}
# Under any upstream gradient the logits are computed twice; a loss computes its gradient at once.
_LINEAR_STATS = {"forward": Matmuls(1, 0), "backward": Matmuls(1, 2), "both": Matmuls(2, 2)}
_LINEAR_KL = {"forward": Matmuls(2, 0), "backward": Matmuls(2, 2), "both": Matmuls(4, 2)}
_LINEAR_LOSS = {"forward": Matmuls(1, 0), "both": Matmuls(1, 2)}
_LINEAR_LOSS_KL = {"forward": Matmuls(2, 0), "both": Matmuls(2, 2)}
# The ratio of a sequence is known after all its logits, which are computed again for the gradient.
_LINEAR_GSPO = {"forward": Matmuls(1, 0), "both": Matmuls(2, 2)}

TASKS = {
    task.name: task
    for task in (
        Task("token_stats", "logits", ("logprob", "entropy"), _STATS),
        Task("forward_kl", "logits", ("kl",), _KL, reference=True),
        Task("reverse_kl", "logits", ("kl",), _KL, reference=True),
        Task("approximate_kl", "logits", ("kl",), _KL, reference=True),
        Task("grpo_loss", "logits", ("loss",), _LOSS),
        Task("linear_token_stats", "hidden", ("logprob", "entropy"), _LINEAR_STATS),
        Task("linear_forward_kl", "hidden", ("kl",), _LINEAR_KL, reference=True),
        Task("linear_reverse_kl", "hidden", ("kl",), _LINEAR_KL, reference=True),
        Task("linear_grpo_loss", "hidden", ("loss",), _LINEAR_LOSS, skips_inert=True),
        Task("linear_grpo_loss_kl", "hidden", ("loss",), _LINEAR_LOSS_KL, reference=True),
        Task("linear_gspo_loss", "hidden", ("loss",), _LINEAR_GSPO, skips_inert=True),
        # Supervised training: the gradient of the mean log-prob, by any surrogate of that gradient.
        Task("linear_cross_entropy", "hidden", (), _LINEAR_LOSS),
    )
}
