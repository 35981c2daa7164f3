"""The softmax of a block of rows in PyTorch, and the statistics that are read from it.

The quantities are those of the kernels: z and log_sum are in bits, because exp2 takes two thirds of
the time of exp.

Every pass works in place on a few tensors of the thread's workspace: writing the gradient of
64 x 49,152 logits in fp32 took 22 ms into new memory and 10 into memory in use. A block of
BLOCK_BYTES is small enough to stay in the processor's last cache from one pass to the next. It is
large enough that the threads, which meet after every pass, share its rows evenly. Forward and
backward of 64 x 49,152 on two cores took 14.2 ms in blocks of 2 MiB, 10.5 in 4, 8.5 in 8 and 8.4 in
16; of 256 x 151,936 they took 176, 140, 122 and 130.

A row's result must not depend on its neighbours, to the last bit: `row_sum`, `exp2`.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...workspace import Workspace

BLOCK_BYTES = 8 << 20
LOG2E, LN2 = math.log2(math.e), math.log(2.0)
FLOOR = -1.0e30
NO_OVERLAP = 1.0e9  # |FLOOR| x a probability of 1e-21
LONG_ROW = 4096
RUN = 256  # entries
SHARE_UNIT = 64  # entries: more than any processor's vector code takes at a time
MIN_SHARE = 32_768  # entries of a thread, below which PyTorch employs fewer of them

Block = tuple[int, slice] | tuple[Tensor, Tensor]  # an index of [B, T, ...]


def row_blocks(active: Tensor, V: int) -> Iterator[Block]:
    """Index the True rows of active [B, T], a block at a time.

    Neighbouring rows are indexed by a slice, which makes a view; others by index tensors (b, t),
    which make a copy.
    """
    b, t = active.nonzero(as_tuple=True)
    size = max(1, BLOCK_BYTES // (4 * V))
    for start in range(0, b.numel(), size):
        block_b, block_t = b[start : start + size], t[start : start + size]
        n, first, last = block_b.numel(), int(block_t[0]), int(block_t[-1])
        if block_b[0] == block_b[-1] and last - first == n - 1:
            yield int(block_b[0]), slice(first, last + 1)
        else:
            yield block_b, block_t


def zero_rows(d_logits: Tensor, inactive: Tensor) -> None:
    """Zero the True rows of inactive [B, T]; assigning through the mask would visit every row."""
    if inactive.any():
        d_logits[inactive.nonzero(as_tuple=True)] = 0


def exp2(z: Tensor, out: Tensor) -> Tensor:
    """Compute 2^z of rows [n, V] in out; an entry has the same bits wherever it lies.

    torch.exp2 processes the end of a tensor, and of each thread's share, in scalar code that rounds
    differently. Rows are therefore computed together only if no share has such an end, and long
    rows otherwise one at a time. For short rows, where that many calls would cost more, torch.exp
    is used.
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


def row_sum(x: Tensor) -> Tensor:
    """Sum rows [n, V] to [n, 1].

    PyTorch splits the sum of a single row over the threads, which rounds differently. Two views of
    the row are two rows.
    """
    if len(x) == 1:
        return x.expand(2, -1).sum(dim=-1, keepdim=True)[:1]
    return x.sum(dim=-1, keepdim=True)


class Softmax(NamedTuple):
    """A block of rows relative to their pivots, before normalisation: p = e / total."""

    logits: Tensor  # [n, V], as given
    z: Tensor  # [n, V]: (x - pivot) · scale, at least FLOOR, so that e · z is never 0 · inf
    e: Tensor  # [n, V]: 2^z
    pivot: Tensor  # [n, 1]: the maximum of x, the logits after the softcap
    total: Tensor  # [n, 1]: Σ e
    log_sum: Tensor  # [n, 1]: log2 of it
    product: Tensor  # [n, V]: scratch, shared by every softmax of a call

    @property
    def row_lse(self) -> Tensor:
        return torch.cat((self.pivot, self.log_sum), dim=-1)

    def logprob(self, ids: Tensor) -> Tensor:
        """Log-probability of token ids [n, k]; NaN for an id outside of the vocabulary."""
        V = self.z.shape[-1]
        z = self.z.gather(-1, ids.clamp(0, V - 1))
        z = torch.where(z <= FLOOR, -torch.inf, z)  # masked_fill takes 30 us after threads ran
        z = torch.where((ids >= 0) & (ids < V), z, torch.nan)
        return (z - self.log_sum) * LN2

    def entropy(self) -> Tensor:
        """-Σ p ln p, [n]."""
        product = torch.mul(self.z, self.e, out=self.product)
        return (self.log_sum - self._normalized_sum(product)).squeeze(-1) * LN2

    def log_sum_sq_probs(self) -> Tensor:
        """ln Σ p², [n]."""
        squares = row_sum(torch.mul(self.e, self.e, out=self.product))
        return (squares.log2() - 2 * self.log_sum).squeeze(-1) * LN2

    def divergence(self, other: "Softmax") -> Tensor:
        """Σ p (ln p - ln p_other), [n]; inf where p has mass on entries that other excludes."""
        product = torch.sub(self.z, other.z, out=self.product).mul_(self.e)
        bits = (self._normalized_sum(product) - self.log_sum + other.log_sum).squeeze(-1)
        return bits.masked_fill(bits > NO_OVERLAP, torch.inf) * LN2

    def _normalized_sum(self, product: Tensor) -> Tensor:
        return row_sum(product) / self.total


