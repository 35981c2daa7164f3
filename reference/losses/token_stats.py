"""Per-token log-probability, entropy and KL of a categorical policy, with all logits in memory."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    """Per-token results; all but `logprob` are None unless requested."""

    logprob: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    sum_sq_probs: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None
    top_logprobs: Tensor | None = None
    top_ids: Tensor | None = None


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
    sum_sq_probs: bool = False,
    mean_logit: bool = False,
    is_top1: bool = False,
    top_logprobs: int = 0,
    support: Any = None,
) -> TokenStats:
    """Compute the log-prob of each token, the entropy of its distribution and a KL.

        x = softcap · tanh(logits / softcap) / temperature        p = softmax(x), q likewise
        logprob = ln p[token]                                     entropy = -Σ p ln p
        forward: KL(ref‖policy) = Σ q (ln q - ln p)               reverse: Σ p (ln p - ln q)
        sum_sq_probs = ln Σ p²                                    mean_logit = mean of x > -inf

    A logit of -inf has probability 0, contributes 0 and gets gradient 0.

    Args:
        logits: [B, T, V] or [N, V]; half dtypes are computed in fp32, fp64 in fp64.
        tokens: [B, T] or [N] ids in [0, V).
        temperature: > 0, a number or one per token; softcap: > 0.
        ref_logits: of the reference policy, shape of `logits`, never differentiated.
        kl: None, "forward" or "reverse".
        mask: bool or 0/1, shape of `tokens`; a masked token gives 0 and gets gradient 0, whatever
            its logits.
        is_top1: whether the token has the largest logit and is the first that has it.
        top_logprobs: K <= V, how many of the largest logits' ids and log-probs; of equal logits the
            smaller id comes first.
        support: (token_ids [S], offsets [N + 1]): token i was drawn from the entries
            token_ids[offsets[i] : offsets[i + 1]]; no ids: from all. The other entries count as
            -inf in both policies.

    Returns:
        TokenStats, fp32 (fp64 for fp64 logits), shape of `tokens`, differentiable in `logits`;
        is_top1, top_logprobs [..., K] and top_ids [..., K] have no gradient.

    Raises:
        ValueError: wrong shape, token id, K, KL or support, or missing ref_logits.
    """
    if tokens.shape != logits.shape[:-1]:
        raise ValueError(
            f"tokens must have shape {tuple(logits.shape[:-1])}: {tuple(tokens.shape)}"
        )
    keep = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    tokens = torch.where(keep, tokens, 0)
    if ((tokens < 0) | (tokens >= logits.shape[-1])).any():
        raise ValueError(f"tokens must lie in [0, {logits.shape[-1]})")

    if not 0 <= top_logprobs <= logits.shape[-1]:
        raise ValueError(f"top_logprobs must lie in [0, {logits.shape[-1]}]: {top_logprobs}")

    if support is not None:
        outside = ~_kept_entries(support, tokens, keep, V=logits.shape[-1])
        logits = logits.masked_fill(outside, -torch.inf)
        if ref_logits is not None:
            ref_logits = ref_logits.masked_fill(outside, -torch.inf)

    x = scaled_logits(logits, keep, temperature, softcap)
    logp = torch.log_softmax(x, dim=-1)
    p = logp.exp()
    logprob = logp.gather(-1, tokens.long().unsqueeze(-1)).squeeze(-1)

    token_entropy = token_kl = None
    if entropy:
        token_entropy = -(p * logp.masked_fill(p == 0, 0.0)).sum(-1)
        token_entropy = torch.where(keep, token_entropy, 0.0)
    if kl is not None:
        if ref_logits is None:
            raise ValueError(f"kl={kl!r} needs ref_logits")
        ref_x = scaled_logits(ref_logits.detach(), keep, temperature, softcap)
        logq = torch.log_softmax(ref_x, dim=-1)
        q = logq.exp()
        if kl == "forward":
            token_kl = (q * torch.where(q == 0, 0.0, logq - logp)).sum(-1)
        else:
            token_kl = (p * torch.where(p == 0, 0.0, logp - logq)).sum(-1)
        token_kl = torch.where(keep, token_kl, 0.0)

    more = {}
    if sum_sq_probs:
        more["sum_sq_probs"] = torch.where(keep, torch.logsumexp(2 * logp, dim=-1), 0.0)
    if mean_logit:
        included = x != -torch.inf
        mean = torch.where(included, x, 0.0).sum(-1) / included.sum(-1)
        more["mean_logit"] = torch.where(keep, mean, 0.0)
    if is_top1:
        more["is_top1"] = (logits.argmax(-1) == tokens) & (logprob > -torch.inf) & keep
    if top_logprobs:
        order = torch.sort(logits.detach(), dim=-1, descending=True, stable=True).indices
        ids = order[..., :top_logprobs]
        values = logp.detach().gather(-1, ids)
        more["top_logprobs"] = torch.where(keep.unsqueeze(-1), values, 0.0)
        more["top_ids"] = torch.where(keep.unsqueeze(-1), ids, 0)
    return TokenStats(torch.where(keep, logprob, 0.0), token_entropy, token_kl, **more)


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
    adapter: Any = None,
    token_rows: Tensor | None = None,
    sum_sq_probs: bool = False,
    mean_logit: bool = False,
    is_top1: bool = False,
    top_logprobs: int = 0,
    support: Any = None,
    chunk_tokens: int | None = None,
) -> TokenStats:
    """Compute `token_stats` of logits = hidden @ weight.T + bias.

    Args:
        hidden: [B, T, H] or [N, H]; weight: [V, H]; bias: [V].
        ref_hidden, ref_weight, ref_bias: of the reference policy, never differentiated.
        adapter: (a [r, H], b [V, r], scale): logits += scale · (hidden aᵀ) bᵀ.
        token_rows: [M], the row of hidden, flattened to [N, H], that predicts each token; tokens
            are then [M].
        chunk_tokens: has no effect; the package has this argument.
        Others: see `token_stats`.

    Returns:
        TokenStats, shape of `tokens`, differentiable in `hidden`, `weight`, `bias`, `a` and `b`.
    """
    if token_rows is not None:
        hidden = rows_of_tokens(hidden, token_rows, mask)
        ref_hidden = None if ref_hidden is None else rows_of_tokens(ref_hidden, token_rows, mask)
    ref_logits = None
    if kl is not None:
        if ref_hidden is None or ref_weight is None:
            raise ValueError(f"kl={kl!r} needs ref_hidden and ref_weight")
        with torch.no_grad():
            ref_logits = lm_head_logits(ref_hidden, ref_weight, ref_bias, mask)
    return token_stats(
        lm_head_logits(hidden, weight, bias, mask, adapter),
        tokens,
        temperature=temperature,
        softcap=softcap,
        entropy=entropy,
        ref_logits=ref_logits,
        kl=kl,
        mask=mask,
        sum_sq_probs=sum_sq_probs,
        mean_logit=mean_logit,
        is_top1=is_top1,
        top_logprobs=top_logprobs,
        support=support,
    )


def rows_of_tokens(hidden: Tensor, token_rows: Tensor, mask: Tensor | None) -> Tensor:
    """Copy the row of hidden of each token, [M, H]; a masked token gets any."""
    if mask is not None:
        token_rows = torch.where(mask.bool(), token_rows, 0)
    return hidden.flatten(0, -2)[token_rows]


def lm_head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    adapter: Any = None,
) -> Tensor:
    """Compute the logits in fp32 or fp64: operands are upcast first."""
    dtype = compute_dtype(hidden)
    hidden = hidden.to(dtype)
    if mask is not None:
        # Before the product: in its backward, 0 · NaN would spoil the weight's gradient.
        hidden = torch.where(mask.bool().unsqueeze(-1), hidden, 0.0)
    logits = hidden @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    if adapter is not None:
        a, b, scale = adapter
        logits = logits + scale * (hidden @ a.to(dtype).T) @ b.to(dtype).T
    return logits


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _kept_entries(support: Any, tokens: Tensor, keep: Tensor, V: int) -> Tensor:
    """Make the dense mask of a support, bool [..., V]; a masked token has all entries."""
    token_ids, offsets = (part.to(tokens.device).long() for part in support)
    N, S = tokens.numel(), len(token_ids)
    lengths = offsets.diff()
    if offsets.shape != (N + 1,) or offsets[0] != 0 or offsets[-1] != S or (lengths < 0).any():
        raise ValueError(f"support.offsets must hold {N + 1} ascending numbers from 0 to {S}")
    rows = torch.arange(N, device=tokens.device).repeat_interleave(lengths)
    is_read = keep.flatten()[rows]
    rows, token_ids = rows[is_read], token_ids[is_read]
    if ((token_ids < 0) | (token_ids >= V)).any():
        raise ValueError(f"support.token_ids must lie in [0, {V})")

    counts = torch.zeros(N * V, dtype=torch.int64, device=tokens.device)
    counts = counts.index_add(0, rows * V + token_ids, torch.ones_like(rows)).view(N, V)
    if (counts > 1).any():
        raise ValueError("support must hold each id of a token once")
    kept = (counts == 1) | (counts.sum(-1, keepdim=True) == 0)
    if not kept.gather(1, tokens.flatten().long().unsqueeze(1))[keep.flatten()].all():
        raise ValueError("support must hold the sampled token")
    return kept.view(*tokens.shape, V)


def scaled_logits(
    logits: Tensor, keep: Tensor, temperature: float | Tensor, softcap: float | None
) -> Tensor:
    """Return x, with zeros in rows that do not count."""
    x = logits.to(compute_dtype(logits))
    # Before any arithmetic: a NaN under the mask must not reach a value or a gradient.
    x = torch.where(keep.unsqueeze(-1), x, 0.0)
    excluded = x == -torch.inf
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    x = x.masked_fill(excluded, -torch.inf)  # a constant: it gets no gradient
    if isinstance(temperature, Tensor):
        if temperature.dim() > 0:
            temperature = torch.where(keep, temperature, 1.0).unsqueeze(-1)
        temperature = temperature.detach().to(x.dtype)
    return x / temperature
