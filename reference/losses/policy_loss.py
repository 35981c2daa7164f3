"""Policy objective on per-token tensors, written to be compared with its formula by eye."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from reference.losses.kl_estimators import sampled_kl
from reference.losses.metrics import objective_metrics
from reference.losses.ratios import importance_weight
from reference.losses.sequences import Tokens, arrange, spread
from reference.losses.surrogates import RELATIVE_TO_SAMPLER, SURROGATES
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
    nll_weight: Tensor | None = None,
    config: Any,
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    nll_normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> LossOutput:
    """Compute the loss of GRPO and its relatives from per-token log-probabilities.

        policy = surrogate, 0 on filtered tokens, times the importance weight, plus KL-Cov's term
        loss   = aggregate(policy + beta·KL) - entropy_coef · mean entropy
                 + nll_coef · Σ nll_weight · (-logprob) / number of weights that are not 0

    surrogates.py, ratios.py, token_selection.py and kl_estimators.py define the parts. VESPO
    includes the importance weight in its own weight. With `top_entropy` the mean entropy is over
    the tokens it selects. Log-ratios saturate at ±20 before exp (k3's at -20 only). The loss is
    differentiable in `logprob`, `entropy` and `kl`.

    Args:
        config: an object with the attributes of grpo_kernels.LossConfig.
        Others: those of grpo_kernels.policy_loss.

    Raises:
        ValueError: an input that `config` needs is missing.
    """
    name = "kl" if config.kl_estimator in ("forward", "reverse") else "ref_logprob"
    if config.beta != 0 and (kl if name == "kl" else ref_logprob) is None:
        raise ValueError(f"beta != 0 with kl_estimator={config.kl_estimator!r} needs {name}")
    reads_sequences = (
        config.aggregation != "token_mean"
        or config.ratio_level != "token"
        or config.surrogate in ("vespo", "gmpo")
        or config.off_policy_threshold is not None
        or config.importance_level == "sequence"
        or any(rule.startswith("seq_") for rule in config.rejection)
    )
    if logprob.dim() == 1 and cu_seqlens is None and reads_sequences:
        raise ValueError("a packed logprob needs cu_seqlens wherever sequences matter")
    if config.surrogate in RELATIVE_TO_SAMPLER:
        old_logprob, sampling_logprob = sampling_logprob, None
    tokens = arrange(
        logprob,
        advantages,
        mask,
        cu_seqlens,
        old_logprob=old_logprob,
        ref_logprob=None if ref_logprob is None else ref_logprob.detach(),
        sampling_logprob=None if sampling_logprob is None else sampling_logprob.detach(),
        entropy=entropy,
        kl=kl,
    )

    kept = kept_tokens(tokens, config)
    policy = torch.where(kept, SURROGATES[config.surrogate](tokens, config), 0.0)
    weight = importance_weight(tokens, config)
    if weight is not None and config.surrogate != "vespo":
        policy = policy * weight
    if config.kl_cov is not None:
        policy = policy + kl_cov_term(tokens, config)

    token_kl = tokens.kl
    if tokens.ref_logprob is not None:
        token_kl = sampled_kl(
            tokens.logprob, tokens.old_logprob, tokens.ref_logprob, config.kl_estimator
        )
    per_token = policy if config.beta == 0 else policy + config.beta * token_kl
    loss = _aggregate(per_token, tokens, config, normalizer)

    if config.entropy_coef != 0:
        if tokens.entropy is None:
            raise ValueError("entropy_coef needs entropy")
        chosen = tokens.mask
        if config.top_entropy is not None:
            chosen = high_entropy(tokens, config.top_entropy)
        bonus = torch.where(chosen, tokens.entropy, 0.0).sum() / chosen.sum().clamp(min=1)
        count = normalizer if entropy_normalizer is None else entropy_normalizer
        if count is not None:  # the tokens of the whole batch, of which these are a part
            bonus = bonus * tokens.mask.sum() / _nonzero(count)
        loss = loss - config.entropy_coef * bonus

    metrics = objective_metrics(
        tokens,
        config,
        policy_loss=_aggregate(policy, tokens, config, normalizer),
        kl=token_kl,
        kept=kept,
        has_sequences=logprob.dim() == 2 or cu_seqlens is not None,
    )
    if config.nll_coef != 0:
        weight = spread(nll_weight, logprob, cu_seqlens).to(loss.dtype)
        count = (weight != 0).sum() if nll_normalizer is None else nll_normalizer
        terms = weight * torch.where(weight != 0, -logprob.to(loss.dtype), 0.0)
        nll_loss = config.nll_coef * terms.sum() / _nonzero(count)
        loss = loss + nll_loss
        metrics["nll_loss"] = nll_loss.detach()
    return LossOutput(loss, metrics)


def _aggregate(x: Tensor, tokens: Tokens, config: Any, normalizer: float | Tensor | None) -> Tensor:
    """Reduce [sequences, longest] to a number; an empty sequence counts as 0 in the means."""
    mask = tokens.mask
    x, sequences = torch.where(mask, x, 0.0), max(len(x), 1)
    if config.aggregation == "token_mean":
        total, denominator = x.sum(), mask.sum()
    elif config.aggregation == "sequence_mean":
        total, denominator = (x.sum(-1) / mask.sum(-1).clamp(min=1)).sum(), sequences
    elif config.aggregation == "fixed_length":
        total, denominator = x.sum(), sequences * config.max_completion_length
    elif config.aggregation == "prompt_mean":
        by_prompt = (-1, config.completions_per_prompt)
        sums, lengths = (values.sum(-1).view(by_prompt).sum(-1) for values in (x, mask))
        total, denominator = (sums / lengths.clamp(min=1)).sum(), max(len(sums), 1)
    else:  # sequence_sum_mean
        total, denominator = x.sum(-1).sum(), sequences
    return total / _nonzero(denominator if normalizer is None else normalizer)


def _nonzero(count: float | Tensor) -> float | Tensor:
    """Replace a count of 0 by 1; the sum that it divides is 0 then."""
    return torch.where(count == 0, 1, count) if isinstance(count, Tensor) else count