def capped_logits(logits: Tensor, softcap: float | None, out: Tensor) -> Tensor:
    """Write the logits after the softcap to out, in its dtype."""
    x = out.copy_(logits)
    if softcap is not None:
        excluded = x == -torch.inf
        x.div_(softcap).tanh_().mul_(softcap).masked_fill_(excluded, -torch.inf)
    return x


def mean_logit(logits: Tensor, softcap: float | None, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, number) of the capped logits [n, V] that are not -inf, [n] each.

    The entries are counted only if a sum shows that there may be -inf: for 10 x 49,152 logits the
    sum took 0.05 ms, and 2.4 with the count.
    """
    x = logits
    if logits.dtype != scratch.dtype or softcap is not None:
        x = capped_logits(logits, softcap, out=scratch)
    total = row_sum(x).squeeze(-1)
    number = torch.full_like(total, logits.shape[-1])
    if not total.isfinite().all():
        excluded = logits == -torch.inf
        total = row_sum(scratch.copy_(x).masked_fill_(excluded, 0.0)).squeeze(-1)
        number -= excluded.sum(dim=-1)
    return total / number, number


def largest_id(logits: Tensor) -> Tensor:
    """Id [n, 1] of the largest logit of rows [n, V]; of equal logits the smallest id.

    The largest of each RUN of entries are found first, which vector code does and argmax of long
    rows does not: for 10 x 49,152 logits in fp32 on one core that took 0.1 to 0.3 ms, argmax 1.6 to
    2.3 and the sort of the others in `largest_ids` 5.5.
    """
    V = logits.shape[-1]
    if V < 2 * RUN:
        return logits.argmax(dim=-1, keepdim=True)
    whole = V - V % RUN
    maxima = [logits[:, :whole].unflatten(-1, (-1, RUN)).amax(dim=-1)]
    if whole < V:
        maxima.append(logits[:, whole:].amax(dim=-1, keepdim=True))
    run = torch.cat(maxima, dim=-1).argmax(dim=-1, keepdim=True)
    # The last run may be short; the entries before it, which fill it up, are smaller.
    ids = (run * RUN).clamp(max=V - RUN) + torch.arange(RUN, device=logits.device)
    return ids.gather(-1, logits.gather(-1, ids).argmax(dim=-1, keepdim=True))


def largest_ids(logits: Tensor, K: int) -> Tensor:
    """Ids [n, K] of the K largest logits of rows [n, V]; of equal logits the smaller id is first.

    torch.topk takes any of them. Of it comes the K-th largest value; the few entries that are not
    smaller are sorted by value and then by id. For 4 x 128,256 in fp32 and K = 8 that took 1.4 ms,
    a stable sort of the rows 50.
    """
    if K == 1:
        return largest_id(logits)
    least = logits.topk(K, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    rows, ids = (~(logits < least)).nonzero(as_tuple=True)  # a NaN is the largest, as in topk
    order = logits[rows, ids].sort(descending=True, stable=True).indices
    order = order[rows[order].sort(stable=True).indices]
    first = torch.searchsorted(rows, torch.arange(len(logits), device=rows.device))  # of each row
    return ids[order][first.unsqueeze(-1) + torch.arange(K, device=rows.device)]


def softmax(
    logits: Tensor,
    scale: Tensor,
    softcap: float | None,
    workspace: Workspace,
    name: str,
    row_lse: Tensor | None = None,
) -> Softmax:
    """Compute the softmax of a block of rows, in tensors of that name in the workspace.

    Args:
        logits: [n, V]; scale: [n, 1], log2(e) / temperature, in the accumulation dtype.
        row_lse: [n, 2], if it was saved. e is then not computed: call exp2 where it is needed.
    """
    z, e, product = (
        workspace(tensor, *logits.shape, dtype=scale.dtype)
        for tensor in (f"{name} z", f"{name} e", "product")
    )
    # The capped logits, in the accumulation dtype.
    x = logits
    if logits.dtype != scale.dtype or softcap is not None:
        x = capped_logits(logits, softcap, out=z)
    # Relative to the row's maximum, in bits.
    pivot = x.amax(dim=-1, keepdim=True) if row_lse is None else row_lse[..., :1]
    torch.sub(x, pivot, out=z).mul_(scale).clamp_(min=FLOOR)
    if row_lse is None:
        total = row_sum(exp2(z, out=e))
        return Softmax(logits, z, e, pivot, total, total.log2(), product)
    log_sum = row_lse[..., 1:]
    return Softmax(logits, z, e, pivot, log_sum.exp2(), log_sum, product)
