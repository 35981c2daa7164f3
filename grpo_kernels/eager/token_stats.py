"""Row statistics and their gradient in PyTorch, a block of rows at a time.

The same contract and the same quantities as kernels/token_stats.py: z and log_sum in bits, which
exp2 reads at three times the speed of exp. Temporaries are a few buffers of about BLOCK_BYTES,
whatever the number of tokens. Masked rows are not read.

The block's size is a compromise: 2 MiB would stay in the processor's cache from one pass to the
next, but every pass is a place where the threads meet, and on two cores that other programs were
using too, small blocks spent their time waiting: 8.6 s at 2 MiB, 3.1 s at 8, 2.2 s at 16 for 512 x
128,256 logits, forward and backward.

A row's result must not depend on its neighbours, to the last bit. Reductions over the last axis
keep that promise in blocks of two rows or more: a single row would be split over the threads.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_BYTES = 16 << 20
LOG2E, LN2 = math.log2(math.e), math.log(2.0)
FLOOR = -1.0e30
NO_OVERLAP = 1.0e9  # |FLOOR| x a probability of 1e-21
LONG_ROW = 4096

Rows = tuple[int, slice] | tuple[Tensor, Tensor]


def row_blocks(active: Tensor, V: int) -> Iterator[Rows]:
    """Indices of the True rows of active [B, T] in blocks of two rows or more.

    Neighbours are a slice, which indexing views; others are index tensors (b, t), which it copies.
    """
    b, t = active.nonzero(as_tuple=True)
    size = max(2, BLOCK_BYTES // (4 * V))
    for start in range(0, b.numel(), size):
        block_b, block_t = b[start : start + size], t[start : start + size]
        n, first, last = block_b.numel(), int(block_t[0]), int(block_t[-1])
        if n == 1:
            yield block_b.expand(2), block_t.expand(2)
        elif block_b[0] == block_b[-1] and last - first == n - 1:
            yield int(block_b[0]), slice(first, last + 1)
        else:
            yield block_b, block_t


def exp2_(x: Tensor) -> Tensor:
    """2^x of rows [n, V], in place, each entry the same bits wherever it lies.

    torch.exp2 ends a tensor, and each thread's share of it, in scalar code of another rounding: so
    one long row at a time, and for short rows, where the calls would cost more, torch.exp.
    """
    if x.shape[-1] < LONG_ROW:
        return x.mul_(LN2).exp_()
    for row in x:
        row.exp2_()
    return x


def _capped(rows: Tensor, softcap: float | None, dtype: torch.dtype) -> Tensor:
    """A fresh copy of the rows in dtype, after softcap · tanh(x / softcap); -inf stays -inf."""
    x = rows.to(dtype, copy=True)
    if softcap is None:
        return x
    excluded = x == -torch.inf
    return x.div_(softcap).tanh_().mul_(softcap).masked_fill_(excluded, -torch.inf)


class Softmax(NamedTuple):
    """A block of rows relative to their pivots, before normalisation."""

    z: Tensor  # [n, V]: (x - pivot) · scale, at least FLOOR, so that e · z is never 0 · inf
    e: Tensor  # [n, V]: 2^z
    pivot: Tensor  # [n, 1]: the maximum of x
    total: Tensor  # [n, 1]: Σ e

    @classmethod
    def of(cls, rows: Tensor, scale: Tensor, softcap: float | None) -> "Softmax":
        x = _capped(rows, softcap, scale.dtype)
        pivot = x.amax(dim=-1, keepdim=True)
        z = x.sub_(pivot).mul_(scale).clamp_(min=FLOOR)
        e = exp2_(z.clone())
        return cls(z, e, pivot, e.sum(dim=-1, keepdim=True))

    @property
    def log_sum(self) -> Tensor:
        return self.total.log2()

    @property
    def normaliser(self) -> Tensor:
        return torch.cat((self.pivot, self.log_sum), dim=-1)

    def mean(self, w: Tensor) -> Tensor:
        """Σ p · w, [n, 1]; overwrites w."""
        return w.mul_(self.e).sum(dim=-1, keepdim=True) / self.total

    def divergence(self, other: "Softmax") -> Tensor:
        """Σ p (ln p - ln p_other), [n, 1]; inf where p lives on entries that other excludes."""
        bits = self.mean(self.z - other.z) - self.log_sum + other.log_sum
        return bits.masked_fill(bits > NO_OVERLAP, torch.inf) * LN2


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
    """(logprob, entropy, kl, normaliser, ref_normaliser) of every row of logits [B, T, V].

    temperature is [B, T] in the accumulation dtype; a normaliser [B, T, 2] is (pivot, log_sum).
    """
    V = logits.shape[-1]
    logprob = temperature.new_zeros(tokens.shape)
    normaliser = temperature.new_zeros((*tokens.shape, 2))
    entropy_value = torch.zeros_like(logprob) if entropy else None
    kl_value = torch.zeros_like(logprob) if kl else None
    ref_normaliser = torch.zeros_like(normaliser) if kl else None
    active = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask != 0
    for at in row_blocks(active, V):
        scale = LOG2E / temperature[at].unsqueeze(-1)
        p = Softmax.of(logits[at], scale, softcap)
        token = tokens[at].unsqueeze(-1)
        z_token = p.z.gather(-1, token.clamp(0, V - 1))
        z_token = z_token.masked_fill(z_token <= FLOOR, -torch.inf)
        z_token = z_token.masked_fill((token < 0) | (token >= V), torch.nan)
        logprob[at] = (z_token - p.log_sum).squeeze(-1) * LN2
        normaliser[at] = p.normaliser
        if kl is not None:
            q = Softmax.of(ref_logits[at], scale, softcap)
            kl_value[at] = (p.divergence(q) if kl == "reverse" else q.divergence(p)).squeeze(-1)
            ref_normaliser[at] = q.normaliser
        if entropy:
            entropy_value[at] = (p.log_sum - p.mean(p.z)).squeeze(-1) * LN2
    return logprob, entropy_value, kl_value, normaliser, ref_normaliser


def log_softmax(rows: Tensor, normaliser: Tensor, scale: Tensor, softcap: float | None) -> Tensor:
    """log2 of the probabilities [n, V], at least FLOOR."""
    pivot, log_sum = normaliser.split(1, dim=-1)
    x = _capped(rows, softcap, scale.dtype)
    return x.sub_(pivot).mul_(scale).sub_(log_sum).clamp_(min=FLOOR)


def token_stats_backward(
    logits: Tensor,
    tokens: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    ref_logits: Tensor | None,
    normaliser: Tensor,
    ref_normaliser: Tensor | None,
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
    V = logits.shape[-1]
    wanted = torch.zeros_like(tokens, dtype=torch.bool)
    for upstream in (d_logprob, d_entropy, d_kl):
        if upstream is not None:
            wanted |= upstream != 0
    if mask is not None:
        wanted &= mask != 0
    d_logits[~wanted] = 0
    for at in row_blocks(wanted, V):
        inverse = temperature[at].reciprocal().unsqueeze(-1)
        scale = LOG2E * inverse
        rows = logits[at]
        log2p = log_softmax(rows, normaliser[at], scale, softcap)
        p = exp2_(log2p.clone())
        # dx = p · (weight + bits) - weight_kl · q, bits the terms in log2 p and log2 q
        weight, bits = torch.zeros_like(inverse), None
        if d_logprob is not None:
            one_hot = d_logprob[at].unsqueeze(-1) * inverse
            weight = weight - one_hot
        if d_entropy is not None:
            weight_log = d_entropy[at].unsqueeze(-1) * inverse
            weight = weight - weight_log * entropy_value[at].unsqueeze(-1)
            bits = log2p * (-LN2 * weight_log)
        if d_kl is not None:
            weight_kl = d_kl[at].unsqueeze(-1) * inverse
            log2q = log_softmax(ref_logits[at], ref_normaliser[at], scale, softcap)
            if kl == "reverse":
                weight = weight - weight_kl * kl_value[at].unsqueeze(-1)
                log_ratio = log2p.sub_(log2q).mul_(LN2 * weight_kl)
                bits = log_ratio if bits is None else bits.add_(log_ratio)
            else:
                weight = weight + weight_kl
        dx = p.mul_(weight if bits is None else bits.add_(weight))
        if d_kl is not None and kl == "forward":
            dx.sub_(exp2_(log2q).mul_(weight_kl).masked_fill_(log2p <= FLOOR, 0.0))
        if d_logprob is not None:
            token = tokens[at].unsqueeze(-1)
            in_range = (token >= 0) & (token < V)
            dx.scatter_add_(-1, token.clamp(0, V - 1), one_hot.masked_fill(~in_range, 0.0))
        if softcap is not None:
            tanh = rows.to(inverse.dtype, copy=True).div_(softcap).tanh_()
            dx.mul_(tanh.square_().neg_().add_(1.0))
        d_logits[at] = dx.to(d_logits.dtype)
