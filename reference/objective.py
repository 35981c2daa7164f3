"""The policy objective on per-token tensors, written to be checked against its formula by eye."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The objective's settings, unchecked; `policy_loss` says what each one does."""

    surrogate: str = "clip"
    ratio_level: str = "token"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    dual_clip: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    aggregation: str = "sequence_mean"
    max_completion_length: int | None = None
    importance_cap: float = 2.0


class LossOutput(NamedTuple):
    """The differentiable loss, and detached 0-dim metrics by name."""

    loss: Tensor
    metrics: dict[str, Tensor]


def policy_loss(
    logprob: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    entropy: Tensor | None = None,
    kl: Tensor | None = None,
    sampling_logprob: Tensor | None = None,
    config: LossConfig = LossConfig(),
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> LossOutput:
    """GRPO's loss and its relatives, from per-token log-probabilities.

        r      = exp(logprob - old), or exp(mean of that over the sequence)
        policy = -min(min(r, delta)·A, clip(r, 1 - epsilon_low, 1 + epsilon_high)·A)
                 where A < 0: at most dual_clip·|A|;  times min(exp(old - sampling), cap)
        loss   = aggregate(policy + beta·KL) - entropy_coef · mean over tokens of the entropy

    Log-ratios saturate at ±20 before exp (k3's at -20 only). Only `logprob`, `entropy` and `kl`
    are differentiated.

    Args:
        logprob: [B, T], or packed [N]; every other per-token tensor has its shape.
        advantages: [B] or [B, T]; packed: [N], or [sequences] with `cu_seqlens`.
        mask: bool or 0/1; a masked token has no effect, whatever it holds.
        old_logprob: None stands for logprob.detach().
        ref_logprob: for the KL estimators on sampled tokens.
        kl: per-token KL over the vocabulary, for kl_estimator "forward" and "reverse".
        sampling_logprob: the sampler's log-probabilities.
        normalizer: replaces the denominator of the aggregation.
        entropy_normalizer: replaces the token count in the entropy's mean.
        cu_seqlens: [sequences + 1] boundaries of packed sequences.
    """
    _check_inputs(logprob, ref_logprob, entropy, kl, config, cu_seqlens)
    _check_entropy_normalizer(normalizer, entropy_normalizer, config)
    dtype = torch.float64 if logprob.dtype == torch.float64 else torch.float32
    rows = _row_maker(logprob, cu_seqlens)
    keep = rows(torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask.bool())

    def select(x: Tensor) -> Tensor:
        return torch.where(keep, rows(x).to(dtype), 0.0)

    if advantages.shape == logprob.shape:
        advantage = select(advantages.detach())
    else:  # one per sequence
        advantage = torch.where(keep, advantages.detach().to(dtype).unsqueeze(-1), 0.0)
    old = select((logprob if old_logprob is None else old_logprob).detach())
    logprob = select(logprob)

    token_log_ratio = logprob - old
    log_ratio = token_log_ratio
    if config.ratio_level == "sequence":
        mean = log_ratio.sum(-1, keepdim=True) / keep.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = mean.expand_as(logprob)
    ratio = log_ratio.clamp(-20, 20).exp()
    policy = _clipped_surrogate(ratio, advantage, config)
    if sampling_logprob is not None:
        weight = (old - select(sampling_logprob.detach())).clamp(-20, 20).exp()
        weight = weight.clamp(max=config.importance_cap)
        policy = policy * weight

    per_token = policy
    if ref_logprob is not None:
        ref = select(ref_logprob.detach())
        kl_per_token = sampled_kl(logprob, old, ref, config.kl_estimator)
    else:
        kl_per_token = None if kl is None else select(kl)
    if config.beta != 0:
        per_token = per_token + config.beta * kl_per_token
    loss = _aggregate(per_token, keep, config, normalizer)
    if config.entropy_coef != 0:
        count = entropy_normalizer
        if count is None:
            count = keep.sum() if normalizer is None else normalizer
        loss = loss - config.entropy_coef * select(entropy).sum() / _nonzero(count)

    def mean(x: Tensor) -> Tensor:
        return torch.where(keep, x, 0.0).sum() / keep.sum().clamp(min=1)

    low = (ratio < 1 - config.epsilon_low) & (advantage < 0)
    high = (ratio > 1 + config.epsilon_high) & (advantage > 0)
    log_ratio = token_log_ratio.clamp(-20, 20)
    metrics = {
        "policy_loss": _aggregate(policy, keep, config, normalizer),
        "clip_ratio/low_mean": mean(low.to(dtype)),
        "clip_ratio/high_mean": mean(high.to(dtype)),
        "clip_ratio/region_mean": mean((low | high).to(dtype)),
        "approx_kl": mean(log_ratio.expm1() - log_ratio),
        "ratio_mean": mean(ratio),
        "ratio_max": ratio[keep].max() if keep.any() else ratio.new_zeros(()),
        "num_tokens": keep.sum().to(dtype),
    }
    if kl_per_token is not None:
        metrics["kl"] = mean(kl_per_token)
    if entropy is not None:
        metrics["entropy"] = mean(select(entropy))
    if sampling_logprob is not None:
        difference = (old - select(sampling_logprob.detach())).abs()
        kept = [x[keep] if keep.any() else x.new_zeros(1) for x in (difference, weight)]
        metrics |= {
            "sampling/sampling_logp_difference/mean": mean(difference),
            "sampling/sampling_logp_difference/max": kept[0].max(),
            "sampling/importance_sampling_ratio/min": kept[1].min(),
            "sampling/importance_sampling_ratio/mean": mean(weight),
            "sampling/importance_sampling_ratio/max": kept[1].max(),
        }
    return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})


