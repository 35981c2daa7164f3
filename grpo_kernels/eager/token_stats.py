"""Row statistics and their gradient in PyTorch, a block of rows at a time.

The same contract and the same quantities as kernels/token_stats.py: z and log_sum in bits, which
exp2 reads at twice the speed of exp. Masked rows are not read.

Every pass works in place on a few buffers of BLOCK_BYTES that are made once per call: a fresh
temporary per pass, and its page faults, took two thirds of the time. A block is small enough to
stay in the processor's cache from one pass to the next, and large enough that a pass, at whose end
the threads meet, is not over before they start.

A row's result must not depend on its neighbours, to the last bit. Reductions over the last axis
keep that promise in blocks of two rows or more: a single row would be split over the threads.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_BYTES = 2 << 20
LOG2E, LN2 = math.log2(math.e), math.log(2.0)
FLOOR = -1.0e30
NO_OVERLAP = 1.0e9  # |FLOOR| x a probability of 1e-21
LONG_ROW = 4096

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


def exp2(z: Tensor, out: Tensor) -> Tensor:
    """2^z of rows [n, V] in out, each entry the same bits wherever it lies.

    torch.exp2 ends a tensor, and each thread's share of it, in scalar code of another rounding: so
    one long row at a time, and for short rows, where the calls would cost more, torch.exp.
    """
    if z.shape[-1] < LONG_ROW:
        return torch.mul(z, LN2, out=out).exp_()
    for row, result in zip(z, out, strict=True):
        torch.exp2(row, out=result)
    return out


class Buffers:
    """Memory for a block of rows, made once by its name and used for every block of a call."""

    def __init__(self, V: int, like: Tensor) -> None:
        self._like, self._shape = like, (block_rows(V), V)
        self._named: dict[str, Tensor] = {}

    def __call__(self, name: str, n: int) -> Tensor:
        """[n, V] of the accumulation dtype."""
        if name not in self._named:
            self._named[name] = self._like.new_empty(self._shape)
        return self._named[name][:n]


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
        z, e, product = (buffers(each, len(rows)) for each in (f"{name} z", f"{name} e", "product"))
        z, pivot = _difference(rows, None, scale, softcap, out=z)
        total = exp2(z, out=e).sum(dim=-1, keepdim=True)
        return cls(z, e, pivot, total, total.log2(), product)

    @classmethod
    def again(
        cls,
        rows: Tensor,
        normaliser: Tensor,
        scale: Tensor,
        softcap: float | None,
        buffers: Buffers,
        name: str,
    ) -> "Softmax":
        """Of rows whose normaliser [n, 2] is known. e is not filled in: call exp2 where needed."""
        z, e, product = (buffers(each, len(rows)) for each in (f"{name} z", f"{name} e", "product"))
        pivot, log_sum = normaliser.split(1, dim=-1)
        z, _ = _difference(rows, pivot, scale, softcap, out=z)
        return cls(z, e, pivot, log_sum.exp2(), log_sum, product)

    @property
    def normaliser(self) -> Tensor:
        return torch.cat((self.pivot, self.log_sum), dim=-1)

    def logprob(self, tokens: Tensor) -> Tensor:
        """That of tokens [n]; NaN for an id outside of the vocabulary."""
        token, V = tokens.unsqueeze(-1), self.z.shape[-1]
        z = self.z.gather(-1, token.clamp(0, V - 1))
        z = z.masked_fill(z <= FLOOR, -torch.inf)
        z = z.masked_fill((token < 0) | (token >= V), torch.nan)
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
    buffers = Buffers(V, temperature)
    for at in row_blocks(active, V):
        scale = LOG2E / temperature[at].unsqueeze(-1)
        p = Softmax.of(logits[at], scale, softcap, buffers, "policy")
        logprob[at] = p.logprob(tokens[at])
        normaliser[at] = p.normaliser
        if entropy:
            entropy_value[at] = p.entropy()
        if kl is not None:
            q = Softmax.of(ref_logits[at], scale, softcap, buffers, "reference")
            kl_value[at] = p.divergence(q) if kl == "reverse" else q.divergence(p)
            ref_normaliser[at] = q.normaliser
    return logprob, entropy_value, kl_value, normaliser, ref_normaliser


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
    plain, V = weights.plain, p.z.shape[-1]
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
        token = tokens.unsqueeze(-1)
        in_range = (token >= 0) & (token < V)
        dx.scatter_add_(-1, token.clamp(0, V - 1), weights.one_hot.masked_fill(~in_range, 0.0))
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
    wanted = torch.zeros_like(tokens, dtype=torch.bool)
    for upstream in (d_logprob, d_entropy, d_kl):
        if upstream is not None:
            wanted |= upstream != 0
    if mask is not None:
        wanted &= mask != 0
    if not wanted.all():
        d_logits[~wanted] = 0
    buffers = Buffers(logits.shape[-1], temperature)
    of_token = (d_logprob, d_entropy, entropy_value, d_kl, kl_value)
    for at in row_blocks(wanted, logits.shape[-1]):
        inverse = temperature[at].reciprocal().unsqueeze(-1)
        rows, scale, q = logits[at], LOG2E * inverse, None
        p = Softmax.again(rows, normaliser[at], scale, softcap, buffers, "policy")
        exp2(p.z, out=p.e)
        if d_kl is not None:
            again = ref_logits[at], ref_normaliser[at], scale, softcap, buffers, "reference"
            q = Softmax.again(*again)
        weights = RowWeights(inverse, *(x if x is None else x[at] for x in of_token), kl)
        write_gradient(d_logits, at, p, q, weights, tokens, rows, softcap)
