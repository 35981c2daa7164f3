"""Per-token log-probability, entropy and KL of a categorical policy, with every logit in memory."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    """Per-token results: `entropy` and `kl` are None unless they were asked for."""

    logprob: Tensor
    entropy: Tensor | None
    kl: Tensor | None


def token_stats(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = True,
    ref_logits: Tensor | None = None,
    kl: str | None = None,
    mask: Tensor | None = None,
) -> TokenStats:
    """Log-probability of each token, entropy of its distribution, and KL to a reference.

        x = softcap · tanh(logits / softcap) / temperature        p = softmax(x), q likewise
        logprob = ln p[token]                                     entropy = -Σ p ln p
        forward: KL(ref‖policy) = Σ q (ln q - ln p)               reverse: Σ p (ln p - ln q)

    A logit of -inf is an entry outside the vocabulary: probability 0, contribution 0, gradient 0.

    Args:
        logits: [B, T, V] or [N, V]; half dtypes are computed in fp32, fp64 in fp64.
        tokens: [B, T] or [N] ids in [0, V).
        temperature: > 0, a number or one per token.
        softcap: > 0; -inf logits stay -inf.
        entropy: False leaves the entropy out.
        ref_logits: shape of `logits`; same softcap and temperature, never differentiated.
        kl: None, "forward" or "reverse".
        mask: bool or 0/1, shape of `tokens`; a masked token gives 0 and gets gradient 0,
            whatever it holds.

    Returns:
        TokenStats, fp32 (fp64 for fp64 logits), shape of `tokens`, differentiable in `logits`.
    """
    if tokens.shape != logits.shape[:-1]:
        raise ValueError(
            f"tokens must have shape {tuple(logits.shape[:-1])}: {tuple(tokens.shape)}"
        )
    if kl not in (None, "forward", "reverse"):
        raise ValueError(f"kl must be None, 'forward' or 'reverse': {kl!r}")
    if kl is not None and ref_logits is None:
        raise ValueError(f"kl={kl!r} needs ref_logits")
    keep = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    tokens = torch.where(keep, tokens, 0)
    if ((tokens < 0) | (tokens >= logits.shape[-1])).any():
        raise ValueError(f"tokens must lie in [0, {logits.shape[-1]})")

    logp = _log_softmax(logits, keep, temperature, softcap)
    p = logp.exp()
    logprob = logp.gather(-1, tokens.long().unsqueeze(-1)).squeeze(-1)

    entropies = kls = None
    if entropy:
        entropies = -(p * logp.masked_fill(p == 0, 0.0)).sum(-1)
        entropies = torch.where(keep, entropies, 0.0)
    if kl is not None:
        logq = _log_softmax(ref_logits.detach(), keep, temperature, softcap)
        q = logq.exp()
        if kl == "forward":
            kls = (q * torch.where(q == 0, 0.0, logq - logp)).sum(-1)
        else:
            kls = (p * torch.where(p == 0, 0.0, logp - logq)).sum(-1)
        kls = torch.where(keep, kls, 0.0)
    return TokenStats(torch.where(keep, logprob, 0.0), entropies, kls)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = True,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kl: str | None = None,
    mask: Tensor | None = None,
    chunk_tokens: int | None = None,
    packing: Any = None,
) -> TokenStats:
    """`token_stats` of logits = hidden @ weight.T + bias.

    Args:
        hidden: [B, T, H] or [N, H]; weight: [V, H]; bias: [V]. Half dtypes are upcast before the
            product, so that the logits are never rounded.
        ref_hidden, ref_weight, ref_bias: the reference's, never differentiated.
        chunk_tokens, packing: accepted for the sake of the signature; this function works in one
            piece, and on every token.
        Others: as in `token_stats`.

    Returns:
        TokenStats, shape of `tokens`, differentiable in `hidden`, `weight` and `bias`.
    """
    if kl is not None and (ref_hidden is None or ref_weight is None):
        raise ValueError(f"kl={kl!r} needs ref_hidden and ref_weight")
    logits = _linear(hidden, weight, bias, mask)
    ref_logits = None
    if kl is not None:
        with torch.no_grad():
            ref_logits = _linear(ref_hidden, ref_weight, ref_bias, mask)
    return token_stats(
        logits,
        tokens,
        temperature=temperature,
        softcap=softcap,
        entropy=entropy,
        ref_logits=ref_logits,
        kl=kl,
        mask=mask,
    )


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _log_softmax(
    logits: Tensor, keep: Tensor, temperature: float | Tensor, softcap: float | None
) -> Tensor:
    x = logits.to(_compute_dtype(logits))
    # Selected before any arithmetic: NaN under the mask must not reach a value or a gradient.
    x = torch.where(keep.unsqueeze(-1), x, 0.0)
    excluded = x == -torch.inf
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    x = x.masked_fill(excluded, -torch.inf)  # a constant: it gets no gradient
    if torch.is_tensor(temperature):
        if temperature.dim() > 0:
            temperature = torch.where(keep, temperature, 1.0).unsqueeze(-1)
        temperature = temperature.detach().to(x.dtype)
    return torch.log_softmax(x / temperature, dim=-1)


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    dtype = _compute_dtype(hidden)
    hidden = hidden.to(dtype)
    if mask is not None:
        # Before the product: in its backward, 0 · NaN would spoil the weight's gradient.
        hidden = torch.where(mask.bool().unsqueeze(-1), hidden, 0.0)
    logits = hidden @ weight.to(dtype).T
    return logits if bias is None else logits + bias.to(dtype)
