"""Row statistics and their gradient in PyTorch, a block of rows at a time.

The same contract as kernels/token_stats.py. Masked rows are not read.
"""

import torch
from torch import Tensor

from ...workspace import thread_buffers
from .softmax import FLOOR, LN2, LOG2E, Rows, Softmax, clear, exp2, row_blocks


def token_stats_forward(
    logits: Tensor,
    tokens: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    ref_logits: Tensor | None,
    softcap: float | None,
    entropy: bool,
    kl: str | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """(logprob, entropy, kl, row_lse, ref_row_lse) of every row of logits [B, T, V].

    temperature is [B, T] in the accumulation dtype; a row_lse [B, T, 2] is (pivot, log_sum).
    """
    V = logits.shape[-1]
    logprob = temperature.new_zeros(tokens.shape)
    row_lse = temperature.new_zeros((*tokens.shape, 2))
    entropy_value = torch.zeros_like(logprob) if entropy else None
    kl_value = torch.zeros_like(logprob) if kl else None
    ref_row_lse = torch.zeros_like(row_lse) if kl else None
    active = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask != 0
    buffers = thread_buffers(logits.device)
    for at in row_blocks(active, V):
        scale = LOG2E / temperature[at].unsqueeze(-1)
        p = Softmax.of(logits[at], scale, softcap, buffers, "policy")
        logprob[at] = p.logprob(tokens[at])
        row_lse[at] = p.row_lse
        if entropy:
            entropy_value[at] = p.entropy()
        if kl is not None:
            q = Softmax.of(ref_logits[at], scale, softcap, buffers, "reference")
            kl_value[at] = p.divergence(q) if kl == "reverse" else q.divergence(p)
            ref_row_lse[at] = q.row_lse
    return logprob, entropy_value, kl_value, row_lse, ref_row_lse


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
    logits: Tensor,
    tokens: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    ref_logits: Tensor | None,
    row_lse: Tensor,
    ref_row_lse: Tensor | None,
    entropy_value: Tensor | None,
    kl_value: Tensor | None,
    d_logprob: Tensor | None,
    d_entropy: Tensor | None,
    d_kl: Tensor | None,
    softcap: float | None,
    kl: str | None,
    d_logits: Tensor,
) -> None:
    """Write every row's gradient to d_logits [B, T, V], which may be logits itself."""
    wanted = torch.zeros_like(tokens, dtype=torch.bool)
    for upstream in (d_logprob, d_entropy, d_kl):
        if upstream is not None:
            wanted |= upstream != 0
    if mask is not None:
        wanted &= mask != 0
    clear(d_logits, ~wanted)
    buffers = thread_buffers(logits.device)
    of_token = (d_logprob, d_entropy, entropy_value, d_kl, kl_value)
    for at in row_blocks(wanted, logits.shape[-1]):
        inverse = temperature[at].reciprocal().unsqueeze(-1)
        rows, scale, q = logits[at], LOG2E * inverse, None
        p = Softmax.again(rows, row_lse[at], scale, softcap, buffers, "policy")
        exp2(p.z, out=p.e)
        if d_kl is not None:
            again = ref_logits[at], ref_row_lse[at], scale, softcap, buffers, "reference"
            q = Softmax.again(*again)
        weights = RowWeights(inverse, *(x if x is None else x[at] for x in of_token), kl)
        write_gradient(d_logits, at, p, q, weights, tokens, rows, softcap)
