"""Liger's GRPO losses, its linear cross-entropy with entropies, and its linear distillation."""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.core.problem import JSD_WEIGHT, Problem
from benchmarks.peers.peer import (
    Outputs,
    Peer,
    scatter_unmasked,
    unmasked,
    with_entropy_as_value,
)


def pad_logits(problem: Problem) -> Problem:
    """Append the logits of one more position, which its loss expects; their gradient is 0."""
    if problem.logits is None:
        return problem
    logits = F.pad(problem.logits.detach(), (0, 0, 0, 1))
    return replace(problem, logits=logits.requires_grad_())


def grpo_loss(problem: Problem) -> Outputs:
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


def linear_token_stats(problem: Problem) -> Outputs:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
        unmasked(problem, problem.hidden),
        problem.weight,
        unmasked(problem, problem.tokens),
        return_entropy=True,
    )
    return {
        "logprob": scatter_unmasked(problem, -nll),
        "entropy": scatter_unmasked(problem, entropy),
    }


def linear_grpo_loss(problem: Problem) -> Outputs:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    fused_loss = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=problem.hidden.is_cuda,
        use_ref_model=False,
        loss_type="grpo",
        # Its default, one sequence per chunk, rewrites the weight's gradient for every sequence.
        chunk_size=max(1, 4096 // problem.tokens.shape[1]),
    )
    mask = torch.ones_like(problem.tokens) if problem.mask is None else problem.mask.long()
    loss, *_ = fused_loss(
        problem.hidden,
        problem.weight,
        problem.tokens,
        mask,
        problem.advantages,
        old_per_token_logps=problem.old_logprob,
    )
    return {"loss": loss}


def linear_distillation(problem: Problem, beta: float) -> Outputs:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    fused_loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=beta,
        compiled=problem.hidden.is_cuda,
        chunk_size=4096,
    )
    loss = fused_loss(
        unmasked(problem, problem.hidden),
        problem.weight,
        unmasked(problem, problem.ref_hidden),
        problem.ref_weight,
        unmasked(problem, problem.tokens),
    )
    return {"loss": loss}


PEER = Peer(
    "Liger",
    {
        "grpo_loss": grpo_loss,
        "linear_token_stats": linear_token_stats,
        "linear_token_stats_frozen": with_entropy_as_value(linear_token_stats),
        "linear_token_stats_frozen_entropy": linear_token_stats,
        "linear_grpo_loss": linear_grpo_loss,
        "linear_grpo_loss_frozen": linear_grpo_loss,
        "linear_distillation_reverse": partial(linear_distillation, beta=1.0),
        "linear_distillation_forward": partial(linear_distillation, beta=0.0),
        "linear_distillation_jsd": partial(linear_distillation, beta=JSD_WEIGHT),
    },
    "no entropy beside its GRPO losses, no metrics of a distillation; logits are rounded to the "
    "dtype of the hidden states; its loss from logits needs a GPU; it is not compiled on a CPU; "
    "chunks of 4,096 tokens",
    "on a CPU its chunks run through autograd in plain PyTorch, and each adds a gradient of the "
    "whole head",
    package="liger_kernel",
    prepare=pad_logits,
)
