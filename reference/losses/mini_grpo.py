"""Functions of mini-GRPO's README, with its values, on full distributions over the vocabulary.

Logits are [..., V]; mask is [...], bool or 0/1. p is the reference policy, q the new policy. A mean
is over the unmasked tokens, 0 if there is none. Results are differentiable in the new policy's
logits only.
"""

import torch
from torch import Tensor

from reference.losses.token_stats import compute_dtype


def entropy_from_logits(logits: Tensor, mask: Tensor | None = None, detach: bool = True) -> Tensor:
    """Compute the mean of H(p) = -Σ p ln p, p = softmax(logits).

    With detach=True, mini-GRPO's behaviour, the result has no gradient, so an entropy bonus built
    on it trains nothing.
    """
    if detach:
        logits = logits.detach()
    logp = torch.log_softmax(_zero_masked(logits, mask), dim=-1)
    return _mean(-_times_log(logp.exp(), logp).sum(-1), mask)


def cross_entropy_from_logits(
    ref_logits: Tensor, new_logits: Tensor, mask: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Compute the mean of H(p, q) = -Σ p ln q. `eps` has no effect, as in mini-GRPO."""
    p = torch.softmax(_zero_masked(ref_logits.detach(), mask), dim=-1)
    logq = torch.log_softmax(_zero_masked(new_logits, mask), dim=-1)
    return _mean(-_times_log(p, logq).sum(-1), mask)


def kl_divergence(
    ref_logits: Tensor, new_logits: Tensor, mask: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Compute the mean of the forward KL(p‖q) = H(p, q) - H(p). `eps` has no effect."""
    cross_entropy = cross_entropy_from_logits(ref_logits, new_logits, mask, eps)
    return cross_entropy - entropy_from_logits(ref_logits, mask)


def approximate_kl_divergence(
    ref_logits: Tensor,
    new_logits: Tensor,
    mask: Tensor | None = None,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """Compute p/q - ln(p/q) - 1 for every vocabulary entry, with p and q at least `eps`.

    Reproduces two quirks of mini-GRPO. Entries are averaged with equal weights, an expectation
    under no policy, so the result estimates no KL. The mean counts the zeros of masked tokens.

    reduction: "mean" or "sum" over everything; anything else returns the entries, [..., V].
    """
    p = torch.softmax(_zero_masked(ref_logits.detach(), mask), dim=-1).clamp(min=eps)
    q = torch.softmax(_zero_masked(new_logits, mask), dim=-1).clamp(min=eps)
    ratio = p / q
    entries = ratio - torch.log(ratio) - 1
    if mask is not None:
        entries = torch.where(mask.bool().unsqueeze(-1), entries, 0.0)
    if reduction == "mean":
        return entries.sum() / max(1, entries.numel())
    return entries.sum() if reduction == "sum" else entries


def _zero_masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    logits = logits.to(compute_dtype(logits))
    return logits if mask is None else torch.where(mask.bool().unsqueeze(-1), logits, 0.0)


def _times_log(p: Tensor, logq: Tensor) -> Tensor:
    return p * torch.where(p == 0, 0.0, logq)  # 0 · ln 0 = 0


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x.sum() / max(1, x.numel())
    mask = mask.bool()
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)
