"""Which tokens' policy terms count, and how much: filters, importance weights, covariances.

Beside the masks of the caller: these depend on what the policy says of the tokens. Nothing here is
differentiated, and nothing waits for the device.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .ratios import saturated_exp
from .sequences import Sequences
from .surrogates import SURROGATES, PolicyRatios

if TYPE_CHECKING:
    from .config import LossConfig
    from .token_gradients import LossInputs

IMPORTANCE_MODES = ("truncate", "mask")
IMPORTANCE_LEVELS = ("token", "sequence")


def importance(
    loss_inputs: "LossInputs", config: "LossConfig", sequences: Sequences | None = None
) -> Tensor:
    """The weight of a token that a sampler drew under log-probs of its own."""
    log_weight = loss_inputs.old_logprob - loss_inputs.sampling_logprob
    if config.importance_level == "sequence":
        log_weight = sequences.sum(log_weight)
    weight = saturated_exp(log_weight)
    floor, cap = config.importance_floor, config.importance_cap
    if floor is None and cap is None:
        return weight
    inside = weight.clamp(floor, cap)
    if config.importance_mode == "truncate":
        return inside
    return torch.where(weight < inside, 0.0, torch.where(weight > inside, 0.0, weight))


def _off_policy(
    ratios: PolicyRatios, entropy: Tensor | None, loss_inputs: "LossInputs", config: "LossConfig"
) -> Tensor:
    """DeepSeek-V3.2: what is to become rarer, and is rare already, teaches nothing."""
    sampler = loss_inputs.sampling_logprob
    behind = (ratios.old_logprob if sampler is None else sampler) - ratios.logprob.detach()
    far = ratios.sequences.mean(behind) > config.off_policy_threshold
    return ~far | (ratios.advantage >= 0)


def _top_entropy(
    ratios: PolicyRatios, entropy: Tensor | None, loss_inputs: "LossInputs", config: "LossConfig"
) -> Tensor:
    """The forks of the answer: tokens of an entropy in the top fraction of the batch."""
    return most_uncertain(entropy.detach(), ratios.sequences.keep, config.top_entropy)


def most_uncertain(entropy: Tensor, keep: Tensor, fraction: float) -> Tensor:
    """bool: the kept tokens whose entropy is at least the (1 - fraction) quantile of all kept."""
    ranked = torch.where(keep, entropy, torch.inf).flatten().sort().values
    ranked = torch.nn.functional.pad(ranked, (0, 1), value=torch.inf)
    place = (1 - fraction) * (keep.sum() - 1).clamp(min=0).to(entropy.dtype)
    # Not ranked[...]: to index with a number that lies on the device would wait for it.
    below, above = ranked.take(torch.stack((place.floor(), place.ceil())).long()).unbind()
    return keep & ~(entropy < torch.lerp(below, above, place - place.floor()))


def _clip_covariance(
    ratios: PolicyRatios, entropy: Tensor | None, loss_inputs: "LossInputs", config: "LossConfig"
) -> Tensor:
    """Some of the tokens whose covariance drives the entropy down, drawn at random, drop out."""
    covariance, keep = _covariance(ratios), ratios.sequences.keep
    low, high = SURROGATES[config.surrogate].clipped(ratios, config)
    eligible = keep & ~low & ~high
    eligible &= (covariance > config.clip_cov_low) & (covariance < config.clip_cov_high)
    key = torch.where(eligible, torch.rand_like(covariance), torch.inf)
    return ~(eligible & _least(key, _share(config.clip_cov, keep, covariance.dtype)))


# By the setting that turns each one on; True where the policy term stays.
FILTERS: dict[str, Callable[[PolicyRatios, Tensor | None, "LossInputs", "LossConfig"], Tensor]] = {
    "off_policy_threshold": _off_policy,
    "top_entropy": _top_entropy,
    "clip_cov": _clip_covariance,
}


def kept_by_filters(
    ratios: PolicyRatios, entropy: Tensor | None, loss_inputs: "LossInputs", config: "LossConfig"
) -> dict[str, Tensor]:
    """Of each filter that is on, where the policy term stays."""
    return {
        name: keeps(ratios, entropy, loss_inputs, config)
        for name, keeps in FILTERS.items()
        if getattr(config, name) is not None
    }


def covariance_penalty(ratios: PolicyRatios, config: "LossConfig") -> Tensor:
    """KL-Cov: |log-ratio| on the tokens of largest covariance, 0 on the others."""
    keep = ratios.sequences.keep
    key = torch.where(keep, -_covariance(ratios), torch.inf)
    chosen = keep & _least(key, _share(config.kl_cov, keep, key.dtype))
    return config.kl_cov_coef * torch.where(chosen, ratios.log_ratio.abs(), 0.0)


def _covariance(ratios: PolicyRatios) -> Tensor:
    """Each token's part in the covariance of log-prob and advantage, which moves the entropy."""
    keep = ratios.sequences.keep
    count = keep.sum().clamp(min=1)

    def centred(x: Tensor) -> Tensor:
        return x - torch.where(keep, x, 0).sum() / count

    return centred(ratios.advantage) * centred(ratios.logprob.detach())


def _share(fraction: float, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """A fraction of the kept tokens, at least one."""
    return (fraction * keep.sum().to(dtype)).floor().clamp(min=1)


def _least(key: Tensor, count: Tensor) -> Tensor:
    """bool: the entries with the `count` smallest keys."""
    order = key.flatten().argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=key.device))
    return (rank < count).view(key.shape)
