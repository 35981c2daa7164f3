"""The functions of mini-GRPO's README under their own names, with its values, fused.

Each takes logits [..., V] and returns a 0-dim mean over the unmasked tokens; none builds a tensor
of the logits' size but the gradient. Where every token is masked the result is 0, not 0/0.
"""

from typing import Literal

import torch
from torch import Tensor

from . import checks
from .advantages import group_normalised_advantage
from .ops.approximate_kl import approximate_kl_sums
from .ops.token_stats import TokenStats, token_stats

__all__ = [
    "approximate_kl_divergence",
    "cross_entropy_from_logits",
    "entropy_from_logits",
    "group_normalised_advantage",
    "kl_divergence",
]


def entropy_from_logits(logits: Tensor, mask: Tensor | None = None, detach: bool = True) -> Tensor:
    """Mean entropy of the tokens' distributions, -Σ p ln p with p = softmax(logits).

    mini-GRPO detaches the entropy, so that a bonus built on it trains nothing: detach=True keeps
    that. With detach=False the result has its gradient, and the bonus works.

    Args:
        logits: [..., V], floating point.
        mask: [...], bool or 0/1; None counts every token.
        detach: whether to cut the gradient.

    Returns:
        0-dim, nats, fp32 (fp64 for fp64 logits); differentiable in `logits` if not detached.
    """
    checks.expect_tensor("logits", logits, floating=True)
    stats = _statistics(logits.detach() if detach else logits, mask, entropy=True)
    return _mean(stats.entropy, mask)


def cross_entropy_from_logits(
    ref_logits: Tensor, new_logits: Tensor, mask: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Mean cross-entropy -Σ q ln p, q = softmax(ref_logits), p = softmax(new_logits).

    Computed as KL(q‖p) + H(q). `eps` has no effect, as in mini-GRPO.

    Args:
        ref_logits, new_logits: [..., V], floating point, of one shape.
        mask: [...], bool or 0/1; None counts every token.

    Returns:
        0-dim, nats, fp32 (fp64 for fp64 logits); differentiable in `new_logits` only.
    """
    return kl_divergence(ref_logits, new_logits, mask, eps) + entropy_from_logits(ref_logits, mask)


def kl_divergence(
    ref_logits: Tensor, new_logits: Tensor, mask: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Mean KL(ref‖new) = Σ q (ln q - ln p) over the whole vocabulary: the forward KL.

    The divergence in the GRPO objective is the other one, `token_stats(..., kl="reverse")`.

    Args and Returns as in `cross_entropy_from_logits`.
    """
    stats = _statistics(new_logits, mask, entropy=False, ref_logits=ref_logits)
    return _mean(stats.kl, mask)


def approximate_kl_divergence(
    ref_logits: Tensor,
    new_logits: Tensor,
    mask: Tensor | None = None,
    eps: float = 1e-6,
    reduction: Literal["none", "mean", "sum"] = "mean",
) -> Tensor:
    """q/p - ln(q/p) - 1 at every entry of the vocabulary, with p and q at least eps.

    mini-GRPO's values, with their two quirks. The entries are averaged over the vocabulary as if
    each were equally likely, an expectation under no policy, so that the result estimates no KL:
    for Schulman's k3 on the sampled tokens use `policy_loss`. And the mean counts masked tokens,
    as zeros.

    Args:
        ref_logits, new_logits: [..., V], floating point, of one shape.
        mask: [...], bool or 0/1; None counts every token.
        eps: in (0, 1), the floor under both probabilities.
        reduction: "mean" or "sum" over everything, without a [..., V] temporary; "none" returns
            the entries, which are [..., V] by definition.

    Returns:
        0-dim, or [..., V] for "none"; fp32 (fp64 for fp64 logits); differentiable in
        `new_logits` only.

    Schulman, 2020 (http://joschu.net/blog/kl-approx.html).
    """
    checks.expect_choice("reduction", reduction, ("none", "mean", "sum"))
    checks.check_pair("ref_logits", ref_logits, "new_logits", new_logits)
    checks.expect_mask(mask, new_logits.shape[:-1])
    checks.expect_number("eps", eps, above=0, below=1)
    ref_rows, new_rows = _rows(ref_logits), _rows(new_logits)
    checks.check_logits("ref_logits", ref_rows)
    checks.check_logits("new_logits", new_rows)
    keep = new_logits.new_ones(new_logits.shape[:-1], dtype=torch.bool)
    if mask is not None:
        keep = mask != 0
    if reduction == "none":
        return _approximate_kl_entries(ref_logits, new_logits, keep, eps)
    total = approximate_kl_sums(ref_rows, new_rows, keep.reshape(new_rows.shape[:2]), eps).sum()
    return total if reduction == "sum" else total / max(1, new_logits.numel())


def _approximate_kl_entries(ref: Tensor, new: Tensor, keep: Tensor, eps: float) -> Tensor:
    dtype = torch.float64 if new.dtype == torch.float64 else torch.float32
    keep = keep.unsqueeze(-1)
    q = torch.where(keep, ref.detach(), 0).softmax(dim=-1, dtype=dtype).clamp_min(eps)
    p = torch.where(keep, new, 0).softmax(dim=-1, dtype=dtype).clamp_min(eps)
    ratio = q / p
    return torch.where(keep, ratio - ratio.log() - 1, 0)


def _rows(logits: Tensor) -> Tensor:
    """[B, T, V] of logits [..., V]."""
    return logits if logits.dim() == 3 else logits.reshape(1, -1, logits.shape[-1])


def _statistics(
    logits: Tensor, mask: Tensor | None, *, entropy: bool, ref_logits: Tensor | None = None
) -> TokenStats:
    if ref_logits is not None:
        checks.check_pair("ref_logits", ref_logits, "new_logits", logits)
    checks.expect_mask(mask, logits.shape[:-1])
    rows = _rows(logits)
    return token_stats(
        rows,
        torch.zeros(rows.shape[:2], dtype=torch.int64, device=rows.device),
        entropy=entropy,
        ref_logits=None if ref_logits is None else _rows(ref_logits),
        kl=None if ref_logits is None else "forward",
        mask=None if mask is None else mask.reshape(rows.shape[:2]),
    )


def _mean(per_token: Tensor, mask: Tensor | None) -> Tensor:
    count = per_token.numel() if mask is None else (mask != 0).sum()
    return per_token.sum() / (max(1, count) if mask is None else count.clamp(min=1))
