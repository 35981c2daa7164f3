"""What is computed, and the least that it costs: bytes for logits, products for hidden states.

A task is a set of outputs, with a gradient under a fixed upstream. Its cost is what the answer
needs, whatever an implementation does: a slow one shows a low percentage of the roof, not many
bytes.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.core.problem import Problem

PHASES = ("forward", "backward", "both")
# The gradient that comes in, by output: entropies and log-probs are used together.
UPSTREAM = {"entropy": 0.1}  # 1 for the others


class Passes(NamedTuple):
    """Over the logits of the tokens: what is read once, and what is written."""

    reads: int
    writes: int


class Products(NamedTuple):
    """2·V·H floating-point operations for a token each."""

    logits: int  # of policy or reference
    gradients: int  # d_hidden, d_weight


@dataclass(frozen=True)
class Task:
    name: str
    level: str  # "logits" or "hidden"
    outputs: tuple[str, ...]  # whose values are compared; gradients always are
    cost: dict[str, Passes | Products] = field(hash=False)  # by phase; a phase not here is none
    reference: bool = False  # whether it needs a reference model's tensors
    skips_inert: bool = False  # whether tokens of advantage 0 need no gradient

    def bytes(self, problem: Problem, phase: str) -> int | None:
        """Masked rows are not read, and get a gradient of 0. None at the hidden level."""
        if self.level != "logits":
            return None
        reads, writes = self.cost[phase]
        row = problem.logits.shape[-1] * problem.logits.element_size()
        return row * (reads * problem.counted + writes * problem.N)

    def flops(self, problem: Problem, phase: str) -> int | None:
        """None at the level of logits, where bytes bind."""
        if self.level != "hidden":
            return None
        logits, gradients = self.cost[phase]
        attach_gradient = problem.live if self.skips_inert else problem.counted
        products = logits * problem.counted + gradients * attach_gradient
        return 2 * problem.weight.numel() * products


def total(outputs: dict[str, Tensor]) -> Tensor:
    """The scalar whose gradient is taken."""
    return sum(UPSTREAM.get(name, 1.0) * each.sum() for name, each in outputs.items())


def gradients(outputs: dict[str, Tensor], problem: Problem, **keywords) -> dict[str, Tensor]:
    """Of the total in the leaves, by leaf."""
    leaves = problem.leaves
    found = torch.autograd.grad(total(outputs), list(leaves.values()), **keywords)
    return dict(zip(leaves, found, strict=True))


# The statistics of a row take a walk over it; so does the gradient, which writes as much again.
_STATS = {"forward": Passes(1, 0), "backward": Passes(1, 1), "both": Passes(2, 1)}
_KL = {"forward": Passes(2, 0), "backward": Passes(2, 1), "both": Passes(4, 1)}
# A loss knows its gradient when it has read the row.
_LOSS = {"forward": Passes(1, 0), "both": Passes(1, 1)}
# Under any upstream gradient the logits are made twice; a loss makes its gradient at once.
_LINEAR_STATS = {"forward": Products(1, 0), "backward": Products(1, 2), "both": Products(2, 2)}
_LINEAR_KL = {"forward": Products(2, 0), "backward": Products(2, 2), "both": Products(4, 2)}
_LINEAR_LOSS = {"forward": Products(1, 0), "both": Products(1, 2)}

TASKS = {
    each.name: each
    for each in (
        Task("token_stats", "logits", ("logprob", "entropy"), _STATS),
        Task("forward_kl", "logits", ("kl",), _KL, reference=True),
        Task("reverse_kl", "logits", ("kl",), _KL, reference=True),
        Task("approximate_kl", "logits", ("kl",), _KL, reference=True),
        Task("grpo_loss", "logits", ("loss",), _LOSS),
        Task("linear_token_stats", "hidden", ("logprob", "entropy"), _LINEAR_STATS),
        Task("linear_forward_kl", "hidden", ("kl",), _LINEAR_KL, reference=True),
        Task("linear_reverse_kl", "hidden", ("kl",), _LINEAR_KL, reference=True),
        Task("linear_grpo_loss", "hidden", ("loss",), _LINEAR_LOSS, skips_inert=True),
        Task(
            "linear_grpo_loss_kl",
            "hidden",
            ("loss",),
            {"forward": Products(2, 0), "both": Products(2, 2)},
            reference=True,
        ),
        # A ratio of whole sequences is known when all their logits have been seen: made twice.
        Task(
            "linear_gspo_loss",
            "hidden",
            ("loss",),
            {"forward": Products(1, 0), "both": Products(2, 2)},
            skips_inert=True,
        ),
        # Supervised training: the gradient of the mean log-prob, by whatever surrogate.
        Task("linear_cross_entropy", "hidden", (), _LINEAR_LOSS),
    )
}
