"""One adapter per implementation: what it is given, what it leaves out.

An adapter takes a Problem and returns its task's outputs by name, with the graph to the problem's
leaves: log-probs, entropies and divergences [N] or [B, T], losses 0-dim. Masked tokens give 0.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

import grpo_kernels
from benchmarks.core.problem import Problem
from reference import losses as reference

Outputs = dict[str, Tensor]
Adapter = Callable[[Problem], Outputs]


@dataclass(frozen=True)
class Peer:
    """An implementation, and which tasks it can do."""

    tasks: dict[str, Adapter] = field(hash=False)
    leaves_out: str
    package: str | None = None  # on the package index, where it is no part of torch or of ours
    everywhere: bool = True  # False: at the base shape only, since each shape costs a compilation
    apart: bool = True  # False: forward and backward in one only, as each costs a compilation
    prepare: Callable[[Problem], Problem] = lambda problem: problem  # unclocked; to its own taste

    def missing(self) -> str | None:
        """Why it cannot be tried here, or None."""
        if self.package is None:
            return None
        try:
            version(self.package)
        except PackageNotFoundError:
            return f"{self.package} is not installed"
        return None


# Ours, and the reference: the same functions of two modules.


def _stats_arguments(problem: Problem, kl: str | None = None) -> dict:
    asked = {"mask": problem.mask, "kl": kl, "entropy": kl is None}
    if kl is None:
        return asked
    if problem.logits is None:
        return {**asked, "ref_hidden": problem.ref_hidden, "ref_weight": problem.ref_weight}
    return {**asked, "ref_logits": problem.ref_logits}


def _token_stats(problem: Problem, package: ModuleType, kl: str | None = None) -> Outputs:
    arguments = _stats_arguments(problem, kl)
    if problem.logits is None:
        stats = package.linear_token_stats(
            problem.hidden, problem.weight, problem.tokens, **arguments
        )
    else:
        stats = package.token_stats(problem.logits, problem.tokens, **arguments)
    return {"kl": stats.kl} if kl else {"logprob": stats.logprob, "entropy": stats.entropy}


def _approximate_kl(problem: Problem, package: ModuleType) -> Outputs:
    value = package.approximate_kl_divergence(problem.ref_logits, problem.logits, problem.mask)
    return {"kl": value * problem.logits.shape[-1]}  # of a row's entries the sum, not the mean


def _loss(problem: Problem, package: ModuleType, *, inplace: bool = False, **config) -> Outputs:
    objective = {
        "mask": problem.mask,
        "old_logprob": problem.old_logprob,
        "config": grpo_kernels.LossConfig(**config),
    }
    given = problem.tokens, problem.advantages
    if problem.logits is not None:
        # What is overwritten must be no leaf.
        logits = problem.logits.view_as(problem.logits) if inplace else problem.logits
        return {"loss": package.grpo_loss(logits, *given, inplace=inplace, **objective).loss}
    if config.get("beta"):
        objective |= {"ref_hidden": problem.ref_hidden, "ref_weight": problem.ref_weight}
    output = package.linear_grpo_loss(problem.hidden, problem.weight, *given, **objective)
    return {"loss": output.loss}


def _cross_entropy(problem: Problem, package: ModuleType) -> Outputs:
    output = package.linear_grpo_loss(
        problem.hidden,
        problem.weight,
        problem.tokens,
        torch.ones_like(problem.advantages),
        mask=problem.mask,
        config=grpo_kernels.LossConfig(aggregation="token_mean"),
    )
    # Every ratio is 1, and so the loss is -1: its gradient is that of the mean log-prob.
    return {"surrogate": output.loss}


def _all_tasks(package: ModuleType) -> dict[str, Adapter]:
    tasks = {
        "token_stats": _token_stats,
        "forward_kl": partial(_token_stats, kl="forward"),
        "reverse_kl": partial(_token_stats, kl="reverse"),
        "approximate_kl": _approximate_kl,
        "grpo_loss": _loss,
        "linear_token_stats": _token_stats,
        "linear_forward_kl": partial(_token_stats, kl="forward"),
        "linear_reverse_kl": partial(_token_stats, kl="reverse"),
        "linear_grpo_loss": _loss,
        "linear_grpo_loss_kl": partial(_loss, beta=0.04, kl_estimator="reverse"),
        "linear_gspo_loss": partial(_loss, ratio_level="sequence"),
        "linear_cross_entropy": _cross_entropy,
    }
    return {name: partial(each, package=package) for name, each in tasks.items()}


@cache
def _compiled(name: str) -> Callable:
    """A function of the reference through torch.compile, lengths dynamic."""
    return torch.compile(getattr(reference, name), dynamic=True)


class _Compiled(SimpleNamespace):
    def __getattr__(self, name: str) -> Callable:
        return _compiled(name)


def _compiled_tasks() -> dict[str, Adapter]:
    known = ("token_stats", "reverse_kl", "grpo_loss", "linear_token_stats", "linear_grpo_loss")
    return {name: each for name, each in _all_tasks(_Compiled()).items() if name in known}


# Objectives behind a peer that has only log-probs: plain torch, as its users write it.


def _objective(problem: Problem, logprob: Tensor) -> Outputs:
    output = grpo_kernels.policy_loss(
        logprob.view(problem.tokens.shape),
        problem.advantages,
        mask=problem.mask,
        old_logprob=problem.old_logprob,
    )
    return {"loss": output.loss}


def _counted(problem: Problem, x: Tensor) -> Tensor:
    """Of a tensor [B, T, ...] the tokens that count, [n, ...]: what users of these peers do."""
    return problem.flat(x) if problem.mask is None else x[problem.mask]


def _scattered(problem: Problem, x: Tensor) -> Tensor:
    """[n] of the tokens that count to [B, T], 0 elsewhere."""
    if problem.mask is None:
        return x.view(problem.tokens.shape)
    return x.new_zeros(problem.tokens.shape).masked_scatter(problem.mask, x)


# TRL


def _trl_token_stats(problem: Problem) -> Outputs:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    logprob, entropy = selective_log_softmax_and_entropy(
        problem.logits, problem.tokens, row_mask=problem.mask
    )
    return {"logprob": logprob, "entropy": entropy}


def _trl_grpo_loss(problem: Problem) -> Outputs:
    return _objective(problem, _trl_token_stats(problem)["logprob"])


def _trl_linear_token_stats(problem: Problem) -> Outputs:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    hidden, tokens = _counted(problem, problem.hidden), _counted(problem, problem.tokens)
    logprob, entropy, *_ = ChunkedLogProbFunction.apply(
        hidden, problem.weight, None, tokens, 1.0, 32_768, None, 1.0, ("entropy",)
    )
    return {"logprob": _scattered(problem, logprob), "entropy": _scattered(problem, entropy)}


def _trl_linear_grpo_loss(problem: Problem) -> Outputs:
    return _objective(problem, _trl_linear_token_stats(problem)["logprob"])


def _trl_linear_kl(problem: Problem, beta: float) -> Outputs:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    kl, _ = ChunkedDivergenceFunction.apply(
        _counted(problem, problem.hidden),
        problem.weight,
        None,
        _counted(problem, problem.ref_hidden),
        problem.ref_weight,
        None,
        beta,
    )
    return {"kl": _scattered(problem, kl)}


# Liger


def _liger_prepare(problem: Problem) -> Problem:
    """On logits it wants those of one more position, whose gradient is 0."""
    if problem.logits is None:
        return problem
    logits = F.pad(problem.logits.detach(), (0, 0, 0, 1))
    return replace(problem, logits=logits.requires_grad_())


def _liger_grpo_loss(problem: Problem) -> Outputs:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    loss, _ = triton_grpo_loss(
        problem.logits,
        problem.old_logprob,
        None,
        problem.tokens,
        problem.advantages,
        completion_mask=problem.mask,
        temperature=1.0,
        beta=0.0,
        eps_low=0.2,
        eps_high=0.2,
        loss_type="grpo",
        reduce=True,
    )
    return {"loss": loss}


def _liger_linear_token_stats(problem: Problem) -> Outputs:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
        _counted(problem, problem.hidden),
        problem.weight,
        _counted(problem, problem.tokens),
        return_entropy=True,
    )
    return {"logprob": _scattered(problem, -nll), "entropy": _scattered(problem, entropy)}


def _liger_linear_grpo_loss(problem: Problem) -> Outputs:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    on_gpu = problem.hidden.is_cuda
    # Its default of one sequence a chunk rewrites the weight's gradient as many times.
    sequences = max(1, 4096 // problem.tokens.shape[1])
    peer = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=on_gpu, use_ref_model=False, loss_type="grpo", chunk_size=sequences
    )
    mask = torch.ones_like(problem.tokens) if problem.mask is None else problem.mask.long()
    loss, *_ = peer(
        problem.hidden,
        problem.weight,
        problem.tokens,
        mask,
        problem.advantages,
        old_per_token_logps=problem.old_logprob,
    )
    return {"loss": loss}


# torch, cut-cross-entropy, quack


def _torch_linear(problem: Problem, *, objective: bool) -> Outputs:
    arguments = _counted(problem, problem.hidden), problem.weight, _counted(problem, problem.tokens)
    if objective:
        losses = F.linear_cross_entropy(*arguments, reduction="none")
        return _objective(problem, _scattered(problem, -losses))
    return {"surrogate": F.linear_cross_entropy(*arguments)}


def _cce_linear(problem: Problem, *, objective: bool) -> Outputs:
    from cut_cross_entropy import linear_cross_entropy

    losses = linear_cross_entropy(
        _counted(problem, problem.hidden),
        problem.weight,
        _counted(problem, problem.tokens),
        reduction="none" if objective else "mean",
        filter_eps=None,
        impl="cce" if problem.hidden.is_cuda else "torch_compile",
    )
    return _objective(problem, _scattered(problem, -losses)) if objective else {"surrogate": losses}


def _quack_linear(problem: Problem) -> Outputs:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    loss = chunked_linear_cross_entropy(
        _counted(problem, problem.hidden), problem.weight, _counted(problem, problem.tokens)
    )
    return {"surrogate": loss}


def _quack_grpo_loss(problem: Problem) -> Outputs:
    from quack.cross_entropy import cross_entropy

    losses = cross_entropy(
        problem.flat(problem.logits), problem.flat(problem.tokens), reduction="none"
    )
    return _objective(problem, -losses)


OURS, REFERENCE = "grpo_kernels", "reference"
PEERS: dict[str, Peer] = {
    OURS: Peer(_all_tasks(grpo_kernels), "nothing"),
    "grpo_kernels in place": Peer(
        {"grpo_loss": partial(_loss, package=grpo_kernels, inplace=True)},
        "nothing; the gradient takes the place of the logits",
        prepare=Problem.copy,
    ),
    REFERENCE: Peer(_all_tasks(reference), "nothing; every logit is in memory, in fp32"),
    "reference, compiled": Peer(
        _compiled_tasks(),
        "nothing; torch.compile decides what is in memory",
        everywhere=False,
        apart=False,
    ),
    "TRL": Peer(
        {
            "token_stats": _trl_token_stats,
            "grpo_loss": _trl_grpo_loss,
            "linear_token_stats": _trl_linear_token_stats,
            "linear_forward_kl": partial(_trl_linear_kl, beta=0.0),
            "linear_reverse_kl": partial(_trl_linear_kl, beta=1.0),
            "linear_grpo_loss": _trl_linear_grpo_loss,
        },
        "from hidden states: logits rounded to their dtype for the log-prob; a KL in a pass of its "
        "own, the entropy beside it without gradient; the objective is plain torch",
        package="trl",
    ),
    "Liger": Peer(
        {
            "grpo_loss": _liger_grpo_loss,
            "linear_token_stats": _liger_linear_token_stats,
            "linear_grpo_loss": _liger_linear_grpo_loss,
        },
        "no entropy beside its GRPO losses; logits rounded to the dtype of the hidden states; on "
        "logits a GPU only; not compiled on a CPU; given chunks of 4,096 tokens",
        package="liger_kernel",
        prepare=_liger_prepare,
    ),
    "torch linear_cross_entropy": Peer(
        {
            "linear_cross_entropy": partial(_torch_linear, objective=False),
            "linear_grpo_loss": partial(_torch_linear, objective=True),
        },
        "no entropy; from bf16, logits and log-probs are bf16; every logit is in memory",
    ),
    "cut-cross-entropy": Peer(
        {
            "linear_cross_entropy": partial(_cce_linear, objective=False),
            "linear_grpo_loss": partial(_cce_linear, objective=True),
        },
        "no entropy; its kernels need a GPU, and a CPU gets what it compiles with torch; its "
        "gradient filter is off",
        package="cut_cross_entropy",
        everywhere=False,
    ),
    "quack": Peer(
        {"linear_cross_entropy": _quack_linear, "grpo_loss": _quack_grpo_loss},
        "no entropy; the objective is plain torch; one of a Hopper or Blackwell GPU only",
        package="quack-kernels",
    ),
}
