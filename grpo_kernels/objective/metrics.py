"""Metrics of the loss: detached 0-dim tensors, computed without waiting for the device."""

import functools

import torch
from torch import Tensor

from .config import LossConfig
from .ratios import MAX_LOG_RATIO, PolicyRatios
from .sequences import Sequences
from .surrogates import Vespo


class MaskedReductions:
    """Means and extremes over the unmasked tokens; 0 where there is none."""

    def __init__(self, sequences: Sequences) -> None:
        self._sequences, self.count = sequences, sequences.keep.sum()

    def _fill(self, x: Tensor, masked: float = 0.0) -> Tensor:
        return x.masked_fill(self._sequences.drop, masked)

    def mean(self, x: Tensor) -> Tensor:
        return self._fill(x).sum() / self.count.clamp(min=1)

    def sequence_mean(self, x: Tensor) -> Tensor:
        """Average the means of the sequences that have an unmasked token."""
        share = self._fill(1 / self._sequences.lengths(x.dtype))
        return self._fill(share * x).sum() / share.sum().round().clamp(min=1)

    def max(self, x: Tensor) -> Tensor:
        """Return the maximum of x >= 0."""
        return torch.nn.functional.pad(self._fill(x).flatten(), (0, 1)).amax()

    def min(self, x: Tensor) -> Tensor:
        """Return the minimum of x >= 0."""
        unmasked = self._fill(x, torch.inf).flatten()
        least = torch.nn.functional.pad(unmasked, (0, 1), value=torch.inf).amin()
        return least.masked_fill(self.count == 0, 0)


def token_metrics(
    ratios: PolicyRatios,
    entropy: Tensor | None,
    kl: Tensor | None,
    kept: dict[str, Tensor],
    config: LossConfig,
) -> dict[str, Tensor]:
    """Compute the metrics of `policy_loss`, except policy_loss itself.

    kept: for each filter that is on, the tokens that it keeps.
    """
    reduce, dtype = MaskedReductions(ratios.sequences), ratios.ratio.dtype
    # A ratio of a sequence, and whether it is clipped, counts once.
    mean = reduce.sequence_mean if config.ratio_level == "sequence" else reduce.mean
    low, high = (clipped.to(dtype) for clipped in config.policy_term.clipped(ratios))
    low_mean, high_mean = mean(low), mean(high)
    metrics = {
        "ratio_mean": mean(ratios.ratio),
        "clip_ratio/low_mean": low_mean,
        "clip_ratio/high_mean": high_mean,
        "clip_ratio/region_mean": low_mean + high_mean,  # no token is clipped on both sides
    }
    if config.surrogate == "cispo":
        metrics["cispo_clip_ratio"] = high_mean
    if ratios.sequences.known:
        metrics["clip_ratio/low_min"] = reduce.min(ratios.sequences.mean(low))
        metrics["clip_ratio/high_max"] = reduce.max(ratios.sequences.mean(high))
    log_ratio = ratios.log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    metrics |= {
        "approx_kl": reduce.mean(torch.expm1(log_ratio) - log_ratio),
        "ratio_max": reduce.max(ratios.ratio),
        "num_tokens": reduce.count.to(dtype),
    }
    if isinstance(config.policy_term, Vespo):
        metrics["vespo/phi_seq_mean"] = reduce.sequence_mean(config.policy_term.weight(ratios))
    if kept:
        by_all = functools.reduce(torch.logical_and, kept.values())
        metrics["filters/kept_mean"] = reduce.mean(by_all.to(dtype))
    if kl is not None:
        metrics["kl"] = reduce.mean(kl)
    if entropy is not None:
        metrics["entropy"] = reduce.mean(entropy)
    if ratios.importance is not None:
        assert ratios.sampling_logprob is not None
        difference = (ratios.old_logprob - ratios.sampling_logprob).abs()
        metrics |= {
            "sampling/sampling_logp_difference/mean": reduce.mean(difference),
            "sampling/sampling_logp_difference/max": reduce.max(difference),
            "sampling/importance_sampling_ratio/min": reduce.min(ratios.importance),
            "sampling/importance_sampling_ratio/mean": reduce.mean(ratios.importance),
            "sampling/importance_sampling_ratio/max": reduce.max(ratios.importance),
        }
    return metrics
