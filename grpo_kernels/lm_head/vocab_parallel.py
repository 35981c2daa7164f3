"""LM heads in shards: a vocabulary split over the ranks of a process group, and DTensor weights.

With a split vocabulary every rank runs the row functions over its own entries, as if there were no
others. Its statistics are partial results. With w the share of the row's probability that lies in a
shard, and v the reference policy's share, the statistics of the row are

    logprob = ln w + logprob of the shard that has the token
    entropy = Σ w (entropy - ln w)
    reverse KL = Σ w (KL + ln w - ln v)          forward: w and v exchanged
    Σ p² = Σ w² Σ p² of the shard                mean logit: weighted with the shards' entries

summed over shards. Nothing cancels that does not cancel within one row. A shard whose logits are
all -inf has no share; its statistics are ignored.

The partial results are all-gathered and not reduced. That moves half the bytes, keeps infinities,
and every rank sums the same numbers in the same order, so that all ranks have the same bits. Each
rank receives 12 bytes per token and rank, 4 more with an entropy, 12 more with a KL, 4 with Σ p²,
8 with the mean, and 8 K with the K largest logits, which are merged by value; in fp64 twice as
many. With `token_rows` these are per row, and the log-probs of the tokens are gathered after them.
"""

import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..backends import RowStats
from ..validation import OUT_OF_VOCAB, expect_number, expect_token_ids, values_are_readable

LOG2E, LN2 = math.log2(math.e), math.log(2.0)
ON_OTHER_RANK = -1  # the token lies in another rank's shard
NO_ENTRY = -1


def local_ids(tokens: Tensor, sizes: Tensor, rank: int) -> Tensor:
    """Map global ids to a rank's shard, ON_OTHER_RANK or OUT_OF_VOCAB; sizes: [ranks]."""
    start, end, total = sizes[:rank].sum(), sizes[: rank + 1].sum(), sizes.sum()
    others = torch.where((tokens >= 0) & (tokens < total), ON_OTHER_RANK, OUT_OF_VOCAB)
    return torch.where((tokens >= start) & (tokens < end), tokens - start, others)


