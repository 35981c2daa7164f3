"""This package. The adapters take the package as an argument: plain.py uses them too."""

from functools import partial
from typing import Any

import torch

import grpo_kernels
from benchmarks.core.problem import ADAPTER_SCALE, JSD_WEIGHT, Problem
from benchmarks.peers.peer import Adapter, Outputs, Peer, on_copied_rows, with_entropy_as_value
from grpo_kernels import HeadAdapter, LossConfig


def token_stats(problem: Problem, package: Any, kl: str | None = None, **keywords: Any) -> Outputs:
    """Log-probs and entropies, or one KL."""
    keywords |= {"mask": problem.mask, "kl": kl, "entropy": kl is None}
    if problem.logits is not None:
        if kl:
            keywords["ref_logits"] = problem.ref_logits
        stats = package.token_stats(problem.logits, problem.tokens, **keywords)
    else:
        if kl:
            keywords |= {"ref_hidden": problem.ref_hidden, "ref_weight": problem.ref_weight}
        if problem.adapter_a is not None:
            adapter = HeadAdapter(problem.adapter_a, problem.adapter_b, ADAPTER_SCALE)
            keywords["adapter"] = adapter
        inputs = (problem.hidden, problem.weight, problem.tokens)
        stats = package.linear_token_stats(*inputs, **keywords)
    return {"kl": stats.kl} if kl else {"logprob": stats.logprob, "entropy": stats.entropy}


def approximate_kl(problem: Problem, package: Any) -> Outputs:
    mean = package.approximate_kl_divergence(problem.ref_logits, problem.logits, problem.mask)
    return {"kl": mean * problem.logits.shape[-1]}  # the sum over the vocabulary


def grpo_loss(problem: Problem, package: Any, *, inplace: bool = False) -> Outputs:
    # A leaf cannot be overwritten in place, a view of it can.
    logits = problem.logits.view_as(problem.logits) if inplace else problem.logits
    output = package.grpo_loss(
        logits,
        problem.tokens,
        problem.advantages,
        mask=problem.mask,
        old_logprob=problem.old_logprob,
        config=LossConfig(),
        inplace=inplace,
    )
    return {"loss": output.loss}


def linear_grpo_loss(problem: Problem, package: Any, config: LossConfig) -> Outputs:
    reference_policy = {}
    if config.beta:
        reference_policy = {"ref_hidden": problem.ref_hidden, "ref_weight": problem.ref_weight}
    output = package.linear_grpo_loss(
        problem.hidden,
        problem.weight,
        problem.tokens,
        problem.advantages,
        mask=problem.mask,
        old_logprob=problem.old_logprob,
        config=config,
        support=problem.support,
        **reference_policy,
    )
    return {"loss": output.loss}


def linear_grpo_loss_tree(problem: Problem, package: Any) -> Outputs:
    B, T = problem.tokens.shape
    output = package.linear_grpo_loss(
        problem.hidden,
        problem.weight,
        problem.tokens.flatten(),
        problem.advantages,
        mask=None if problem.mask is None else problem.mask.flatten(),
        old_logprob=problem.old_logprob.flatten(),
        config=LossConfig(),
        cu_seqlens=torch.arange(B + 1, device=problem.tokens.device) * T,
        token_rows=problem.token_rows.flatten(),
    )
    return {"loss": output.loss}


def linear_cross_entropy(problem: Problem, package: Any) -> Outputs:
    output = package.linear_grpo_loss(
        problem.hidden,
        problem.weight,
        problem.tokens,
        torch.ones_like(problem.advantages),
        mask=problem.mask,
        config=LossConfig(aggregation="token_mean"),
    )
    # Every ratio is 1 and the loss is -1: its gradient is that of the mean negative log-prob.
    return {"surrogate": output.loss}


def distillation(problem: Problem, package: Any, divergence: str) -> Outputs:
    settings = {"divergence": divergence, "jsd_weight": JSD_WEIGHT, "mask": problem.mask}
    if problem.logits is not None:
        output = package.distillation_loss(problem.logits, problem.ref_logits, **settings)
    else:
        models = (problem.hidden, problem.weight, problem.ref_hidden, problem.ref_weight)
        output = package.linear_distillation_loss(*models, **settings)
    return {"loss": output.loss}


def all_tasks(package: Any) -> dict[str, Adapter]:
    """Return the adapters of every task for grpo_kernels or its reference implementation."""
    reverse_kl = LossConfig(beta=0.04, kl_estimator="reverse")
    tasks = {
        "token_stats": token_stats,
        "forward_kl": partial(token_stats, kl="forward"),
        "reverse_kl": partial(token_stats, kl="reverse"),
        "approximate_kl": approximate_kl,
        "grpo_loss": grpo_loss,
        "linear_token_stats": token_stats,
        "linear_token_stats_frozen": with_entropy_as_value(token_stats),
        "linear_token_stats_frozen_entropy": token_stats,
        "linear_token_stats_adapter": with_entropy_as_value(token_stats),
        "linear_forward_kl": partial(token_stats, kl="forward"),
        "linear_reverse_kl": partial(token_stats, kl="reverse"),
        "linear_grpo_loss": partial(linear_grpo_loss, config=LossConfig()),
        "linear_grpo_loss_frozen": partial(linear_grpo_loss, config=LossConfig()),
        "linear_grpo_loss_tree": linear_grpo_loss_tree,
        "linear_grpo_loss_support": partial(linear_grpo_loss, config=LossConfig()),
        "linear_grpo_loss_kl": partial(linear_grpo_loss, config=reverse_kl),
        "linear_gspo_loss": partial(linear_grpo_loss, config=LossConfig(ratio_level="sequence")),
        "linear_cross_entropy": linear_cross_entropy,
    }
    for divergence in ("reverse", "forward", "jsd"):
        for level in ("", "linear_"):
            adapter = partial(distillation, divergence=divergence)
            tasks[f"{level}distillation_{divergence}"] = adapter
    return {name: partial(adapter, package=package) for name, adapter in tasks.items()}


OURS = "grpo_kernels"
OUR_TASKS = all_tasks(grpo_kernels)
HINTED = partial(token_stats, package=grpo_kernels, entropy_grad=True)
PEERS = (
    Peer(
        OURS,
        OUR_TASKS | {"linear_token_stats_frozen_entropy": HINTED},
        "nothing",
        "it computes the entropy too; in bf16 on a CPU, logits are fp32 products, because PyTorch "
        "has none of bf16 with fp32 results there, and the faster ones round them",
    ),
    Peer(
        f"{OURS} in place",
        {"grpo_loss": partial(grpo_loss, package=grpo_kernels, inplace=True)},
        "nothing; the gradient overwrites the logits",
        prepare=Problem.copy,
    ),
    Peer(
        f"{OURS} copied rows",
        {"linear_grpo_loss_tree": on_copied_rows(OUR_TASKS["linear_grpo_loss"])},
        "nothing; a row of hidden states is copied for each of its tokens, as without `token_rows`",
    ),
)
