"""The softmax of rows in PyTorch, a block of rows at a time, and what is read off it.

The quantities are those of the kernels: z and log_sum in bits, which exp2 reads in two thirds of
exp's time.

Every pass works in place on a few buffers that a thread keeps (64 x 49,152 gradients in fp32 took
22 ms into new memory and 10 into memory in use). A block of BLOCK_BYTES is small enough to stay in
the processor's cache from one pass to the next, and large enough that a pass, at whose end the
threads meet, is not over before they start: forward of those rows on two cores took 10.9 ms in
blocks of 1 MiB, 8.3 in 2, 10.0 in 4 and 10.4 in 8.

A row's result must not depend on its neighbours, to the last bit. Reductions over the last axis
keep that promise in blocks of two rows or more: a single row would be split over the threads.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...workspace import Buffers

BLOCK_BYTES = 2 << 20
LOG2E, LN2 = math.log2(math.e), math.log(2.0)
FLOOR = -1.0e30
NO_OVERLAP = 1.0e9  # |FLOOR| x a probability of 1e-21
LONG_ROW = 4096
SHARE_UNIT = 64  # entries: more than any processor's vector code takes at a time
MIN_SHARE = 32_768  # entries of a thread, below which PyTorch employs fewer of them

Rows = tuple[int, slice] | tuple[Tensor, Tensor]


def block_rows(V: int) -> int:
    """How many rows are worked on at a time."""
    return max(2, BLOCK_BYTES // (4 * V))


def row_blocks(active: Tensor, V: int) -> Iterator[Rows]:
    """Indices of the True rows of active [B, T] in blocks of two rows or more.

    Neighbours are a slice, which indexing views; others are index tensors (b, t), which it copies.
    """
    b, t = active.nonzero(as_tuple=True)
    size = block_rows(V)
    for start in range(0, b.numel(), size):
        block_b, block_t = b[start : start + size], t[start : start + size]
        n, first, last = block_b.numel(), int(block_t[0]), int(block_t[-1])
        if n == 1:
            yield block_b.expand(2), block_t.expand(2)
        elif block_b[0] == block_b[-1] and last - first == n - 1:
            yield int(block_b[0]), slice(first, last + 1)
        else:
            yield block_b, block_t


def clear(d_logits: Tensor, rows: Tensor) -> None:
    """Zero the True rows [B, T] of d_logits [B, T, V]; by a mask every row would be walked."""
    if rows.any():
        d_logits[rows.nonzero(as_tuple=True)] = 0


def exp2(z: Tensor, out: Tensor) -> Tensor:
    """2^z of rows [n, V] in out, each entry the same bits wherever it lies.

    torch.exp2 ends a tensor, and each thread's share of it, in scalar code of another rounding. So
    rows are taken together only where no share has such an end; else one long row at a time, and
    for short rows, where the calls would cost more, torch.exp.
    """
    V = z.shape[-1]
    if V < LONG_ROW:
        return torch.mul(z, LN2, out=out).exp_()
    threads = torch.get_num_threads()
    if V % (SHARE_UNIT * threads) == 0 and z.numel() >= MIN_SHARE * threads:
        return torch.exp2(z, out=out)
    for row, result in zip(z, out, strict=True):
        torch.exp2(row, out=result)
    return out


def _capped(x: Tensor, softcap: float) -> Tensor:
    """softcap · tanh(x / softcap) in place; -inf stays -inf."""
    excluded = x == -torch.inf
    return x.div_(softcap).tanh_().mul_(softcap).masked_fill_(excluded, -torch.inf)


def _difference(
    rows: Tensor, pivot: Tensor | None, scale: Tensor, softcap: float | None, out: Tensor
) -> tuple[Tensor, Tensor]:
    """((x - pivot) · scale in out, at least FLOOR; pivot), by default the row's maximum."""
    if rows.dtype == out.dtype and softcap is None:
        x = rows
    else:
        x = out.copy_(rows)
        if softcap is not None:
            _capped(x, softcap)
    if pivot is None:
        pivot = x.amax(dim=-1, keepdim=True)
    return torch.sub(x, pivot, out=out).mul_(scale).clamp_(min=FLOOR), pivot


def _three(rows: Tensor, scale: Tensor, buffers: Buffers, name: str) -> Iterator[Tensor]:
    """Memory for z, e and the product of a block, the last shared by every softmax of a call."""
    names = (f"{name} z", f"{name} e", "product")
    return (buffers(each, *rows.shape, dtype=scale.dtype) for each in names)


class Softmax(NamedTuple):
    """A block of rows relative to their pivots, before normalisation: p = e / total."""

    z: Tensor  # [n, V]: (x - pivot) · scale, at least FLOOR, so that e · z is never 0 · inf
    e: Tensor  # [n, V]: 2^z
    pivot: Tensor  # [n, 1]: the maximum of x
    total: Tensor  # [n, 1]: Σ e
    log_sum: Tensor  # [n, 1]: log2 of it
    product: Tensor  # [n, V]: scratch

    @classmethod
    def of(
        cls, rows: Tensor, scale: Tensor, softcap: float | None, buffers: Buffers, name: str
    ) -> "Softmax":
        """Of rows that are seen for the first time."""
        z, e, product = _three(rows, scale, buffers, name)
        z, pivot = _difference(rows, None, scale, softcap, out=z)
        total = exp2(z, out=e).sum(dim=-1, keepdim=True)
        return cls(z, e, pivot, total, total.log2(), product)

    @classmethod
    def again(
        cls,
        rows: Tensor,
        row_lse: Tensor,
        scale: Tensor,
        softcap: float | None,
        buffers: Buffers,
        name: str,
    ) -> "Softmax":
        """Of rows whose row_lse [n, 2] is known. e is not filled in: call exp2 where needed."""
        z, e, product = _three(rows, scale, buffers, name)
        pivot, log_sum = row_lse.split(1, dim=-1)
        z, _ = _difference(rows, pivot, scale, softcap, out=z)
        return cls(z, e, pivot, log_sum.exp2(), log_sum, product)

    @property
    def row_lse(self) -> Tensor:
        return torch.cat((self.pivot, self.log_sum), dim=-1)

    def logprob(self, tokens: Tensor) -> Tensor:
        """That of tokens [n]; NaN for an id outside of the vocabulary."""
        token, V = tokens.unsqueeze(-1), self.z.shape[-1]
        z = self.z.gather(-1, token.clamp(0, V - 1))
        z = torch.where(z <= FLOOR, -torch.inf, z)  # masked_fill takes 30 us after threads ran
        z = torch.where((token >= 0) & (token < V), z, torch.nan)
        return (z - self.log_sum).squeeze(-1) * LN2

    def entropy(self) -> Tensor:
        """-Σ p ln p, [n]."""
        product = torch.mul(self.z, self.e, out=self.product)
        return (self.log_sum - self._over_total(product)).squeeze(-1) * LN2

    def divergence(self, other: "Softmax") -> Tensor:
        """Σ p (ln p - ln p_other), [n]; inf where p lives on entries that other excludes."""
        product = torch.sub(self.z, other.z, out=self.product).mul_(self.e)
        bits = (self._over_total(product) - self.log_sum + other.log_sum).squeeze(-1)
        return bits.masked_fill(bits > NO_OVERLAP, torch.inf) * LN2

    def _over_total(self, product: Tensor) -> Tensor:
        return product.sum(dim=-1, keepdim=True) / self.total
