"""The GRPO loss from logits and from hidden states: token statistics, then the objective."""

from typing import Any

import torch
from torch import Tensor

from reference.losses.policy_loss import LossOutput, policy_loss
from reference.losses.token_stats import TokenStats, linear_token_stats, token_stats


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
    config: Any,
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    inplace: bool = False,
) -> LossOutput:
    """`policy_loss` of the `token_stats` of `logits`.

    The KL to the reference follows config.kl_estimator. "forward" and "reverse" are summed over
    the vocabulary and need `ref_logits`. The others estimate it on the sampled tokens from
    `ref_logprob`, or, where only `ref_logits` is given, from the log-probabilities under it. With
    beta = 0 the KL is a metric, computed when its input is given. The entropy always is one.

    Args:
        logits: [B, T, V] or packed [N, V]; tokens: [B, T] or [N].
        inplace: accepted for the sake of the signature; the caller's logits are never modified.
        Others: as in `policy_loss` and `token_stats`.

    Returns:
        LossOutput; the loss is differentiable in `logits`.

    Raises:
        ValueError: beta is not 0 and what the KL estimator needs is missing.
    """
    over_vocabulary = config.kl_estimator in ("forward", "reverse")
    settings = {"temperature": temperature, "softcap": softcap, "mask": mask}
    kl = config.kl_estimator if over_vocabulary and ref_logits is not None else None
    stats = token_stats(logits, tokens, ref_logits=ref_logits, kl=kl, **settings)
    if not over_vocabulary and ref_logprob is None and ref_logits is not None:
        with torch.no_grad():
            ref_logprob = token_stats(ref_logits, tokens, entropy=False, **settings).logprob
    return _loss_of_stats(
        stats,
        advantages,
        mask=mask,
        old_logprob=old_logprob,
        ref_logprob=ref_logprob,
        sampling_logprob=sampling_logprob,
        config=config,
        normalizer=normalizer,
        entropy_normalizer=entropy_normalizer,
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
    config: Any,
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    packing: Any = None,
) -> LossOutput:
    """`grpo_loss` of logits = hidden @ weight.T + bias, ref_logits likewise.

    Args:
        hidden: [B, T, H] or packed [N, H]; weight: [V, H]; bias: [V].
        ref_hidden, ref_weight, ref_bias: the reference's, never differentiated.
        chunk_tokens, packing: accepted for the sake of the signature; this function works in one
            piece, and on every token.
        Others: as in `grpo_loss`.

    Returns:
        LossOutput; the loss is differentiable in `hidden`, `weight` and `bias`.
    """
    if (ref_hidden is None) != (ref_weight is None):
        raise ValueError("ref_hidden and ref_weight come together")
    over_vocabulary = config.kl_estimator in ("forward", "reverse")
    settings = {"temperature": temperature, "softcap": softcap, "mask": mask}
    kl = config.kl_estimator if over_vocabulary and ref_hidden is not None else None
    stats = linear_token_stats(
        hidden,
        weight,
        tokens,
        bias=bias,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        kl=kl,
        **settings,
    )
    if not over_vocabulary and ref_logprob is None and ref_hidden is not None:
        with torch.no_grad():
            ref_logprob = linear_token_stats(
                ref_hidden, ref_weight, tokens, bias=ref_bias, entropy=False, **settings
            ).logprob
    return _loss_of_stats(
        stats,
        advantages,
        mask=mask,
        old_logprob=old_logprob,
        ref_logprob=ref_logprob,
        sampling_logprob=sampling_logprob,
        config=config,
        normalizer=normalizer,
        entropy_normalizer=entropy_normalizer,
        cu_seqlens=cu_seqlens,
    )


def _loss_of_stats(stats: TokenStats, advantages: Tensor, **keywords) -> LossOutput:
    return policy_loss(stats.logprob, advantages, entropy=stats.entropy, kl=stats.kl, **keywords)
