"""Tasks of the benchmarks and their least cost: bytes from logits, matmuls from hidden states.

A task is a set of outputs and their gradient under a fixed upstream gradient. Its cost is what the
result needs, whatever an implementation does: a slow one shows a low percentage of the roof.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.core.problem import Problem, Variant
from grpo_kernels.lm_head.backward_plan import Trained, plan_backward
from grpo_kernels.lm_head.inputs import prepare_inputs

PHASES = ("forward", "backward", "both")
# Upstream gradients other than 1: entropies and log-probs are used together.
UPSTREAM = {"entropy": 0.1}


class Passes(NamedTuple):
    """Passes over the logits of the tokens."""

    reads: int
    writes: int


class Matmuls(NamedTuple):
    """Matmuls with the LM head; each takes 2·V·H operations per row of hidden states."""

    logits: int  # of the policy or the reference policy
    again: int = 0  # logits that are made a second time, for the gradient
    d_hidden: int = 0
    d_weight: int = 0

    def with_logits_kept(self) -> "Matmuls":
        """Return what is left if all logits stay in memory until the gradient is known."""
        return self._replace(again=0, d_hidden=min(1, self.d_hidden))


@dataclass(frozen=True)
class Task:
    name: str
    level: str  # "logits" or "hidden"
    outputs: tuple[str, ...]  # outputs whose values are compared; gradients always are
    cost: dict[str, Passes | Matmuls] = field(hash=False)  # by measured phase
    variant: Variant = "plain"  # of the tensors
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
        matmuls = self.matmuls(problem, phase)
        rows = matmuls.logits * problem.num_active
        rows += sum(matmuls[1:]) * self.num_with_gradient(problem)
        return 2 * problem.head_rows * problem.weight.shape[1] * rows

    def matmuls(self, problem: Problem, phase: str) -> Matmuls:
        """Return the matmuls of a phase; a row of hidden states takes part in each once."""
        matmuls = self.cost[phase]
        kept = matmuls.with_logits_kept()
        return kept if kept != matmuls and logits_fit(problem) else matmuls

    def num_with_gradient(self, problem: Problem) -> int:
        return problem.num_with_gradient if self.skips_inert else problem.num_active


def logits_fit(problem: Problem) -> bool:
    """Tell whether all logits fit the workspace of this package, whatever the peer."""
    inputs = prepare_inputs(
        problem.hidden,
        problem.weight,
        problem.tokens,
        ref_hidden=problem.ref_hidden,
        ref_weight=problem.ref_weight,
        kl=None if problem.ref_hidden is None else "reverse",
    )
    trained = Trained(hidden=True, weight=problem.weight.requires_grad, bias=False)
    return plan_backward(inputs, None, trained).logits is not None


def gradients(outputs: dict[str, Tensor], problem: Problem, **keywords: Any) -> dict[str, Tensor]:
    """Compute the gradients of the outputs under UPSTREAM, by leaf.

    An output without a gradient, such as an entropy that is only logged, has no upstream gradient.
    """
    leaves = problem.leaves
    total = sum(UPSTREAM.get(name, 1.0) * output.sum() for name, output in outputs.items())
    grads = torch.autograd.grad(total, list(leaves.values()), **keywords)
    return dict(zip(leaves, grads, strict=True))


# Statistics of a row take one read; their gradient takes another and one write.
_STATS = {"forward": Passes(1, 0), "backward": Passes(1, 1), "both": Passes(2, 1)}
_KL = {"forward": Passes(2, 0), "backward": Passes(2, 1), "both": Passes(4, 1)}
# The gradient of a loss is known once the row has been read.
_LOSS = {"forward": Passes(1, 0), "both": Passes(1, 1)}
_DISTILLATION = {"forward": Passes(2, 0), "both": Passes(2, 1)}
# Under any upstream gradient the logits are made again; a loss computes its gradient at once.
_LINEAR_STATS = {
    "forward": Matmuls(1),
    "backward": Matmuls(0, again=1, d_hidden=1, d_weight=1),
    "both": Matmuls(1, again=1, d_hidden=1, d_weight=1),
}
_LINEAR_KL = {
    "forward": Matmuls(2),
    "backward": Matmuls(0, again=2, d_hidden=1, d_weight=1),
    "both": Matmuls(2, again=2, d_hidden=1, d_weight=1),
}
_LINEAR_LOSS = {"forward": Matmuls(1), "both": Matmuls(1, d_hidden=1, d_weight=1)}
_LINEAR_LOSS_KL = {"forward": Matmuls(2), "both": Matmuls(2, d_hidden=1, d_weight=1)}
# The ratio of a sequence is known after all its logits, which are made again for the gradient.
_LINEAR_GSPO = {
    "forward": Matmuls(1),
    "both": Matmuls(1, again=1, d_hidden=1, d_weight=1),
}
# A frozen head: d_hidden of one statistic is known up to a factor once its logits are; that of two
# statistics is two products. Only the two phases together are measured, as forward alone is that of
# a trained head, and without products in backward there is no rate to report.
_FROZEN = {"both": Matmuls(1, d_hidden=1)}
_FROZEN_ENTROPY = {"both": Matmuls(1, d_hidden=2)}
# The gradient of the adapter needs d_logits. Its own products are r / H of the head's.
_ADAPTER = {"both": Matmuls(1, again=1, d_hidden=1)}
_TREE = {"both": Matmuls(1, d_hidden=1, d_weight=1)}

TASKS = {
    task.name: task
    for task in (
        Task("token_stats", "logits", ("logprob", "entropy"), _STATS),
        Task("forward_kl", "logits", ("kl",), _KL, "reference"),
        Task("reverse_kl", "logits", ("kl",), _KL, "reference"),
        Task("approximate_kl", "logits", ("kl",), _KL, "reference"),
        Task("grpo_loss", "logits", ("loss",), _LOSS),
        Task("distillation_reverse", "logits", ("loss",), _DISTILLATION, "reference"),
        Task("distillation_forward", "logits", ("loss",), _DISTILLATION, "reference"),
        Task("distillation_jsd", "logits", ("loss",), _DISTILLATION, "reference"),
        Task("linear_token_stats", "hidden", ("logprob", "entropy"), _LINEAR_STATS),
        # What LoRA trains: the entropy is a value to log, or has a gradient too.
        Task("linear_token_stats_frozen", "hidden", ("logprob", "entropy"), _FROZEN, "frozen"),
        Task(
            "linear_token_stats_frozen_entropy",
            *("hidden", ("logprob", "entropy"), _FROZEN_ENTROPY, "frozen"),
        ),
        Task("linear_token_stats_adapter", "hidden", ("logprob", "entropy"), _ADAPTER, "adapter"),
        Task("linear_forward_kl", "hidden", ("kl",), _LINEAR_KL, "reference"),
        Task("linear_reverse_kl", "hidden", ("kl",), _LINEAR_KL, "reference"),
        Task("linear_grpo_loss", "hidden", ("loss",), _LINEAR_LOSS, skips_inert=True),
        Task("linear_grpo_loss_frozen", "hidden", ("loss",), _FROZEN, "frozen", skips_inert=True),
        Task("linear_grpo_loss_tree", "hidden", ("loss",), _TREE, "tree", skips_inert=True),
        Task("linear_grpo_loss_support", "hidden", ("loss",), _LINEAR_LOSS, "support", True),
        Task("linear_grpo_loss_kl", "hidden", ("loss",), _LINEAR_LOSS_KL, "reference"),
        Task("linear_distillation_reverse", "hidden", ("loss",), _LINEAR_LOSS_KL, "reference"),
        Task("linear_distillation_forward", "hidden", ("loss",), _LINEAR_LOSS_KL, "reference"),
        Task("linear_distillation_jsd", "hidden", ("loss",), _LINEAR_LOSS_KL, "reference"),
        Task("linear_gspo_loss", "hidden", ("loss",), _LINEAR_GSPO, skips_inert=True),
        # Supervised training: the gradient of the mean log-prob, by any surrogate of that gradient.
        Task("linear_cross_entropy", "hidden", (), _LINEAR_LOSS),
    )
}
