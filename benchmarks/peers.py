"""One thin adapter per implementation of the hidden level: what it is given, what it leaves out.

An adapter takes a Problem and returns (values [N] or 0-dim by name, d_hidden, d_weight). Those of
one task compute the same thing as far as the peer can; its docstring says where it cannot.
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import grpo_kernels
import reference

SEQUENCES = 8
ENTROPY_WEIGHT = 0.1
Result = tuple[dict[str, Tensor], Tensor, Tensor]


class Problem(NamedTuple):
    """N tokens in SEQUENCES sequences of equal length, all of them counted."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    tokens: Tensor  # [N]
    advantages: Tensor  # [SEQUENCES]
    old_logprob: Tensor  # [N], near the policy's own
    ref_hidden: Tensor  # [N, H]
    ref_weight: Tensor  # [V, H]

    @classmethod
    def make(cls, N: int, V: int, H: int, dtype: torch.dtype, std: float = 4.0) -> "Problem":
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator).mul_(std).to(dtype)

        hidden, weight = normal(N, H), normal(V, H, std=std / H**0.5)
        tokens = torch.randint(0, V, (N,), generator=generator)
        advantages = torch.randn(SEQUENCES, generator=generator)
        with torch.no_grad():
            logprob = grpo_kernels.linear_token_stats(hidden, weight, tokens).logprob
        old_logprob = logprob + 0.1 * torch.randn(N, generator=generator)
        ref_hidden = (hidden.float() + 0.1 * normal(N, H).float()).to(dtype)
        return cls(hidden, weight, tokens, advantages, old_logprob, ref_hidden, weight)

    def double(self) -> "Problem":
        return Problem(*(x.double() if x.is_floating_point() else x for x in self))

    def leaves(self) -> tuple[Tensor, Tensor]:
        return tuple(x.detach().requires_grad_() for x in (self.hidden, self.weight))

    def by_sequence(self, x: Tensor) -> Tensor:
        return x.view(SEQUENCES, -1, *x.shape[1:])


def _with_gradients(total: Tensor, leaves: tuple[Tensor, Tensor], **values: Tensor) -> Result:
    d_hidden, d_weight = torch.autograd.grad(total, leaves)
    return {name: x.detach() for name, x in values.items()}, d_hidden, d_weight


# Task 1: log-prob and entropy, under an upstream gradient of both.


def stats_ours(problem: Problem, package=grpo_kernels) -> Result:
    """grpo_kernels.linear_token_stats."""
    leaves = problem.leaves()
    stats = package.linear_token_stats(*leaves, problem.tokens)
    loss = stats.logprob.sum() + ENTROPY_WEIGHT * stats.entropy.sum()
    return _with_gradients(loss, leaves, logprob=stats.logprob, entropy=stats.entropy)


def stats_reference(problem: Problem) -> Result:
    """Every logit in memory, in fp32."""
    return stats_ours(problem, reference)


def stats_trl(problem: Problem) -> Result:
    """TRL's chunked log-prob: rounds the logits to the dtype of its operands."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    leaves = problem.leaves()
    logprob, entropy, *_ = ChunkedLogProbFunction.apply(
        *leaves, None, problem.tokens, 1.0, 32_768, None, 1.0, ("entropy",)
    )
    loss = logprob.sum() + ENTROPY_WEIGHT * entropy.sum()
    return _with_gradients(loss, leaves, logprob=logprob, entropy=entropy)


# Task 2: the GRPO loss, and its gradient. `old_logprob` comes from unrounded logits: a peer that
# rounds its own moves some tokens across the clip boundary, where the gradient jumps to 0. With its
# own old log-probs TRL's gradient would be 6e-3 off from bf16, where it is 6e-2 off here.


def loss_ours(problem: Problem, package=grpo_kernels) -> Result:
    """grpo_kernels.linear_grpo_loss."""
    leaves = problem.leaves()
    hidden, tokens, old = map(problem.by_sequence, (leaves[0], problem.tokens, problem.old_logprob))
    loss = package.linear_grpo_loss(
        hidden, leaves[1], tokens, problem.advantages, old_logprob=old
    ).loss
    return _with_gradients(loss, leaves, loss=loss)


def loss_reference(problem: Problem) -> Result:
    """Every logit in memory, in fp32."""
    return loss_ours(problem, reference)


def _objective(problem: Problem, leaves: tuple[Tensor, Tensor], logprob: Tensor) -> Result:
    """The loss in plain torch, on the log-probs [N] of a peer that has none."""
    loss = grpo_kernels.policy_loss(
        problem.by_sequence(logprob),
        problem.advantages,
        old_logprob=problem.by_sequence(problem.old_logprob),
    ).loss
    return _with_gradients(loss, leaves, loss=loss)


def loss_trl(problem: Problem) -> Result:
    """TRL's log-prob, with the objective in plain torch behind it, as its trainer does."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    leaves = problem.leaves()
    logprob, *_ = ChunkedLogProbFunction.apply(
        *leaves, None, problem.tokens, 1.0, 32_768, None, 1.0, ("entropy",)
    )
    return _objective(problem, leaves, logprob)


def loss_torch(problem: Problem) -> Result:
    """torch's linear_cross_entropy, the objective behind it: no entropy; from bf16 logits and
    log-probs are bf16; all logits in memory, as its chunked form was 14 times slower on a CPU."""
    leaves = problem.leaves()
    logprob = -F.linear_cross_entropy(*leaves, problem.tokens, reduction="none")
    return _objective(problem, leaves, logprob)


