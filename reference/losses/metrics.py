"""Metrics of the objective, beside the loss."""

from typing import Any

import torch
from torch import Tensor

from reference.losses.ratios import importance_weight, log_ratio, policy_ratio
from reference.losses.sequences import Tokens, means_by_sequence, token_mean
from reference.losses.surrogates import clipped, vespo_weight


@torch.no_grad()
def objective_metrics(
    tokens: Tokens,
    config: Any,
    *,
    policy_loss: Tensor,
    kl: Tensor | None,
    kept: Tensor,
    has_sequences: bool,
) -> dict[str, Tensor]:
    """Compute detached 0-dim tensors by name.

    A sequence-level ratio, and whether it is clipped, counts once per sequence.

    Args:
        policy_loss: aggregate of the policy term.
        kl: per token; kept: per token, bool, the tokens that no filter drops.
        has_sequences: False for packed tokens without boundaries.
    """
    mask, dtype = tokens.mask, tokens.logprob.dtype

    def ratio_mean(x: Tensor) -> Tensor:
        if config.ratio_level == "sequence":
            return _mean(means_by_sequence(x, mask))
        return token_mean(x, mask)

    change = log_ratio(tokens).clamp(-20, 20)
    r = policy_ratio(tokens, config.ratio_level)
    low, high = (flag.to(dtype) for flag in clipped(tokens, config))
    metrics = {
        "policy_loss": policy_loss.detach(),
        "approx_kl": token_mean(change.expm1() - change, mask),
        "num_tokens": mask.sum().to(dtype),
        "ratio_mean": ratio_mean(r),
        "ratio_max": _max(r[mask]),
        "clip_ratio/low_mean": ratio_mean(low),
        "clip_ratio/high_mean": ratio_mean(high),
        "clip_ratio/region_mean": ratio_mean(low + high),
    }
    if has_sequences:
        metrics["clip_ratio/low_min"] = -_max(-means_by_sequence(low, mask))
        metrics["clip_ratio/high_max"] = _max(means_by_sequence(high, mask))
    if config.surrogate == "cispo":
        metrics["cispo_clip_ratio"] = ratio_mean(high)
    if config.surrogate == "vespo":
        weights = vespo_weight(tokens, config)
        metrics["vespo/phi_seq_mean"] = _mean(means_by_sequence(weights, mask))
    filters = (
        *(config.off_policy_threshold, config.top_entropy, config.clip_cov, config.second_moment),
        config.rejection or None,
    )
    if any(setting is not None for setting in filters):
        metrics["filters/kept_mean"] = token_mean(kept.to(dtype), mask)
    if kl is not None:
        metrics["kl"] = token_mean(kl, mask)
    if tokens.entropy is not None:
        metrics["entropy"] = token_mean(tokens.entropy, mask)
    weight = importance_weight(tokens, config)
    if weight is not None and tokens.sampling_logprob is not None:
        difference = (tokens.old_logprob - tokens.sampling_logprob).abs()[mask]
        weight = weight[mask]
        metrics |= {
            "sampling/sampling_logp_difference/mean": _mean(difference),
            "sampling/sampling_logp_difference/max": _max(difference),
            "sampling/importance_sampling_ratio/min": -_max(-weight),
            "sampling/importance_sampling_ratio/mean": _mean(weight),
            "sampling/importance_sampling_ratio/max": _max(weight),
        }
    return metrics


def _mean(x: Tensor) -> Tensor:
    """Mean of a 1-dim tensor; 0 if it is empty."""
    return x.sum() / max(len(x), 1)


def _max(x: Tensor) -> Tensor:
    """Maximum of a 1-dim tensor; 0 if it is empty."""
    return x.max() if len(x) else x.new_zeros(())
