"""What a loss tells of its tokens: detached numbers, made without waiting for the device."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .ratios import MAX_LOG_RATIO
from .sequences import Sequences
from .surrogates import SURROGATES, PolicyRatios, sequence_gamma
from .token_gradients import LossInputs, TokenLosses

if TYPE_CHECKING:
    from .config import LossConfig


class MaskedReductions:
    """Means and extremes over the tokens that count; 0 where none does."""

    def __init__(self, sequences: Sequences) -> None:
        self._sequences, self.count = sequences, sequences.keep.sum()

    def _kept(self, x: Tensor, otherwise: float = 0.0) -> Tensor:
        return x.masked_fill(self._sequences.drop, otherwise)

    def mean(self, x: Tensor) -> Tensor:
        return self._kept(x).sum() / self.count.clamp(min=1)

    def sequence_mean(self, x: Tensor) -> Tensor:
        """The mean over the sequences that have a token of their means."""
        share = self._kept(1 / self._sequences.lengths(x.dtype))
        return self._kept(share * x).sum() / share.sum().round().clamp(min=1)

    def max(self, x: Tensor) -> Tensor:
        """Of numbers that are not negative."""
        return torch.nn.functional.pad(self._kept(x).flatten(), (0, 1)).amax()

    def min(self, x: Tensor) -> Tensor:
        """Of numbers that are not negative."""
        kept = self._kept(x, torch.inf).flatten()
        least = torch.nn.functional.pad(kept, (0, 1), value=torch.inf).amin()
        return least.masked_fill(self.count == 0, 0)


def token_metrics(
    terms: TokenLosses, entropy: Tensor | None, loss_inputs: LossInputs, config: "LossConfig"
) -> dict[str, Tensor]:
    """Those of `policy_loss` but the loss's own, with their graph."""
    ratios = terms.ratios
    over = MaskedReductions(ratios.sequences)
    log_ratio = ratios.log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    metrics = _clip_metrics(ratios, over, config) | {
        "approx_kl": over.mean(torch.expm1(log_ratio) - log_ratio),
        "ratio_max": over.max(ratios.ratio),
        "num_tokens": over.count.to(ratios.ratio.dtype),
    }
    if config.surrogate == "vespo":
        metrics["vespo/phi_seq_mean"] = over.sequence_mean(sequence_gamma(ratios, config))
    if terms.kept is not None:
        metrics["filters/kept_mean"] = over.mean(terms.kept.to(ratios.ratio.dtype))
    if terms.kl is not None:
        metrics["kl"] = over.mean(terms.kl)
    if entropy is not None:
        metrics["entropy"] = over.mean(entropy)
    if loss_inputs.sampling_logprob is not None:
        difference = (loss_inputs.old_logprob - loss_inputs.sampling_logprob).abs()
        metrics |= {
            "sampling/sampling_logp_difference/mean": over.mean(difference),
            "sampling/sampling_logp_difference/max": over.max(difference),
            "sampling/importance_sampling_ratio/min": over.min(ratios.importance),
            "sampling/importance_sampling_ratio/mean": over.mean(ratios.importance),
            "sampling/importance_sampling_ratio/max": over.max(ratios.importance),
        }
    return metrics


def _clip_metrics(
    ratios: PolicyRatios, over: MaskedReductions, config: "LossConfig"
) -> dict[str, Tensor]:
    """Of the ratio and its clip; ratios of whole sequences are counted once for each."""
    sequences = ratios.sequences
    low, high = (
        flag.to(ratios.ratio.dtype) for flag in SURROGATES[config.surrogate].clipped(ratios, config)
    )

    mean = over.sequence_mean if config.ratio_level == "sequence" else over.mean
    low_mean, high_mean = mean(low), mean(high)
    metrics = {
        "ratio_mean": mean(ratios.ratio),
        "clip_ratio/low_mean": low_mean,
        "clip_ratio/high_mean": high_mean,
        "clip_ratio/region_mean": low_mean + high_mean,  # no token is clipped on both sides
    }
    if config.surrogate == "cispo":
        metrics["cispo_clip_ratio"] = high_mean
    if sequences.known:
        metrics["clip_ratio/low_min"] = over.min(sequences.mean(low))
        metrics["clip_ratio/high_max"] = over.max(sequences.mean(high))
    return metrics
