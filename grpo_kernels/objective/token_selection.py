"""Token selection: filters of the policy term, and the penalty of KL-Cov.

LossConfig documents the settings. Nothing here is differentiated except the penalty, and nothing
waits for the device.
"""

import functools

import torch
from torch import Tensor

from .config import LossConfig
from .ratios import MAX_LOG_RATIO, PolicyRatios

# Settings that turn a filter on. A filter looks at other tokens of the batch.
FILTERS = ("off_policy_threshold", "top_entropy", "clip_cov", "second_moment")


def kept_by_filters(
    ratios: PolicyRatios, entropy: Tensor | None, config: LossConfig
) -> dict[str, Tensor]:
    """Find the tokens whose policy term stays, for every filter that is on."""
    kept, keep = {}, ratios.sequences.keep
    if config.off_policy_threshold is not None:
        sampler = ratios.sampling_logprob
        behind = (ratios.old_logprob if sampler is None else sampler) - ratios.logprob.detach()
        far = ratios.sequences.mean(behind) > config.off_policy_threshold
        kept["off_policy_threshold"] = ~far | (ratios.advantage >= 0)
    if config.top_entropy is not None:
        assert entropy is not None
        kept["top_entropy"] = high_entropy(entropy.detach(), keep, config.top_entropy)
    if config.clip_cov is not None:
        covariance = _covariance(ratios)
        low, high = config.policy_term.clipped(ratios)
        eligible = keep & ~low & ~high
        eligible &= (covariance > config.clip_cov_low) & (covariance < config.clip_cov_high)
        key = torch.where(eligible, torch.rand_like(covariance), torch.inf)
        kept["clip_cov"] = ~(eligible & _smallest(key, config.clip_cov, keep))
    if config.second_moment is not None:
        log_ratio = ratios.log_ratio.detach()
        kept["second_moment"] = within_second_moment(log_ratio, keep, config.second_moment)
    if config.rejection:
        assert ratios.sampling_logprob is not None
        difference = ratios.old_logprob - ratios.sampling_logprob
        rules = (rule.keeps(difference, ratios.sequences) for rule in config.rejection_rules)
        kept["rejection"] = functools.reduce(torch.logical_and, rules)
    return kept


def high_entropy(entropy: Tensor, keep: Tensor, fraction: float) -> Tensor:
    """Find the unmasked tokens whose entropy is at least its (1 - fraction) quantile."""
    ranked = torch.where(keep, entropy, torch.inf).flatten().sort().values
    ranked = torch.nn.functional.pad(ranked, (0, 1), value=torch.inf)
    position = ((1 - fraction) * (keep.sum() - 1).clamp(min=0)).to(entropy.dtype)
    # Not ranked[...]: indexing with a number on the device would wait for it.
    below, above = ranked.take(torch.stack((position.floor(), position.ceil())).long()).unbind()
    return keep & ~(entropy < torch.lerp(below, above, position - position.floor()))


def within_second_moment(log_ratio: Tensor, keep: Tensor, limit: float) -> Tensor:
    """M2PO: find as many of the smallest (log-ratio)² as have a mean of at most the limit."""
    square = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).square()
    key = torch.where(keep & ~square.isnan(), square, torch.inf)
    ranked = key.flatten().sort(stable=True).values
    # Summed in fixed point: on a GPU a cumsum of floats changes in the last bits from run to run.
    unit = 2.0**26
    sums = (ranked.clamp(max=MAX_LOG_RATIO**2) * unit).round().long().cumsum(0)
    counts = torch.arange(1, len(ranked) + 1, device=key.device)
    fits = (sums <= limit * unit * counts) & (counts <= keep.sum())
    return keep & (_rank(key) < fits.sum())


def covariance_penalty(ratios: PolicyRatios, config: LossConfig) -> Tensor:
    """KL-Cov: kl_cov_coef·|log-ratio| on the kl_cov tokens of largest covariance, else 0."""
    assert config.kl_cov is not None
    keep = ratios.sequences.keep
    key = torch.where(keep, -_covariance(ratios), torch.inf)
    chosen = keep & _smallest(key, config.kl_cov, keep)
    # Not ratios.log_ratio: a node of its own keeps the order in which autograd sums gradients.
    distance = (ratios.logprob - ratios.old_logprob).abs()
    return config.kl_cov_coef * torch.where(chosen, distance, 0.0)


def _covariance(ratios: PolicyRatios) -> Tensor:
    """Each token's part in the covariance of log-prob and advantage, which drives the entropy."""
    keep = ratios.sequences.keep
    count = keep.sum().clamp(min=1)

    def centred(x: Tensor) -> Tensor:
        return x - torch.where(keep, x, 0).sum() / count

    return centred(ratios.advantage) * centred(ratios.logprob.detach())


def _smallest(key: Tensor, fraction: float, keep: Tensor) -> Tensor:
    """Find the smallest keys, as many as a fraction of the unmasked tokens, at least one."""
    return _rank(key) < (fraction * keep.sum().to(key.dtype)).floor().clamp(min=1)


def _rank(key: Tensor) -> Tensor:
    """Return how many keys come before each when they are sorted."""
    order = key.flatten().argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=key.device))
    return rank.view(key.shape)
