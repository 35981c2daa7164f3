"""Rows of logits whose vocabulary lies in shards, one on each rank of a process group.

Every rank runs the row functions over its own entries, as if there were no others. What it finds
are partials: with w the share of the row's probability in a shard, v the reference's, the chain
rule makes the row of them,

    logprob = ln w + its logprob, of the shard that has the token
    entropy = Σ w (its entropy - ln w)
    reverse KL = Σ w (its KL + ln w - ln v)      forward: w and v exchanged

in which nothing cancels that does not cancel within one row. A shard whose logits are all -inf has
no share, and whatever the row functions say of it is left out.

The partials are unshard and not reduced: that moves half the bytes, keeps an infinity as it is,
and every rank adds up the same numbers in the same order, so that all have the same bits. 12 bytes
per token and rank are received, 4 more with an entropy and 12 with a KL; in fp64 twice as many.
"""

import math

import torch
from torch import Tensor

LOG2E, LN2 = math.log2(math.e), math.log(2.0)
ON_OTHER_RANK = -1  # the token lies in another rank's shard
OUT_OF_VOCAB = -2  # and in no rank's

# What a row function returns of each row: (logprob, entropy, kl, row_lse, ref_row_lse).
Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]


def local_ids(tokens: Tensor, sizes: Tensor, rank: int) -> Tensor:
    """Map global ids to a rank's shard, ON_OTHER_RANK or OUT_OF_VOCAB; sizes [ranks]."""
    start, end, total = sizes[:rank].sum(), sizes[: rank + 1].sum(), sizes.sum()
    others = torch.where((tokens >= 0) & (tokens < total), ON_OTHER_RANK, OUT_OF_VOCAB)
    return torch.where((tokens >= start) & (tokens < end), tokens - start, others)


def as_shard(outputs: Outputs, tokens: Tensor) -> Outputs:
    """A shard's outputs [n] with log-prob -inf where the shard gives the token no probability."""
    logprob, *others = outputs
    absent = (tokens == ON_OTHER_RANK) | ((tokens >= 0) & _is_empty(outputs[3]))
    return (torch.where(absent, -torch.inf, logprob), *others)


def merge_shards(shards: Outputs, temperature: Tensor, kl: str | None) -> Outputs:
    """The outputs [n] of whole rows from those [ranks, n] of their shards; temperature [n]."""
    logprob, entropy, kl_value, row_lse, ref_row_lse = shards
    scale = LOG2E / temperature
    share, row_lse = _log_shares(row_lse, scale)
    logprob = (logprob + share).amax(0)
    if entropy is not None:
        entropy = _expected(entropy - share, share)
    if kl is not None:
        ref_share, ref_row_lse = _log_shares(ref_row_lse, scale)
        p, q = (share, ref_share) if kl == "reverse" else (ref_share, share)
        kl_value = _expected(torch.where(q == -torch.inf, torch.inf, kl_value + p - q), p)
    return logprob, entropy, kl_value, row_lse, ref_row_lse


def _is_empty(row_lse: Tensor) -> Tensor:
    """Whether all logits are -inf: the one room's sum is then 0, the other's maximum -inf."""
    return (row_lse == -torch.inf).any(-1)


def _log_shares(row_lse: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """ln of each shard's share [ranks, n], and the whole rows' row_lse [n, 2]."""
    empty = _is_empty(row_lse)
    pivots, log_sums = row_lse.unbind(-1)
    pivot = pivots.amax(0)
    bits = torch.where(empty, -torch.inf, (pivots - pivot) * scale + log_sums)
    largest = bits.amax(0)
    rest = (bits - largest).exp2().sum(0).log2()
    return (bits - largest - rest) * LN2, torch.stack((pivot, largest + rest), dim=-1)


def _expected(values: Tensor, log_share: Tensor) -> Tensor:
    """Σ share · value [n]; a shard without a share counts for nothing, whatever its value is."""
    share = log_share.exp()
    return torch.where(share == 0, 0.0, share * values).sum(0)


def merge_over(
    group: str, outputs: Outputs, tokens: Tensor, temperature: Tensor, kl: str | None
) -> Outputs:
    """`merge_shards` of what the group's ranks have, of the same rows: one collective.

    Args:
        group: the name of the process group.
        tokens: [n], `local_ids`; temperature: [n].
    """
    mine = as_shard(outputs, tokens)
    columns = [None if x is None else x.view(len(tokens), -1) for x in mine]
    present = [each for each in columns if each is not None]
    unshard = gather(torch.cat(present, dim=-1), group)
    parts = iter(unshard.split([each.shape[1] for each in present], dim=-1))
    shards = (None if x is None else next(parts).view(-1, *x.shape) for x in mine)
    return merge_shards(tuple(shards), temperature, kl)


def _group(name: str) -> "torch.distributed.ProcessGroup":
    return torch.distributed.distributed_c10d._resolve_process_group(name)


def rank_in(group: str) -> int:
    return torch.distributed.get_rank(_group(group))


def gather(x: Tensor, group: str) -> Tensor:
    """[ranks, *x.shape]: the x of every rank, on all of them."""
    ranks = torch.distributed.get_world_size(_group(group))
    found = x.new_empty((ranks, *x.shape))
    torch.distributed.all_gather(list(found.unbind(0)), x.contiguous(), group=_group(group))
    return found


def smallest(number: int, group: str, device: torch.device) -> int:
    """The least of the ranks' numbers; it waits for the device."""
    return int(gather(torch.tensor(number, device=device), group).min())


def total(x: Tensor, group: str) -> Tensor:
    """The sum over the ranks of x, which it may overwrite."""
    torch.distributed.all_reduce(x, group=_group(group))
    return x