def loss_liger(problem: Problem) -> Result:
    """Liger's chunked GRPO, not compiled (a CPU here): no entropy, logits rounded to bf16."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    leaves = problem.leaves()
    hidden, tokens, old = map(problem.by_sequence, (leaves[0], problem.tokens, problem.old_logprob))
    peer = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, loss_type="grpo", chunk_size=1
    )
    loss, *_ = peer(
        hidden, leaves[1], tokens, torch.ones_like(tokens), problem.advantages,
        old_per_token_logps=old,
    )  # fmt: skip
    return _with_gradients(loss, leaves, loss=loss)


# Task 3: the gradient of the sum of the log-probs: supervised training, cross-entropy's own ground.


def sum_ours(problem: Problem, package=grpo_kernels) -> Result:
    """grpo_kernels.linear_grpo_loss with advantages of 1: entropy and metrics come with it."""
    leaves = problem.leaves()
    advantages = torch.ones(len(problem.tokens), dtype=problem.advantages.dtype)
    config = package.LossConfig(aggregation="token_mean")
    loss = package.linear_grpo_loss(
        *leaves, problem.tokens, advantages, config=config, normalizer=1
    ).loss
    return _with_gradients(-loss, leaves)


def sum_reference(problem: Problem) -> Result:
    """Every logit in memory, in fp32."""
    return sum_ours(problem, reference)


def sum_torch(problem: Problem) -> Result:
    """torch's linear_cross_entropy: no entropy; from bf16 the logits are bf16, all in memory."""
    leaves = problem.leaves()
    total = -F.linear_cross_entropy(*leaves, problem.tokens, reduction="sum")
    return _with_gradients(total, leaves)


# Task 4: KL(policy || reference) over the vocabulary, and its gradient.


def kl_ours(problem: Problem, package=grpo_kernels) -> Result:
    """grpo_kernels.linear_token_stats with kl="reverse": the log-prob and entropy come with it."""
    leaves = problem.leaves()
    stats = package.linear_token_stats(
        *leaves, problem.tokens, kl="reverse", ref_hidden=problem.ref_hidden,
        ref_weight=problem.ref_weight,
    )  # fmt: skip
    return _with_gradients(stats.kl.sum(), leaves, kl=stats.kl)


def kl_reference(problem: Problem) -> Result:
    """Every logit of both in memory, in fp32."""
    return kl_ours(problem, reference)


def kl_trl(problem: Problem) -> Result:
    """TRL's chunked divergence: no log-prob, and an entropy without gradient."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    leaves = problem.leaves()
    kl, _ = ChunkedDivergenceFunction.apply(
        *leaves, None, problem.ref_hidden, problem.ref_weight, None, 1.0
    )
    return _with_gradients(kl.sum(), leaves, kl=kl)


# The products that a right answer needs, and nothing else: the floor.


def _bare(problem: Problem, logits_products: int) -> Result:
    """Logits in fp32, by tiles of an upcast weight for bf16, and the two products of the gradient
    in the operands' dtype; the numbers mean nothing."""
    hidden, weight = problem.hidden, problem.weight
    logits = torch.empty(len(hidden), len(weight))
    for _ in range(logits_products):
        if hidden.dtype == torch.float32:
            torch.mm(hidden, weight.T, out=logits)
            continue
        wide, upcast = hidden.float(), torch.empty(4096, weight.shape[1])
        for start in range(0, len(weight), 4096):
            tile = weight[start : start + 4096]
            part = upcast[: len(tile)].copy_(tile)
            torch.mm(wide, part.T, out=logits[:, start : start + len(tile)])
    d_logits = logits.to(hidden.dtype)
    return {}, torch.mm(d_logits, weight), torch.mm(d_logits.T, hidden)


def bare_3(problem: Problem) -> Result:
    """Logits, d_hidden, d_weight."""
    return _bare(problem, 1)


def bare_4(problem: Problem) -> Result:
    """The logits twice, d_hidden, d_weight."""
    return _bare(problem, 2)


def bare_6(problem: Problem) -> Result:
    """The logits of policy and reference, each twice, d_hidden, d_weight."""
    return _bare(problem, 4)


OURS, FLOOR = "grpo_kernels", "bare products"
TASKS: dict[str, dict[str, Callable[[Problem], Result]]] = {
    "log-prob and entropy": {
        FLOOR: bare_4,
        OURS: stats_ours,
        "reference": stats_reference,
        "trl": stats_trl,
    },
    "GRPO loss": {
        FLOOR: bare_3,
        OURS: loss_ours,
        "reference": loss_reference,
        "trl": loss_trl,
        "liger_kernel": loss_liger,
        "torch linear_cross_entropy": loss_torch,
    },
    "sum of log-probs": {
        FLOOR: bare_3,
        OURS: sum_ours,
        "reference": sum_reference,
        "torch linear_cross_entropy": sum_torch,
    },
    "reverse KL": {
        FLOOR: bare_6,
        OURS: kl_ours,
        "reference": kl_reference,
        "trl": kl_trl,
    },
}


def missing(peer: str) -> str | None:
    """Why a peer cannot run here, or None."""
    if peer == "torch linear_cross_entropy" and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy"
    if peer in ("trl", "liger_kernel"):
        try:
            version(peer)
        except PackageNotFoundError:
            return f"{peer} is not installed"
    return None