def sampled_kl(logprob: Tensor, old: Tensor, ref: Tensor, estimator: str) -> Tensor:
    """Estimate KL(policy‖ref) on sampled tokens from d = logprob - ref.

    k1 = d, k2 = d²/2, k3 = e^(-d) - 1 + d, abs = |d|; k3_corrected = exp(logprob - old)·k3;
    k3+ has k3's value and k2's gradient.
    """
    d = logprob - ref
    k2 = d * d / 2
    bounded = d.clamp(min=-20)  # e^(-d) overflows on this side only
    k3 = torch.expm1(-bounded) + bounded
    if estimator == "k1":
        return d
    if estimator == "k2":
        return k2
    if estimator == "k3":
        return k3
    if estimator == "k3+":
        return k3.detach() + (k2 - k2.detach())
    if estimator == "k3_corrected":
        return (logprob - old).clamp(-20, 20).exp() * k3
    if estimator == "abs":
        return d.abs()
    raise ValueError(f"no such kl_estimator on sampled tokens: {estimator!r}")


def _clipped_surrogate(ratio: Tensor, advantage: Tensor, config: LossConfig) -> Tensor:
    if config.surrogate != "clip":
        raise ValueError(f"no such surrogate: {config.surrogate!r}")
    capped = ratio if config.delta is None else ratio.clamp(max=config.delta)
    clipped = ratio.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)
    loss = -torch.minimum(capped * advantage, clipped * advantage)
    if config.dual_clip is not None:
        ceiling = config.dual_clip * advantage.abs()
        loss = torch.where((advantage < 0) & (loss > ceiling), ceiling, loss)
    return loss


def _aggregate(
    x: Tensor, keep: Tensor, config: LossConfig, normalizer: float | Tensor | None
) -> Tensor:
    """x, keep: [B, T]; a sequence without a token counts as 0 in the means over sequences."""
    x = torch.where(keep, x, 0.0)
    sequences = max(len(x), 1)
    if config.aggregation == "token_mean":
        total, denominator = x.sum(), keep.sum()
    elif config.aggregation == "sequence_mean":
        total, denominator = (x.sum(-1) / keep.sum(-1).clamp(min=1)).sum(), sequences
    elif config.aggregation == "fixed_length":
        total, denominator = x.sum(), sequences * config.max_completion_length
    elif config.aggregation == "sequence_sum_mean":
        total, denominator = x.sum(-1).sum(), sequences
    else:
        raise ValueError(f"no such aggregation: {config.aggregation!r}")
    return total / _nonzero(denominator if normalizer is None else normalizer)


def _nonzero(count: float | Tensor) -> float | Tensor:
    """A count to divide by: where nothing was counted, the sum above it is 0 already."""
    return torch.where(count == 0, 1, count) if torch.is_tensor(count) else count


def _row_maker(logprob: Tensor, cu_seqlens: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A function that brings a per-token tensor to [sequences, longest], padded with zeros."""
    if cu_seqlens is None:  # a packed tensor without boundaries is one long row
        return lambda x: x if x.dim() == 2 else x.unsqueeze(0)
    lengths = cu_seqlens.diff().tolist()
    if not lengths:
        return lambda x: x.reshape(1, 0)
    return lambda x: pad_sequence(x.split(lengths), batch_first=True)


def _check_inputs(logprob, ref_logprob, entropy, kl, config, cu_seqlens) -> None:
    over_vocabulary = config.kl_estimator in ("forward", "reverse")
    given, wanted = (kl, "kl") if over_vocabulary else (ref_logprob, "ref_logprob")
    if config.beta != 0 and given is None:
        raise ValueError(f"beta != 0 with kl_estimator={config.kl_estimator!r} needs {wanted}")
    if (ref_logprob if over_vocabulary else kl) is not None:
        raise ValueError(f"kl_estimator={config.kl_estimator!r} takes {wanted} only")
    if config.entropy_coef != 0 and entropy is None:
        raise ValueError("entropy_coef != 0 needs entropy")
    token_level = config.ratio_level == "token" and config.aggregation == "token_mean"
    if logprob.dim() == 1 and cu_seqlens is None and not token_level:
        raise ValueError("a packed logprob needs cu_seqlens wherever sequences matter")


def _check_entropy_normalizer(normalizer, entropy_normalizer, config) -> None:
    unknown = normalizer is not None and entropy_normalizer is None
    if unknown and config.entropy_coef != 0 and config.aggregation != "token_mean":
        raise ValueError("normalizer with an entropy bonus needs entropy_normalizer, a token count")
