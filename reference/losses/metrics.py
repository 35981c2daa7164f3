"""What the objective reports beside the loss."""

from typing import Any

import torch
from torch import Tensor

from reference.losses.ratios import importance_weight, log_ratio, policy_ratio
from reference.losses.sequences import Tokens, means_by_sequence, token_mean
from reference.losses.surrogates import clipped, vespo_weight
from reference.losses.token_selection import has_filter


@torch.no_grad()
def objective_metrics(
    tokens: Tokens,
    config: Any,
    *,
    policy_loss: Tensor,
    kl: Tensor | None,
    kept: Tensor,
    sequences_known: bool,
) -> dict[str, Tensor]:
    """Detached 0-dim tensors by name.

    Args:
        policy_loss: the aggregate of the policy term.
        kl, kept: per token; kept is bool, the tokens that no filter drops.
        sequences_known: False for packed tokens without boundaries.
    """
    keep, dtype = tokens.keep, tokens.logprob.dtype
    bounded = log_ratio(tokens).clamp(-20, 20)
    metrics = {
        "policy_loss": policy_loss.detach(),
        "approx_kl": token_mean(bounded.expm1() - bounded, keep),
        "num_tokens": keep.sum().to(dtype),
    }
    metrics |= _ratio_metrics(tokens, config, sequences_known)
    if config.surrogate == "vespo":
        phi = vespo_weight(tokens, config)
        metrics["vespo/phi_seq_mean"] = _mean(means_by_sequence(phi, keep))
    if has_filter(config):
        metrics["filters/kept_mean"] = token_mean(kept.to(dtype), keep)
    if kl is not None:
        metrics["kl"] = token_mean(kl, keep)
    if tokens.entropy is not None:
        metrics["entropy"] = token_mean(tokens.entropy, keep)
    if tokens.sampling is not None:
        metrics |= _sampling_metrics(tokens, config)
    return metrics


def _ratio_metrics(tokens: Tokens, config: Any, sequences_known: bool) -> dict[str, Tensor]:
    """r and how often it is clipped; a ratio that belongs to the sequence counts once in each."""
    keep = tokens.keep
    r = policy_ratio(tokens, config.ratio_level)
    low, high = (flag.to(r.dtype) for flag in clipped(tokens, config))

    def mean(x: Tensor) -> Tensor:
        if config.ratio_level == "sequence":
            return _mean(means_by_sequence(x, keep))
        return token_mean(x, keep)

    metrics = {
        "ratio_mean": mean(r),
        "ratio_max": _largest(r[keep]),
        "clip_ratio/low_mean": mean(low),
        "clip_ratio/high_mean": mean(high),
        "clip_ratio/region_mean": mean(low + high),
    }
    if sequences_known:
        metrics["clip_ratio/low_min"] = -_largest(-means_by_sequence(low, keep))
        metrics["clip_ratio/high_max"] = _largest(means_by_sequence(high, keep))
    if config.surrogate == "cispo":
        metrics["cispo_clip_ratio"] = mean(high)
    return metrics


def _sampling_metrics(tokens: Tokens, config: Any) -> dict[str, Tensor]:
    difference = (tokens.old - tokens.sampling).abs()[tokens.keep]
    weight = importance_weight(tokens, config)[tokens.keep]
    return {
        "sampling/sampling_logp_difference/mean": _mean(difference),
        "sampling/sampling_logp_difference/max": _largest(difference),
        "sampling/importance_sampling_ratio/min": -_largest(-weight),
        "sampling/importance_sampling_ratio/mean": _mean(weight),
        "sampling/importance_sampling_ratio/max": _largest(weight),
    }


def _mean(x: Tensor) -> Tensor:
    """Of a 1-dim tensor; 0 where it is empty."""
    return x.sum() / max(len(x), 1)


def _largest(x: Tensor) -> Tensor:
    """Of a 1-dim tensor; 0 where it is empty."""
    return x.max() if len(x) else x.new_zeros(())
