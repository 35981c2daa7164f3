"""What a loss tells of its tokens: detached numbers, made without waiting for the device."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .terms import MAX_LOG_RATIO, Constants, importance

if TYPE_CHECKING:
    from .objective import LossConfig


class _Over:
    """Means and extremes over the tokens that count; 0 where none does."""

    def __init__(self, keep: Tensor) -> None:
        self._keep, self.count = keep, keep.sum()

    def mean(self, x: Tensor) -> Tensor:
        return torch.where(self._keep, x, 0).sum() / self.count.clamp(min=1)

    def max(self, x: Tensor) -> Tensor:
        """Of numbers that are not negative."""
        kept = torch.where(self._keep, x, 0)
        return torch.nn.functional.pad(kept.flatten(), (0, 1)).amax()

    def min(self, x: Tensor) -> Tensor:
        """Of numbers that are not negative."""
        kept = torch.where(self._keep, x, torch.inf)
        least = torch.nn.functional.pad(kept.flatten(), (0, 1), value=torch.inf).amin()
        return torch.where(self.count > 0, least, 0)


def token_metrics(
    ratio: Tensor,
    log_ratio: Tensor,
    kl: Tensor | None,
    entropy: Tensor | None,
    keep: Tensor,
    constants: Constants,
    config: "LossConfig",
) -> dict[str, Tensor]:
    """Those of `policy_loss` but the loss's own, with their graph."""
    over, advantage = _Over(keep), constants.advantage
    low = (ratio < 1 - config.epsilon_low) & (advantage < 0)
    high = (ratio > 1 + config.epsilon_high) & (advantage > 0)
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    metrics = {
        "clip_ratio/low_mean": over.mean(low.to(ratio.dtype)),
        "clip_ratio/high_mean": over.mean(high.to(ratio.dtype)),
        "clip_ratio/region_mean": over.mean((low | high).to(ratio.dtype)),
        "approx_kl": over.mean(torch.expm1(log_ratio) - log_ratio),
        "ratio_mean": over.mean(ratio),
        "ratio_max": over.max(ratio),
        "num_tokens": over.count.to(ratio.dtype),
    }
    if kl is not None:
        metrics["kl"] = over.mean(kl)
    if entropy is not None:
        metrics["entropy"] = over.mean(entropy)
    if constants.sampling_logprob is not None:
        difference = (constants.old_logprob - constants.sampling_logprob).abs()
        weight = importance(constants, config)
        metrics |= {
            "sampling/sampling_logp_difference/mean": over.mean(difference),
            "sampling/sampling_logp_difference/max": over.max(difference),
            "sampling/importance_sampling_ratio/min": over.min(weight),
            "sampling/importance_sampling_ratio/mean": over.mean(weight),
            "sampling/importance_sampling_ratio/max": over.max(weight),
        }
    return metrics
