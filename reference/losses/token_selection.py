"""Token filters, and the tokens that KL-Cov penalises. Numbers are arXiv ids."""

import math
from typing import Any

import torch
from torch import Tensor

from reference.losses.ratios import log_ratio
from reference.losses.sequences import Tokens, sequence_mean, sequence_sum, token_mean
from reference.losses.surrogates import clipped


def kept_tokens(tokens: Tokens, config: Any) -> Tensor:
    """Return the unmasked tokens, bool, whose policy term no filter drops."""
    kept = tokens.mask
    if config.off_policy_threshold is not None:
        kept = kept & on_policy(tokens, config.off_policy_threshold)
    if config.top_entropy is not None:
        kept = kept & high_entropy(tokens, config.top_entropy)
    if config.clip_cov is not None:
        kept = kept & ~clip_cov(tokens, config)
    if config.second_moment is not None:
        kept = kept & within_second_moment(tokens, config.second_moment)
    for text in config.rejection:
        kept = kept & ~rejected(tokens, text)
    return kept


def on_policy(tokens: Tokens, threshold: float) -> Tensor:
    """A >= 0, or mean over the sequence of (sampling_logprob - logprob) <= threshold.

    Off-policy sequence mask of DeepSeek-V3.2 (2512.02556). old_logprob replaces an absent
    sampling_logprob.
    """
    sampler = tokens.old_logprob if tokens.sampling_logprob is None else tokens.sampling_logprob
    distance = sequence_mean(sampler - tokens.logprob.detach(), tokens.mask)
    return (tokens.advantage >= 0) | (distance <= threshold)


def high_entropy(tokens: Tokens, fraction: float) -> Tensor:
    """Unmasked tokens with an entropy of at least the (1 - fraction) quantile (2506.01939)."""
    if tokens.entropy is None:
        raise ValueError("top_entropy needs entropy")
    entropies = tokens.entropy.detach()
    if not tokens.mask.any():
        return tokens.mask
    return tokens.mask & (entropies >= entropies[tokens.mask].quantile(1 - fraction))


def within_second_moment(tokens: Tokens, limit: float) -> Tensor:
    """Tokens that M2PO keeps: the most with the smallest l² whose mean is <= limit (2510.01161).

    l is clamped to ±20.
    """
    squares = torch.where(tokens.mask, log_ratio(tokens).detach().clamp(-20, 20) ** 2, torch.inf)
    order = squares.flatten().argsort(stable=True)[: int(tokens.mask.sum())]
    sums = squares.flatten()[order].cumsum(0)
    count = int((sums <= limit * torch.arange(1, len(order) + 1, device=sums.device)).sum())
    kept = torch.zeros_like(tokens.mask).flatten()
    kept[order[:count]] = True
    return kept.view_as(tokens.mask)


def rejected(tokens: Tokens, text: str) -> Tensor:
    """Tokens that a rule such as "seq_mean_k3=0.01" or "token_k1=0.5:2" drops.

    With x = old_logprob - sampling_logprob, clamped to ±20, k1 = -x, k2 = x²/2, k3 = e^x - 1 - x,
    per token, or reduced over the sequence. A bound U is the largest that is kept; of k1 the
    bounds are logarithms, and U alone is 1/U:U.
    """
    assert tokens.sampling_logprob is not None
    name, _, bounds = text.partition("=")
    level, _, estimator = name.rpartition("_")
    x = (tokens.old_logprob - tokens.sampling_logprob).clamp(-20, 20)
    value = {"k1": -x, "k2": x**2 / 2, "k3": x.exp() - 1 - x}[estimator]
    if level == "seq_sum":
        value = sequence_sum(value, tokens.mask)
    elif level == "seq_mean":
        value = sequence_mean(value, tokens.mask)
    elif level == "seq_max" and value.numel():
        value = torch.where(tokens.mask, value, -torch.inf).amax(-1, keepdim=True)
    lower, _, upper = bounds.rpartition(":")
    if estimator != "k1":
        return value > float(upper)
    lowest = -math.log(float(upper)) if lower == "" else math.log(float(lower))
    return (value < lowest) | (value > math.log(float(upper)))


def clip_cov(tokens: Tokens, config: Any) -> Tensor:
    """Tokens that Clip-Cov drops, drawn at random (2505.22617).

    Candidates have clip_cov_low < covariance < clip_cov_high and are not clipped by the surrogate.
    max(1, floor(clip_cov·n)) of them are drawn, or all if fewer; n counts the unmasked tokens.
    """
    covariances, (low, high) = covariance(tokens), clipped(tokens, config)
    inside = (config.clip_cov_low < covariances) & (covariances < config.clip_cov_high)
    candidates = tokens.mask & inside & ~(low | high)
    keys = torch.rand(covariances.shape, device=covariances.device)
    return candidates & _largest(torch.where(candidates, keys, -1.0), config.clip_cov, tokens.mask)


def kl_cov_term(tokens: Tokens, config: Any) -> Tensor:
    """KL-Cov: kl_cov_coef·|l| on the tokens of largest covariance, 0 elsewhere (2505.22617).

    max(1, floor(kl_cov·n)) tokens are chosen; n counts the unmasked tokens.
    """
    covariances = torch.where(tokens.mask, covariance(tokens), -torch.inf)
    chosen = tokens.mask & _largest(covariances, config.kl_cov, tokens.mask)
    return torch.where(chosen, config.kl_cov_coef * log_ratio(tokens).abs(), 0.0)


def covariance(tokens: Tokens) -> Tensor:
    """(A - mean A)·(logprob - mean logprob) per token, with means over the unmasked tokens."""
    advantage, logprob = tokens.advantage, tokens.logprob.detach()
    return (advantage - token_mean(advantage, tokens.mask)) * (
        logprob - token_mean(logprob, tokens.mask)
    )


def _largest(x: Tensor, fraction: float, mask: Tensor) -> Tensor:
    """Mark the max(1, floor(fraction·unmasked tokens)) largest entries; of equals, the first."""
    count = max(1, int(fraction * mask.sum().item()))
    order = x.flatten().argsort(descending=True, stable=True)
    chosen = torch.zeros_like(order, dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen.view_as(x)