@torch.library.custom_op(add_op_namespace_prefix("local_tokens"), mutates_args=())
def local_tokens(
    tokens: Tensor, mask: Tensor | None, rows: int, top_logprobs: int, vocab_group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Map tokens [N] to this rank's shard of that many rows, by one small all-gather.

    Returns:
        (local ids [N], the id of the shard's first row [], the size of the whole vocabulary []).
        Where values are readable, the ids and top_logprobs are checked against that size.
    """
    num_kept = tokens.new_tensor(len(tokens)) if mask is None else (mask != 0).sum()
    mine = torch.stack([tokens.new_tensor(rows), num_kept])
    sizes, counts = all_gather(mine, vocab_group).unbind(1)
    if values_are_readable(counts) and (counts != counts[0]).any():
        raise ValueError(
            "tokens must be the same on every rank of vocab_group, "
            f"got {', '.join(map(str, counts.tolist()))} of them"
        )
    if tokens.device.type == "cpu":
        V = int(sizes.sum())
        expect_token_ids(tokens, mask, V)
        expect_number("top_logprobs", top_logprobs, at_most=V)
    rank = torch.distributed.get_rank(_group(vocab_group))
    return local_ids(tokens, sizes, rank), sizes[:rank].sum(), sizes.sum()


@local_tokens.register_fake
def _(
    tokens: Tensor, mask: Tensor | None, rows: int, top_logprobs: int, vocab_group: str
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(tokens), tokens.new_empty(()), tokens.new_empty(())


def as_shard(stats: RowStats, tokens: Tensor) -> RowStats:
    """Set the log-prob [n] to -inf where the shard gives the token no probability."""
    absent = (tokens == ON_OTHER_RANK) | ((tokens >= 0) & _is_empty(stats.row_lse))
    assert stats.logprob is not None
    return stats._replace(logprob=torch.where(absent, -torch.inf, stats.logprob))


class TopLogits(NamedTuple):
    """The K largest logits of each row of a shard, before the softcap.

    A shard with fewer entries has logits of -inf with the id NO_ENTRY after them.
    """

    logits: Tensor  # [..., K], descending, of equal logits the smaller id first
    ids: Tensor  # [..., K], int64, in the whole vocabulary

    @classmethod
    def read(cls, logits: Tensor, columns: Tensor, ids: Tensor, K: int) -> "TopLogits":
        """Read the logits [n, V] in columns [n, at most K], whose entries have these ids."""
        padding = (0, K - columns.shape[-1])
        return cls(
            torch.nn.functional.pad(logits.gather(-1, columns), padding, value=-torch.inf),
            torch.nn.functional.pad(ids, padding, value=NO_ENTRY),
        )


def merge_shards(
    shards: RowStats,
    temperature: Tensor,
    kl: str | None,
    top: TopLogits | None = None,
    softcap: float | None = None,
) -> RowStats:
    """Merge statistics [ranks, n] of shards into those of whole rows [n].

    Args:
        temperature: [n].
        top: of the shards [ranks, n, K], in rank order; None where not asked for.
    """
    assert shards.logprob is not None
    scale = LOG2E / temperature
    share, row_lse = _log_shares(shards.row_lse, scale)
    logprob = (shards.logprob + share).amax(0)
    entropy, kl_value, ref_row_lse = shards.entropy, shards.kl, shards.ref_row_lse
    if entropy is not None:
        entropy = _expected(entropy - share, share)
    if kl_value is not None and ref_row_lse is not None:
        ref_share, ref_row_lse = _log_shares(ref_row_lse, scale)
        p, q = (share, ref_share) if kl == "reverse" else (ref_share, share)
        kl_value = _expected(torch.where(q == -torch.inf, torch.inf, kl_value + p - q), p)
    sum_sq_probs, mean_logit, num_entries = shards.sum_sq_probs, shards.mean_logit, None
    if sum_sq_probs is not None:
        parts = torch.where(share == -torch.inf, -torch.inf, sum_sq_probs + 2 * share)
        sum_sq_probs = parts.logsumexp(0)
    if mean_logit is not None and shards.num_entries is not None:
        num_entries = shards.num_entries.sum(0)
        sums = torch.where(shards.num_entries == 0, 0.0, mean_logit * shards.num_entries)
        mean_logit = sums.sum(0) / num_entries
    merged = RowStats(
        logprob, entropy, kl_value, row_lse, ref_row_lse, sum_sq_probs, mean_logit, num_entries
    )
    if top is None:
        return merged
    logits, top_ids = _merge_top(top)
    if softcap is not None:
        capped = softcap * (logits / softcap).tanh()
        logits = torch.where(logits == -torch.inf, logits, capped)
    pivot, log_sum = row_lse.split(1, dim=-1)
    top_logprobs = ((logits - pivot) * scale.unsqueeze(-1) - log_sum) * LN2
    return merged._replace(top_logprobs=top_logprobs, top_ids=top_ids)


def _merge_top(top: TopLogits) -> TopLogits:
    """Take the K largest logits of all shards [ranks, n, K].

    Stable sorts keep the order of the ids, which is that of the ranks, among equal logits. What
    only pads a shard comes last.
    """
    K = top.ids.shape[-1]
    logits, ids = (x.movedim(0, -2).flatten(-2) for x in top)
    order = (ids == NO_ENTRY).to(torch.uint8).sort(dim=-1, stable=True).indices
    by_value = logits.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(-1, by_value)[..., :K]
    return TopLogits(logits.gather(-1, order), ids.gather(-1, order))


def _is_empty(row_lse: Tensor) -> Tensor:
    """Find rows whose logits are all -inf: either backend marks them by an infinite part."""
    return (row_lse == -torch.inf).any(-1)


def _log_shares(row_lse: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ln of each shard's share [ranks, n], and row_lse [n, 2] of the whole rows."""
    maxima, log_sums = row_lse.unbind(-1)
    maximum = maxima.amax(0)
    bits = torch.where(_is_empty(row_lse), -torch.inf, (maxima - maximum) * scale + log_sums)
    largest = bits.amax(0)
    rest = (bits - largest).exp2().sum(0).log2()
    return (bits - largest - rest) * LN2, torch.stack((maximum, largest + rest), dim=-1)


def _expected(values: Tensor, log_share: Tensor) -> Tensor:
    """Sum share · value over the shards [n]; the value of a shard without a share is ignored."""
    share = log_share.exp()
    return torch.where(share == 0, 0.0, share * values).sum(0)


def merge_over_ranks(
    group: str,
    stats: RowStats,
    tokens: Tensor,
    temperature: Tensor,
    kl: str | None,
    top: TopLogits | None = None,
    softcap: float | None = None,
) -> RowStats:
    """Merge the statistics that the group's ranks have of the same rows, by one all-gather.

    Args:
        group: name of the process group.
        tokens: [n], `local_ids`.
        temperature: [n].
        top: of this rank's shard, [n, K]; None where not asked for.
    """
    stats = as_shard(stats, tokens)._replace(top_logprobs=None, top_ids=None)
    present = [x.view(len(tokens), -1) for x in stats if x is not None]
    if top is not None:  # the bits of an id, in a number that is moved and never computed with
        id_dtype = torch.int64 if temperature.dtype == torch.float64 else torch.int32
        present += [top.logits, top.ids.to(id_dtype).view(temperature.dtype)]
    gathered = all_gather(torch.cat(present, dim=-1), group)
    parts = iter(gathered.split([x.shape[1] for x in present], dim=-1))
    shards = stats.map(lambda x: next(parts).view(-1, *x.shape))
    if top is not None:
        logits, ids = parts
        top = TopLogits(logits, ids.contiguous().view(id_dtype).to(torch.int64))
    return merge_shards(shards, temperature, kl, top, softcap)


def _group(name: str) -> "torch.distributed.ProcessGroup":
    resolve: Any = torch.distributed.distributed_c10d._resolve_process_group  # takes a GroupName
    return resolve(name)


def all_gather(x: Tensor, group: str) -> Tensor:
    """Gather x of every rank on all of them: [ranks, *x.shape]."""
    ranks = torch.distributed.get_world_size(_group(group))
    gathered = x.new_empty((ranks, *x.shape))
    torch.distributed.all_gather(list(gathered.unbind(0)), x.contiguous(), group=_group(group))
    return gathered


def all_reduce_min(number: int, group: str, device: torch.device) -> int:
    """Return the smallest of the ranks' numbers; it waits for the device."""
    return int(all_gather(torch.tensor(number, device=device), group).min())


def all_reduce_sum(x: Tensor, group: str) -> Tensor:
    """Return the sum of x over the ranks; it may overwrite x."""
    torch.distributed.all_reduce(x, group=_group(group))
    return x


def unshard(weight: Tensor) -> Tensor:
    """Gather a DTensor on every rank; return any other tensor as it is.

    The gradient that comes back is the mean over ranks, in the shards of the weight: what FSDP
    makes of ranks that see different data, and what ranks that see the same data have already.
    """
    # A DTensor exists only where its module has been imported, which costs seconds.
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(weight, module.DTensor):
        return weight
    return _Unshard.apply(weight)


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Any) -> Tensor:
        ctx.mesh, ctx.placements = weight.device_mesh, weight.placements
        return weight.full_tensor()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial

        mesh = ctx.mesh
        mean = DTensor.from_local(grad / mesh.size(), mesh, [Partial()] * mesh.ndim)
        # Shards first: what replicas of them (HSDP) then have to reduce is a shard, not the whole.
        shards = [place if place.is_shard() else Partial() for place in ctx.placements]
        return mean.redistribute(mesh, shards).redistribute(mesh, ctx.placements)
