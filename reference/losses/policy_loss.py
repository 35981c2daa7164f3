"""The policy objective on per-token tensors, written to be checked against its formula by eye."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from reference.losses.kl_estimators import sampled_kl
from reference.losses.metrics import objective_metrics
from reference.losses.ratios import importance_weight
from reference.losses.sequences import Tokens, row_maker
from reference.losses.surrogates import SURROGATES
from reference.losses.token_selection import high_entropy, kept_tokens, kl_cov_term


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
    config: Any,
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> LossOutput:
    """GRPO's loss and its relatives, from per-token log-probabilities.

        policy = surrogate, 0 on the tokens that a filter drops, times the importance weight
                 (which vespo takes into its own weight instead), plus KL-Cov's term
        loss   = aggregate(policy + beta·KL) - entropy_coef · mean over tokens of the entropy

    surrogates.py, ratios.py and token_filters.py state these parts. With `top_entropy` the
    entropy's mean is over the tokens that it keeps. Log-ratios saturate at ±20 before exp (k3's at
    -20 only). Only `logprob`, `entropy` and `kl` are differentiated.

    Args:
        logprob: [B, T], or packed [N]; every other per-token tensor has its shape.
        advantages: [B] or [B, T]; packed: [N], or [sequences] with `cu_seqlens`.
        mask: bool or 0/1; a masked token has no effect, whatever it holds.
        old_logprob: None stands for logprob.detach().
        ref_logprob: for the KL estimators on sampled tokens.
        entropy: per token, for the bonus and for `top_entropy`.
        kl: per-token KL over the vocabulary, for kl_estimator "forward" and "reverse".
        sampling_logprob: the sampler's log-probabilities.
        normalizer: replaces the denominator of the aggregation.
        entropy_normalizer: replaces the token count in the entropy's mean.
        cu_seqlens: [sequences + 1] boundaries of packed sequences; without them packed tokens serve
            where no sequence matters.
    """
    _check_inputs(logprob, ref_logprob, entropy, kl, config, cu_seqlens)
    _check_entropy_normalizer(normalizer, entropy_normalizer, config)
    tokens = _lay_out(
        logprob,
        advantages,
        mask=mask,
        old=logprob if old_logprob is None else old_logprob,
        ref=ref_logprob,
        sampling=sampling_logprob,
        entropy=entropy,
        kl=kl,
        cu_seqlens=cu_seqlens,
    )
    kept = kept_tokens(tokens, config)
    policy = _policy_term(tokens, kept, config)
    kl_per_token = tokens.kl
    if tokens.ref is not None:
        kl_per_token = sampled_kl(tokens.logprob, tokens.old, tokens.ref, config.kl_estimator)
    per_token = policy if config.beta == 0 else policy + config.beta * kl_per_token
    loss = _aggregate(per_token, tokens.keep, config, normalizer)
    if config.entropy_coef != 0:
        count = normalizer if entropy_normalizer is None else entropy_normalizer
        loss = loss - config.entropy_coef * _mean_entropy(tokens, config, count)
    metrics = objective_metrics(
        tokens,
        config,
        policy_loss=_aggregate(policy, tokens.keep, config, normalizer),
        kl=kl_per_token,
        kept=kept,
        sequences_known=logprob.dim() == 2 or cu_seqlens is not None,
    )
    return LossOutput(loss, metrics)


def _lay_out(logprob, advantages, *, mask, old, ref, sampling, entropy, kl, cu_seqlens) -> Tokens:
    """Bring every input to [sequences, longest], fp32 or fp64, with 0 under the mask."""
    dtype = torch.float64 if logprob.dtype == torch.float64 else torch.float32
    rows = row_maker(logprob, cu_seqlens)
    keep = rows(torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask.bool())

    def select(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.where(keep, rows(x).to(dtype), 0.0)

    def constant(x: Tensor | None) -> Tensor | None:
        return None if x is None else select(x.detach())

    if advantages.shape == logprob.shape:
        advantage = constant(advantages)
    else:  # one per sequence
        advantage = torch.where(keep, advantages.detach().to(dtype).unsqueeze(-1), 0.0)
    return Tokens(
        keep=keep,
        logprob=select(logprob),
        old=constant(old),
        advantage=advantage,
        ref=constant(ref),
        sampling=constant(sampling),
        entropy=select(entropy),
        kl=select(kl),
    )


def _policy_term(tokens: Tokens, kept: Tensor, config: Any) -> Tensor:
    if config.surrogate not in SURROGATES:
        raise ValueError(f"no such surrogate: {config.surrogate!r}")
    policy = SURROGATES[config.surrogate](tokens, config)
    policy = torch.where(kept, policy, 0.0)
    weight = importance_weight(tokens, config)
    if weight is not None and config.surrogate != "vespo":
        policy = policy * weight
    if config.kl_cov is not None:
        policy = policy + kl_cov_term(tokens, config)
    return policy


def _aggregate(x: Tensor, keep: Tensor, config: Any, normalizer: float | Tensor | None) -> Tensor:
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


def _mean_entropy(tokens: Tokens, config: Any, count: float | Tensor | None) -> Tensor:
    """The mean over the tokens that the bonus acts on, times these tokens' share of `count`.

    `count` is the number of unmasked tokens of the whole batch, of which these may be a part.
    """
    chosen = tokens.keep
    if config.top_entropy is not None:
        chosen = high_entropy(tokens, config.top_entropy)
    mean = torch.where(chosen, tokens.entropy, 0.0).sum() / chosen.sum().clamp(min=1)
    return mean if count is None else mean * tokens.keep.sum() / _nonzero(count)


def _nonzero(count: float | Tensor) -> float | Tensor:
    """A count to divide by: where nothing was counted, the sum above it is 0 already."""
    return torch.where(count == 0, 1, count) if torch.is_tensor(count) else count


def _check_inputs(logprob, ref_logprob, entropy, kl, config, cu_seqlens) -> None:
    over_vocabulary = config.kl_estimator in ("forward", "reverse")
    given, wanted = (kl, "kl") if over_vocabulary else (ref_logprob, "ref_logprob")
    if config.beta != 0 and given is None:
        raise ValueError(f"beta != 0 with kl_estimator={config.kl_estimator!r} needs {wanted}")
    if (ref_logprob if over_vocabulary else kl) is not None:
        raise ValueError(f"kl_estimator={config.kl_estimator!r} takes {wanted} only")
    for name, setting, off in (
        ("entropy_coef", config.entropy_coef, 0),
        ("top_entropy", config.top_entropy, None),
    ):
        if setting != off and entropy is None:
            raise ValueError(f"{name}={setting} needs entropy")
    if logprob.dim() == 1 and cu_seqlens is None and _reads_sequences(config):
        raise ValueError("a packed logprob needs cu_seqlens wherever sequences matter")


def _reads_sequences(config: Any) -> bool:
    return (
        config.aggregation != "token_mean"
        or config.ratio_level != "token"
        or config.surrogate in ("vespo", "gmpo")
        or config.off_policy_threshold is not None
        or config.importance_level == "sequence"
    )


def _check_entropy_normalizer(normalizer, entropy_normalizer, config) -> None:
    unknown = normalizer is not None and entropy_normalizer is None
    if unknown and config.entropy_coef != 0 and config.aggregation != "token_mean":
        raise ValueError("normalizer with an entropy bonus needs entropy_normalizer, a token count")
