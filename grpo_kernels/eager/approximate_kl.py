"""mini-GRPO's approximate KL and its gradient, a block of rows at a time.

The quantities are those of kernels/approximate_kl.py: t, the log2 of q / p with both at least eps,
and W, the sum over a row of w = (1 - 2^t) where p >= eps.
"""

import torch
from torch import Tensor

from .token_stats import LN2, LOG2E, Softmax, log_softmax, row_blocks


def _log_ratio(log2p: Tensor, log2q: Tensor, log2_eps: float) -> Tensor:
    return log2q.clamp(min=log2_eps).sub_(log2p.clamp(min=log2_eps))


def _weights(log2p: Tensor, ratio: Tensor, log2_eps: float) -> Tensor:
    """w of every entry; overwrites ratio = 2^t."""
    return ratio.neg_().add_(1.0).masked_fill_(log2p < log2_eps, 0.0)


def approximate_kl_forward(
    logits: Tensor, ref_logits: Tensor, mask: Tensor, log2_eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total, W, normaliser, ref_normaliser) of every row of [B, T, V]; mask [B, T]."""
    total = logits.new_zeros(mask.shape, dtype=dtype)
    weight = torch.zeros_like(total)
    normaliser = logits.new_zeros((*mask.shape, 2), dtype=dtype)
    ref_normaliser = torch.zeros_like(normaliser)
    scale = total.new_full((1, 1), LOG2E)
    for at in row_blocks(mask, logits.shape[-1]):
        p = Softmax.of(logits[at], scale, None)
        q = Softmax.of(ref_logits[at], scale, None)
        normaliser[at], ref_normaliser[at] = p.normaliser, q.normaliser
        log2p, log2q = p.z.sub_(p.log_sum), q.z.sub_(q.log_sum)
        t = _log_ratio(log2p, log2q, log2_eps)
        ratio = t.exp2()
        total[at] = (ratio - 1.0).sub_(t.mul_(LN2)).sum(dim=-1)
        weight[at] = _weights(log2p, ratio, log2_eps).sum(dim=-1)
    return total, weight, normaliser, ref_normaliser


def approximate_kl_backward(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor,
    weight: Tensor,
    normaliser: Tensor,
    ref_normaliser: Tensor,
    d_total: Tensor,
    log2_eps: float,
    d_logits: Tensor,
) -> None:
    """Write d_total · (w - p W) of every row to d_logits [B, T, V]."""
    scale = weight.new_full((1, 1), LOG2E)
    d_logits[~mask] = 0
    for at in row_blocks(mask, logits.shape[-1]):
        log2p = log_softmax(logits[at], normaliser[at], scale, None)
        log2q = log_softmax(ref_logits[at], ref_normaliser[at], scale, None)
        w = _weights(log2p, _log_ratio(log2p, log2q, log2_eps).exp2_(), log2_eps)
        dx = w.sub_(log2p.exp2_().mul_(weight[at].unsqueeze(-1)))
        d_logits[at] = dx.mul_(d_total[at].unsqueeze(-1)).to(d_logits.dtype)
