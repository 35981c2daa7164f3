"""Divergence of a student from a teacher over the whole vocabulary, with all logits in memory."""

import math
from typing import Any

import torch
from torch import Tensor

from reference.losses.policy_loss import LossOutput
from reference.losses.token_stats import lm_head_logits, scaled_logits


def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    teacher_top_logprobs: tuple[Tensor, Tensor] | None = None,
    divergence: str = "reverse",
    jsd_weight: float = 0.5,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> LossOutput:
    """Compute the mean over the tokens of KL(p‖q), KL(q‖p), or their mixture divergence.

        jsd = (1 - w) KL(p‖m) + w KL(q‖m), m = (1 - w) p + w q, w = jsd_weight

    Args:
        logits, teacher_logits: [B, T, V] or [N, V]; p and q are of the first and the second.
        teacher_top_logprobs: (ids, logprobs) [..., K] in place of teacher_logits; an id of -1, or a
            log-prob of -inf, is no entry. p and q are then over the listed ids and all the others
            together.
        divergence: "reverse" for KL(p‖q), "forward" for KL(q‖p), or "jsd".
        mask: bool or 0/1; normalizer: replaces the number of unmasked tokens.
        token_weights: shape of the tokens, the weight of each in the loss.

    Returns:
        LossOutput; the loss is differentiable in `logits`.
    """
    shape, device = logits.shape[:-1], logits.device
    keep = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask.bool()
    logp = torch.log_softmax(scaled_logits(logits, keep, temperature, softcap), dim=-1)
    named = {"entropy": _entropy(logp)}
    if teacher_top_logprobs is None:
        assert teacher_logits is not None
        teacher_x = scaled_logits(teacher_logits.detach(), keep, temperature, softcap)
        logq = torch.log_softmax(teacher_x, dim=-1)
        agrees = logits.argmax(-1) == teacher_logits.argmax(-1)
        named["top1_agreement"] = agrees.to(logp.dtype)
    else:
        ids, logprobs = teacher_top_logprobs
        is_listed = (ids != -1) & (logprobs != -torch.inf) & keep.unsqueeze(-1)
        ids = torch.where(is_listed, ids, 0)
        logq = torch.where(is_listed, logprobs.to(logp.dtype), -torch.inf)
        named["top1_agreement"] = _has_largest(logp, ids, logq)
        logp, logq = _outcomes(logp, ids, logq)
        named |= {
            "top_k_mass": logp[..., :-1].exp().sum(-1),
            "teacher_top_k_mass": logq[..., :-1].exp().sum(-1),
        }
    if divergence == "jsd":
        logm = torch.logaddexp(logp + math.log(1 - jsd_weight), logq + math.log(jsd_weight))
        per_token = (1 - jsd_weight) * _kl(logp, logm) + jsd_weight * _kl(logq, logm)
    else:
        per_token = _kl(logp, logq) if divergence == "reverse" else _kl(logq, logp)
    per_token = torch.where(keep, per_token, 0.0)
    named |= {"divergence": per_token, "teacher_entropy": _entropy(logq)}
    count = keep.sum().clamp(min=1)
    metrics = {name: torch.where(keep, x, 0.0).detach().sum() / count for name, x in named.items()}
    metrics["num_tokens"] = keep.sum().to(logp.dtype)
    if token_weights is not None:
        per_token = torch.where(keep, token_weights * per_token, 0.0)
    return LossOutput(per_token.sum() / (count if normalizer is None else normalizer), metrics)


def _has_largest(logp: Tensor, ids: Tensor, logq: Tensor) -> Tensor:
    """Test whether the teacher's most likely token has the student's largest log-prob."""
    best = ids.gather(-1, logq.argmax(-1, keepdim=True))
    is_largest = logp.gather(-1, best).squeeze(-1) == logp.amax(-1)
    return (is_largest & (logq.amax(-1) > -torch.inf)).to(logp.dtype)


def _outcomes(logp: Tensor, ids: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
    """Reduce both distributions to the K listed ids, of log-prob logq, and the rest: [..., K + 1].

    The teacher's rest is at least one unit of rounding; without a rest of the student it is none.
    """
    is_listed = logq > -torch.inf
    top = logp.gather(-1, ids).masked_fill(~is_listed, -torch.inf)
    hits = torch.zeros_like(logp).scatter_add(-1, ids, is_listed.to(logp.dtype))
    others = logp.masked_fill(hits > 0, -torch.inf)
    is_empty = (others == -torch.inf).all(-1, keepdim=True)
    rest = torch.logsumexp(others.masked_fill(is_empty, 0.0), dim=-1, keepdim=True)
    logp = torch.cat((top, rest.masked_fill(is_empty, -torch.inf)), dim=-1)
    rest = (1.0 - logq.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(logq.dtype).eps).log()
    logq = torch.cat((logq, rest.masked_fill(is_empty, -torch.inf)), dim=-1)
    return logp, torch.log_softmax(logq, dim=-1)


def linear_distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
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
    teacher_logits = None
    if teacher_hidden is not None and teacher_weight is not None:
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
