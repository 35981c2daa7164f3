"""Row statistics and their gradient in PyTorch, a block of rows at a time.

The same contract as kernels/token_stats.py. Masked rows are not read.
"""

import torch
from torch import Tensor

from ...objective.token_gradients import TokenGrads
from ...workspace import thread_buffers
from ..interface import RowInputs, RowStats
from .softmax import FLOOR, LN2, LOG2E, Rows, Softmax, clear, exp2, row_blocks


def token_stats_forward(rows: RowInputs, *, entropy: bool) -> RowStats:
    """The statistics of every row."""
    logits, tokens, temperature, mask, ref_logits, softcap, kl = rows
    logprob = temperature.new_zeros(tokens.shape)
    row_lse = temperature.new_zeros((*tokens.shape, 2))
    stats = RowStats(
        logprob,
        torch.zeros_like(logprob) if entropy else None,
        torch.zeros_like(logprob) if kl else None,
        row_lse,
        torch.zeros_like(row_lse) if kl else None,
    )
    active = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    buffers = thread_buffers(logits.device)
    for block in row_blocks(active, logits.shape[-1]):
        scale = LOG2E / temperature[block].unsqueeze(-1)
        p = Softmax.of(logits[block], scale, softcap, buffers, "policy")
        stats.logprob[block] = p.logprob(tokens[block])
        stats.row_lse[block] = p.row_lse
        if entropy:
            stats.entropy[block] = p.entropy()
        if kl is not None:
            q = Softmax.of(ref_logits[block], scale, softcap, buffers, "reference")
            stats.kl[block] = p.divergence(q) if kl == "reverse" else q.divergence(p)
            stats.ref_row_lse[block] = q.row_lse
    return stats


class RowWeights:
    """What a block's upstream gradients make of its rows:

        dx = one_hot + p · (plain + log2p · log2 p + log2q · log2 q) + q_weight · q

    Every weight is [n, 1]; None is zero.
    """

    def __init__(
        self,
        inverse: Tensor,
        d_logprob: Tensor | None,
        d_entropy: Tensor | None,
        entropy: Tensor | None,
        d_kl: Tensor | None = None,
        kl_value: Tensor | None = None,
        kl: str | None = None,
    ) -> None:
        d_logprob, d_entropy, d_kl = (
            None if each is None else each.unsqueeze(-1) * inverse  # 1 / temperature
            for each in (d_logprob, d_entropy, d_kl)
        )
        self.one_hot, self.plain = d_logprob, torch.zeros_like(inverse)
        self.log2p = self.log2q = self.q = None
        if d_logprob is not None:
            self.plain = -d_logprob
        if d_entropy is not None:
            self.plain = self.plain - d_entropy * entropy.unsqueeze(-1)
            self.log2p = -LN2 * d_entropy
        if d_kl is not None and kl == "reverse":
            self.plain = self.plain - d_kl * kl_value.unsqueeze(-1)
            self.log2q = -LN2 * d_kl
            self.log2p = -self.log2q if self.log2p is None else self.log2p - self.log2q
        elif d_kl is not None:
            self.plain = self.plain + d_kl
            self.q = -d_kl


def row_gradient(
    p: Softmax, q: Softmax | None, weights: RowWeights, tokens: Tensor, out: Tensor
) -> Tensor:
    """dx [n, V] in out, which may be p.e; the softmaxes are used up.

    They are normalised by way of the weights: p · (plain + log2p · log2 p) is
    e · ((plain - log2p · log_sum) / total + log2p / total · z), which saves two passes.
    """
    plain, V, token = weights.plain, p.z.shape[-1], tokens.unsqueeze(-1)
    included = (token >= 0) & (token < V) & (p.z.gather(-1, token.clamp(0, V - 1)) > FLOOR)
    if weights.log2p is not None:
        plain = plain - weights.log2p * p.log_sum
    if weights.log2q is not None:
        plain = plain - weights.log2q * q.log_sum
    if weights.q is not None:
        exp2(q.z, out=q.e).mul_(weights.q / q.total).masked_fill_(p.z <= FLOOR, 0.0)
    factor = plain / p.total
    if weights.log2p is not None:
        factor = p.z.mul_(weights.log2p / p.total).add_(factor)
    if weights.log2q is not None:
        factor.add_(q.z.mul_(weights.log2q / p.total))
    dx = torch.mul(p.e, factor, out=out)
    if weights.q is not None:
        dx.add_(q.e)
    if weights.one_hot is not None:
        dx.scatter_add_(-1, token.clamp(0, V - 1), torch.where(included, weights.one_hot, 0.0))
    return dx


def write_gradient(
    d_logits: Tensor,
    at: Rows,
    p: Softmax,
    q: Softmax | None,
    weights: RowWeights,
    tokens: Tensor,
    rows: Tensor,
    softcap: float | None,
) -> None:
    """d_logits[at] = dx, at once where a block of it is a view in the accumulation dtype."""
    is_view = isinstance(at[1], slice) and d_logits.dtype == p.e.dtype
    if is_view and softcap is None:
        row_gradient(p, q, weights, tokens[at], out=d_logits[at])
        return
    dx = row_gradient(p, q, weights, tokens[at], out=p.e)
    if softcap is not None:
        tanh = p.z.copy_(rows).div_(softcap).tanh_()
        dx.mul_(tanh.square_().neg_().add_(1.0))
    if isinstance(at[1], slice):
        d_logits[at].copy_(dx)
    else:
        d_logits[at] = dx.to(d_logits.dtype)


def token_stats_backward(
    rows: RowInputs, stats: RowStats, grads: TokenGrads, d_logits: Tensor
) -> None:
    """Write every row's gradient to d_logits [B, T, V], which may be rows.logits itself."""
    active = torch.zeros_like(rows.tokens, dtype=torch.bool)
    for grad in grads:
        if grad is not None:
            active |= grad != 0
    if rows.mask is not None:
        active &= rows.mask
    clear(d_logits, ~active)
    buffers = thread_buffers(rows.logits.device)
    of_token = (grads.logprob, grads.entropy, stats.entropy, grads.kl, stats.kl)
    for block in row_blocks(active, rows.logits.shape[-1]):
        inverse = rows.temperature[block].reciprocal().unsqueeze(-1)
        logits, scale, q = rows.logits[block], LOG2E * inverse, None
        p = Softmax.again(logits, stats.row_lse[block], scale, rows.softcap, buffers, "policy")
        exp2(p.z, out=p.e)
        if grads.kl is not None:
            again = rows.ref_logits[block], stats.ref_row_lse[block], scale, rows.softcap
            q = Softmax.again(*again, buffers, "reference")
        weights = RowWeights(inverse, *(x if x is None else x[block] for x in of_token), rows.kl)
        write_gradient(d_logits, block, p, q, weights, rows.tokens, logits, rows.softcap)
