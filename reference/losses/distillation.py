"""Divergence of a student from a teacher over the whole vocabulary, with all logits in memory."""

import math
from typing import Any

import torch
from torch import Tensor

from reference.losses.policy_loss import LossOutput
from reference.losses.token_stats import lm_head_logits, scaled_logits


def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str = "reverse",
    jsd_weight: float = 0.5,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> LossOutput:
    """Compute the mean over the tokens of KL(p‖q), KL(q‖p), or their mixture divergence.

        jsd = (1 - w) KL(p‖m) + w KL(q‖m), m = (1 - w) p + w q, w = jsd_weight

    Args:
        logits, teacher_logits: [B, T, V] or [N, V]; p and q are of the first and the second.
        divergence: "reverse" for KL(p‖q), "forward" for KL(q‖p), or "jsd".
        mask: bool or 0/1; normalizer: replaces the number of unmasked tokens.

    Returns:
        LossOutput; the loss is differentiable in `logits`.
    """
    shape, device = logits.shape[:-1], logits.device
    keep = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask.bool()
    logp = torch.log_softmax(scaled_logits(logits, keep, temperature, softcap), dim=-1)
    teacher_x = scaled_logits(teacher_logits.detach(), keep, temperature, softcap)
    logq = torch.log_softmax(teacher_x, dim=-1)
    if divergence == "jsd":
        logm = torch.logaddexp(logp + math.log(1 - jsd_weight), logq + math.log(jsd_weight))
        per_token = (1 - jsd_weight) * _kl(logp, logm) + jsd_weight * _kl(logq, logm)
    else:
        per_token = _kl(logp, logq) if divergence == "reverse" else _kl(logq, logp)
    per_token = torch.where(keep, per_token, 0.0)
    count = keep.sum().clamp(min=1)
    agrees = logits.argmax(-1) == teacher_logits.argmax(-1)
    named = {
        "divergence": per_token,
        "entropy": _entropy(logp),
        "teacher_entropy": _entropy(logq),
        "top1_agreement": agrees.to(logp.dtype),
    }
    metrics = {name: torch.where(keep, x, 0.0).detach().sum() / count for name, x in named.items()}
    metrics["num_tokens"] = keep.sum().to(logp.dtype)
    return LossOutput(per_token.sum() / (count if normalizer is None else normalizer), metrics)


def linear_distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    adapter: Any = None,
    chunk_tokens: int | None = None,
    **settings: Any,
) -> LossOutput:
    """Compute `distillation_loss` of logits = hidden @ weight.T + bias; the teacher's likewise.

    Args:
        adapter: (a [r, H], b [V, r], scale), of the student.
        chunk_tokens: has no effect; the package has this argument.
        settings: see `distillation_loss`.
    """
    with torch.no_grad():
        teacher_logits = lm_head_logits(teacher_hidden, teacher_weight, teacher_bias, mask)
    logits = lm_head_logits(hidden, weight, bias, mask, adapter)
    return distillation_loss(logits, teacher_logits, mask=mask, **settings)


def _kl(logp: Tensor, logq: Tensor) -> Tensor:
    # An entry without probability adds nothing, and its infinite logarithms get no gradient.
    outside = logp == -torch.inf
    return (logp.exp() * (logp.masked_fill(outside, 0.0) - logq.masked_fill(outside, 0.0))).sum(-1)


def _entropy(logp: Tensor) -> Tensor:
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
