"""GRPO loss from logits and from hidden states: token statistics, then the policy objective."""

from typing import Any

import torch
from torch import Tensor

from reference.losses.policy_loss import LossOutput, policy_loss
from reference.losses.sequences import mask_with_nll
from reference.losses.token_stats import lm_head_logits, rows_of_tokens, token_stats


def grpo_loss(
    logits: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    ref_logits: Tensor | None = None,
    sampling_logprob: Tensor | None = None,
    nll_weight: Tensor | None = None,
    config: Any,
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    nll_normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    support: Any = None,
    inplace: bool = False,
) -> LossOutput:
    """Compute `policy_loss` from the `token_stats` of `logits`.

    The KL estimators "forward" and "reverse" need `ref_logits`. The others read `ref_logprob`, or
    the log-probs under `ref_logits` if only those are given. With beta = 0 the KL is a metric,
    computed if its input is given. The entropy is always a metric.

    Args:
        logits: [B, T, V] or packed [N, V]; tokens: [B, T] or [N].
        inplace: has no effect; the package has this argument.
        Others: see `policy_loss` and `token_stats`.

    Returns:
        LossOutput; the loss is differentiable in `logits`.

    Raises:
        ValueError: an input that `config` needs is missing.
    """
    over_vocabulary = config.kl_estimator in ("forward", "reverse")
    settings: dict[str, Any] = {
        "temperature": temperature,
        "softcap": softcap,
        "mask": mask_with_nll(mask, nll_weight, tokens, cu_seqlens, config),
        "support": support,
    }
    kl = config.kl_estimator if over_vocabulary and ref_logits is not None else None
    stats = token_stats(logits, tokens, ref_logits=ref_logits, kl=kl, **settings)
    if not over_vocabulary and ref_logprob is None and ref_logits is not None:
        with torch.no_grad():
            ref_logprob = token_stats(ref_logits, tokens, entropy=False, **settings).logprob
    return policy_loss(
        stats.logprob,
        advantages,
        mask=mask,
        old_logprob=old_logprob,
        ref_logprob=ref_logprob,
        entropy=stats.entropy,
        kl=stats.kl,
        sampling_logprob=sampling_logprob,
        nll_weight=nll_weight,
        config=config,
        normalizer=normalizer,
        entropy_normalizer=entropy_normalizer,
        nll_normalizer=nll_normalizer,
        cu_seqlens=cu_seqlens,
    )


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    sampling_logprob: Tensor | None = None,
    nll_weight: Tensor | None = None,
    config: Any,
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    nll_normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    support: Any = None,
    adapter: Any = None,
    token_rows: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> LossOutput:
    """Compute `grpo_loss` of logits = hidden @ weight.T + bias; ref_logits likewise.

    Args:
        hidden: [B, T, H] or packed [N, H]; weight: [V, H]; bias: [V].
        ref_hidden, ref_weight, ref_bias: of the reference policy, never differentiated.
        adapter: (a [r, H], b [V, r], scale): logits += scale · (hidden aᵀ) bᵀ.
        token_rows: see `linear_token_stats`.
        chunk_tokens: has no effect; the package has this argument.
        Others: see `grpo_loss`.

    Returns:
        LossOutput; the loss is differentiable in `hidden`, `weight`, `bias`, `a` and `b`.
    """
    read = mask_with_nll(mask, nll_weight, tokens, cu_seqlens, config)
    if token_rows is not None:
        hidden = rows_of_tokens(hidden, token_rows, read)
        ref_hidden = None if ref_hidden is None else rows_of_tokens(ref_hidden, token_rows, read)
    ref_logits = None
    if ref_hidden is not None and ref_weight is not None:
        with torch.no_grad():
            ref_logits = lm_head_logits(ref_hidden, ref_weight, ref_bias, read)
    return grpo_loss(
        lm_head_logits(hidden, weight, bias, read, adapter),
        tokens,
        advantages,
        mask=mask,
        old_logprob=old_logprob,
        ref_logprob=ref_logprob,
        ref_logits=ref_logits,
        sampling_logprob=sampling_logprob,
        nll_weight=nll_weight,
        config=config,
        normalizer=normalizer,
        entropy_normalizer=entropy_normalizer,
        nll_normalizer=nll_normalizer,
        cu_seqlens=cu_seqlens,
        temperature=temperature,
        softcap=softcap,
        support=support,
    )
