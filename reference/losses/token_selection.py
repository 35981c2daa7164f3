"""Choices of tokens: whose policy term is kept, and who pays for a high covariance."""

from typing import Any

import torch
from torch import Tensor

from reference.losses.ratios import log_ratio
from reference.losses.sequences import Tokens, sequence_mean, token_mean
from reference.losses.surrogates import clipped


def has_filter(config: Any) -> bool:
    """Whether some token's policy term may be dropped."""
    filters = (config.off_policy_threshold, config.top_entropy, config.clip_cov)
    return any(each is not None for each in filters)


def kept_tokens(tokens: Tokens, config: Any) -> Tensor:
    """bool: the unmasked tokens that no filter drops."""
    kept = tokens.keep
    if config.off_policy_threshold is not None:
        kept = kept & on_policy(tokens, config.off_policy_threshold)
    if config.top_entropy is not None:
        kept = kept & high_entropy(tokens, config.top_entropy)
    if config.clip_cov is not None:
        kept = kept & ~drawn_by_covariance(tokens, config)
    return kept


def on_policy(tokens: Tokens, threshold: float) -> Tensor:
    """A >= 0, or mean over the sequence of (sampling, else old) - logprob <= threshold.

    The off-policy sequence mask of DeepSeek-V3.2, 2512.02556.
    """
    sampler = tokens.old if tokens.sampling is None else tokens.sampling
    distance = sequence_mean(sampler - tokens.logprob.detach(), tokens.keep)
    return (tokens.advantage >= 0) | (distance <= threshold)


def high_entropy(tokens: Tokens, fraction: float) -> Tensor:
    """The unmasked tokens whose entropy is at least the (1 - fraction) quantile: 2506.01939."""
    entropies = tokens.entropy.detach()
    if not tokens.keep.any():
        return tokens.keep
    return tokens.keep & (entropies >= entropies[tokens.keep].quantile(1 - fraction))


def covariance(tokens: Tokens) -> Tensor:
    """(A - mean A)·(logprob - mean logprob) per token, the means over the unmasked ones."""
    advantage, logprob = tokens.advantage, tokens.logprob.detach()
    return (advantage - token_mean(advantage, tokens.keep)) * (
        logprob - token_mean(logprob, tokens.keep)
    )


def drawn_by_covariance(tokens: Tokens, config: Any) -> Tensor:
    """Clip-Cov: the tokens drawn at random to be dropped. Paper: 2505.22617.

    From those with clip_cov_low < covariance < clip_cov_high that the surrogate's own bound does
    not cut, max(1, floor(clip_cov·n)) of them, or all if fewer; n counts the unmasked tokens.
    """
    cov, (low, high) = covariance(tokens), clipped(tokens, config)
    inside = (config.clip_cov_low < cov) & (cov < config.clip_cov_high)
    candidates = tokens.keep & inside & ~(low | high)
    keys = torch.rand(cov.shape, device=cov.device)
    chosen = _among_largest(
        torch.where(candidates, keys, -1.0), _count(config.clip_cov, tokens.keep)
    )
    return candidates & chosen


def kl_cov_term(tokens: Tokens, config: Any) -> Tensor:
    """KL-Cov: kl_cov_coef·|l| on the tokens of largest covariance, 0 elsewhere: 2505.22617.

    There are max(1, floor(kl_cov·n)) of them, n the unmasked tokens; of equals, the first.
    """
    cov = torch.where(tokens.keep, covariance(tokens), -torch.inf)
    chosen = tokens.keep & _among_largest(cov, _count(config.kl_cov, tokens.keep))
    return torch.where(chosen, config.kl_cov_coef * log_ratio(tokens).abs(), 0.0)


def _count(fraction: float, keep: Tensor) -> int:
    return max(1, int(fraction * keep.sum().item()))


def _among_largest(x: Tensor, count: int) -> Tensor:
    """bool, shape of x: its `count` largest entries; of equals, the first."""
    order = x.flatten().argsort(descending=True, stable=True)
    chosen = torch.zeros_like(order, dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen.view_as(x)
