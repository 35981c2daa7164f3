"""The functions of mini-GRPO's README, fused, with the same names, arguments and values.

Each takes floating-point logits [..., V], those of a pair with the same shape, and a mask [...],
bool or 0/1, where None counts every token. It returns a 0-dim mean over the unmasked tokens, 0 if
every token is masked, in fp32 (fp64 for fp64 logits). A pair is differentiable in `new_logits`
only. No tensor of the size of the logits is allocated except the gradient.
"""

from typing import Literal

import torch
from torch import Tensor

from .advantages import group_normalised_advantage
from .ops.approximate_kl import approximate_kl_sums
from .ops.token_stats import TokenStats, check_logits, token_stats
from .validation import (
    expect_choice,
    expect_mask,
    expect_number,
    expect_tensor,
    shape_of,
    suggest_keywords,
)

__all__ = [
    "approximate_kl_divergence",
    "cross_entropy_from_logits",
    "entropy_from_logits",
    "group_normalised_advantage",
    "kl_divergence",
]


@suggest_keywords
def entropy_from_logits(logits: Tensor, mask: Tensor | None = None, detach: bool = True) -> Tensor:
    """Compute the mean entropy -Σ p ln p, p = softmax(logits), over the tokens.

    mini-GRPO detaches the entropy, so a bonus built on it trains nothing; detach=True does the
    same. With detach=False the result has a gradient and the bonus works.

    Returns:
        0-dim, nats; differentiable in `logits` if detach=False.
    """
    expect_tensor("logits", logits, floating=True)
    stats = _token_stats(logits.detach() if detach else logits, mask, entropy=True)
    assert stats.entropy is not None
    return _masked_mean(stats.entropy, mask)


@suggest_keywords
def cross_entropy_from_logits(
    ref_logits: Tensor, new_logits: Tensor, mask: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Compute the mean cross-entropy -Σ q ln p, q = softmax(ref_logits), p = softmax(new_logits).

    Computed as KL(q‖p) + H(q), in nats. `eps` has no effect, as in mini-GRPO.
    """
    return kl_divergence(ref_logits, new_logits, mask, eps) + entropy_from_logits(ref_logits, mask)


@suggest_keywords
def kl_divergence(
    ref_logits: Tensor, new_logits: Tensor, mask: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Compute the mean forward KL(ref‖new) = Σ q (ln q - ln p) over the whole vocabulary.

    In nats; `eps` has no effect. The GRPO objective has the reverse KL instead:
    `token_stats(..., kl="reverse")`.
    """
    stats = _token_stats(new_logits, mask, entropy=False, ref_logits=ref_logits)
    assert stats.kl is not None
    return _masked_mean(stats.kl, mask)


@suggest_keywords
def approximate_kl_divergence(
    ref_logits: Tensor,
    new_logits: Tensor,
    mask: Tensor | None = None,
    eps: float = 1e-6,
    reduction: Literal["none", "mean", "sum"] = "mean",
) -> Tensor:
    """Compute q/p - ln(q/p) - 1 at every vocabulary entry, with p and q at least eps.

    The values are mini-GRPO's, with two quirks. The entries are averaged over the vocabulary with
    equal weights, which is not an expectation under any policy, so the result does not estimate a
    KL; for Schulman's k3 on the sampled tokens use `policy_loss`. The mean counts masked tokens as
    zeros.

    Args:
        eps: in (0, 1), lower bound of both probabilities.
        reduction: "mean" or "sum" over all entries, without a [..., V] temporary; "none" returns
            the entries [..., V].

    Schulman, 2020 (http://joschu.net/blog/kl-approx.html).
    """
    expect_choice("reduction", reduction, ("none", "mean", "sum"))
    _check_pair(ref_logits, new_logits)
    expect_mask(mask, new_logits[..., 0])
    expect_number("eps", eps, above=0, below=1)
    ref_rows, new_rows = _to_rows(ref_logits), _to_rows(new_logits)
    check_logits("ref_logits", ref_rows)
    check_logits("new_logits", new_rows)
    keep = (new_logits.new_ones(new_logits.shape[:-1]) if mask is None else mask) != 0
    if reduction == "none":
        dtype = torch.float64 if new_logits.dtype == torch.float64 else torch.float32
        keep = keep.unsqueeze(-1)
        q = torch.where(keep, ref_logits.detach(), 0).softmax(-1, dtype=dtype).clamp_min(eps)
        p = torch.where(keep, new_logits, 0).softmax(-1, dtype=dtype).clamp_min(eps)
        ratio = q / p
        return torch.where(keep, ratio - ratio.log() - 1, 0)
    total = approximate_kl_sums(ref_rows, new_rows, keep.reshape(new_rows.shape[:2]), eps).sum()
    return total if reduction == "sum" else total / max(1, new_logits.numel())


def _to_rows(logits: Tensor) -> Tensor:
    """Reshape logits [..., V] to [B, T, V]."""
    return logits if logits.dim() == 3 else logits.reshape(1, -1, logits.shape[-1])


def _token_stats(
    logits: Tensor, mask: Tensor | None, *, entropy: bool, ref_logits: Tensor | None = None
) -> TokenStats:
    """Compute entropy or forward KL; the log-prob, of token 0, is not used."""
    if ref_logits is not None:
        _check_pair(ref_logits, logits)
    expect_mask(mask, logits[..., 0])
    rows = _to_rows(logits)
    return token_stats(
        rows,
        torch.zeros(rows.shape[:2], dtype=torch.int64, device=rows.device),
        entropy=entropy,
        ref_logits=None if ref_logits is None else _to_rows(ref_logits),
        kl=None if ref_logits is None else "forward",
        mask=None if mask is None else mask.reshape(rows.shape[:2]),
    )


def _masked_mean(per_token: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return per_token.sum() / max(1, per_token.numel())
    return per_token.sum() / (mask != 0).sum().clamp(min=1)


def _check_pair(ref_logits: Tensor, new_logits: Tensor) -> None:
    expect_tensor("ref_logits", ref_logits, floating=True)
    expect_tensor("new_logits", new_logits, floating=True)
    if ref_logits.shape != new_logits.shape:
        raise ValueError(
            f"ref_logits must have the shape of new_logits, {tuple(new_logits.shape)}, "
            f"got {shape_of(ref_logits)}"
        )
    expect_tensor("ref_logits", ref_logits, device_of=new_logits)
