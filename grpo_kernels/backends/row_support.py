"""Rows of logits whose tokens were drawn among a few entries: top-k, top-p, min-p.

The results are those of rows whose other logits are -inf. No kernel reads these: the logits of a
support of K ids are copied to a row of K entries, on which the row functions run as on any other.
Supports of similar size are padded to one power of two and share a launch. Rows without a support
take the usual way, in which those with one are masked.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..objective.config import LossConfig
from ..objective.ratios import LossInputs
from ..objective.token_gradients import TokenGrads
from ..sampling_support import TokenSupport
from ..validation import OUT_OF_VOCAB, expect_ids, expect_tensor, shape_of
from .choice import backend_for
from .interface import RowInputs, RowStats, StatsRequest

NO_ID = -1  # an entry of a support that this head does not have
SMALLEST, LARGEST = 16, 1 << 21  # entries of a padded support, and of all that share a launch


class RowSupport(NamedTuple):
    """The supports of N tokens; all None: every token was drawn from the whole vocabulary."""

    ids: Tensor | None = None  # [S], int64, ascending within a token; NO_ID past its others
    ranges: Tensor | None = None  # [N, 2], int64: the first of a token's ids and their number
    sizes: Tensor | None = None  # [N], int64, on the CPU: their number; 0: the whole vocabulary

    def shard(self, start: Tensor, V: int) -> "RowSupport":
        """Replace the ids by their places in a shard of V ids from `start`; NO_ID elsewhere."""
        if self.ids is None:
            return self
        is_inside = (self.ids >= start) & (self.ids < start + V)
        return self._replace(ids=torch.where(is_inside, self.ids - start, NO_ID))

    def entries(self, index: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """List the entries of the tokens index [n]: (the place in index of each, its id).

        sizes: their numbers of ids, on the CPU.
        """
        assert self.ids is not None and self.ranges is not None
        start, length = self.ranges[index].unbind(-1)
        total = int(sizes.sum())
        place = torch.arange(len(index), device=index.device)
        place = place.repeat_interleave(length, output_size=total)
        shift = start - (length.cumsum(0) - length)
        return place, self.ids[torch.arange(total, device=index.device) + shift[place]]


def check_support(support: object, tokens: Tensor) -> None:
    """Check types, shapes and devices."""
    if not isinstance(support, TokenSupport):
        raise TypeError(
            f"support must be a TokenSupport(token_ids, offsets), got {type(support).__name__}"
        )
    for name, ids in support._asdict().items():
        expect_ids(f"support.{name}", ids)
        if ids.device.type != "cpu":
            expect_tensor(f"support.{name}", ids, device_of=tokens)
    expect_tensor("support.token_ids", support.token_ids, dims=(1,), layout="[S]")
    if support.offsets.shape != (tokens.numel() + 1,):
        raise ValueError(
            f"support.offsets must have shape {(tokens.numel() + 1,)}, one more than there are "
            f"tokens, got {shape_of(support.offsets)}"
        )


def prepare_support(
    support: TokenSupport,
    tokens: Tensor,
    mask: Tensor | None,
    V: Tensor,
    token_rows: Tensor | None = None,
    num_rows: int = 0,
) -> tuple[RowSupport, Tensor]:
    """Sort the ids of each token; return the supports and the tokens [N].

    A support that is wrong raises where its values are readable. On a GPU its token becomes
    OUT_OF_VOCAB, which gives NaN. Wrong offsets always raise.

    Args:
        tokens: [N], int64; mask: [N], bool.
        V: size of the vocabulary, 0-dim.
        token_rows: [N], int64, in [0, num_rows): the tokens of a row must have one support.
    """
    *prepared, tokens = _prepare(*support, tokens, mask, V, token_rows, num_rows)
    return RowSupport(*prepared), tokens


@torch.library.custom_op(add_op_namespace_prefix("prepare_support"), mutates_args=())
def _prepare(
    token_ids: Tensor,
    offsets: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    V: Tensor,
    token_rows: Tensor | None,
    num_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, S, device = len(tokens), len(token_ids), tokens.device
    ends = offsets.to("cpu", torch.int64)  # the one place where a support waits for a GPU
    sizes = ends.diff()
    if ends[0] != 0 or ends[-1] != S or (sizes < 0).any():
        raise ValueError(
            f"support.offsets must never decrease, from 0 to {S}, the number of token_ids, "
            f"got {_shorten(ends)}"
        )
    ranges = torch.stack((ends[:-1], sizes), dim=-1).to(device)
    lengths = ranges[:, 1]
    place = torch.arange(N, device=device).repeat_interleave(lengths, output_size=S)
    ids, is_invalid = _sort_ids(token_ids.to(device, torch.int64), place, V)
    has_invalid = _any_by_place(is_invalid, place, N)
    lacks_token = (lengths > 0) & ~_any_by_place(ids == tokens[place], place, N)
    if mask is not None:
        has_invalid, lacks_token = has_invalid & mask, lacks_token & mask
    if device.type == "cpu":
        _raise_if_wrong(TokenSupport(token_ids, ends), tokens, V, has_invalid, lacks_token)
    is_wrong = has_invalid | lacks_token
    if token_rows is not None:
        has_several = _rows_with_several(ids, place, ranges, mask, token_rows, num_rows)
        if device.type == "cpu" and has_several.any():
            raise ValueError(
                "support must be the same for all tokens of a row of hidden, got several for "
                f"row {int(has_several.nonzero()[0])}"
            )
        is_wrong |= has_several[token_rows]
    return ids, ranges, sizes, torch.where(is_wrong, OUT_OF_VOCAB, tokens)


@_prepare.register_fake
def _(
    token_ids: Tensor,
    offsets: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    V: Tensor,
    token_rows: Tensor | None,
    num_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (N,), (S,) = tokens.shape, token_ids.shape  # len() would make S a constant of the graph
    sizes = torch.empty(N, dtype=torch.int64)
    return tokens.new_empty(S), tokens.new_empty((N, 2)), sizes, torch.empty_like(tokens)


def _sort_ids(ids: Tensor, place: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Sort the ids [S] of each token; return them and where one is invalid or there twice.

    An id outside [0, V) becomes NO_ID and comes last. place: the token of each id, ascending.
    """
    beyond = (1 << 32) - 1
    ids = torch.where((ids >= 0) & (ids < V), ids, beyond)
    ids = ((place << 32) + ids).sort().values & beyond
    is_invalid = ids == beyond
    ids = torch.where(is_invalid, NO_ID, ids)
    is_invalid[1:] |= (ids[1:] == ids[:-1]) & (place[1:] == place[:-1])
    return ids, is_invalid


def _any_by_place(values: Tensor, place: Tensor, size: int) -> Tensor:
    """Find the places [size] of any value that is True; integer sums need no order."""
    counts = torch.zeros(size, dtype=torch.int64, device=values.device)
    return counts.index_add_(0, place, values.to(torch.int64)) > 0


def _raise_if_wrong(
    support: TokenSupport, tokens: Tensor, V: Tensor, has_invalid: Tensor, lacks_token: Tensor
) -> None:
    token_ids, ends = support
    for i in has_invalid.nonzero()[:1, 0].tolist():
        own = token_ids[ends[i] : ends[i + 1]].to(torch.int64)
        ids, counts = own.unique(return_counts=True)
        is_wrong = (ids < 0) | (ids >= V) | (counts > 1)
        times = " more than once" if counts[is_wrong][0] > 1 else ""
        raise ValueError(
            f"support.token_ids must be different ids in [0, {int(V)}) for each token that is "
            f"not masked, got {int(ids[is_wrong][0])}{times} for token {i}"
        )
    for i in lacks_token.nonzero()[:1, 0].tolist():
        raise ValueError(
            "support must have the id of every token that is not masked, got "
            f"{_shorten(token_ids[ends[i] : ends[i + 1]])} for token {i}, which is id "
            f"{int(tokens[i])}"
        )


def _rows_with_several(
    ids: Tensor,
    place: Tensor,
    ranges: Tensor,
    mask: Tensor | None,
    token_rows: Tensor,
    num_rows: int,
) -> Tensor:
    """Find the rows of hidden states [num_rows] whose tokens have several supports.

    Each token is compared with the last one of its row.
    """
    tokens = torch.arange(len(token_rows), device=ids.device)
    kept = tokens if mask is None else torch.where(mask, tokens, -1)
    last = tokens.new_full((num_rows,), -1).scatter_reduce_(0, token_rows, kept, "amax")
    last = last[token_rows].clamp_min(0)
    starts, lengths = ranges.unbind(-1)
    index = torch.arange(len(ids), device=ids.device) + (starts[last] - starts)[place]
    is_other = ids[index.clamp_max(len(ids) - 1)] != ids
    differs = (lengths != lengths[last]) | _any_by_place(is_other, place, len(tokens))
    return _any_by_place(differs if mask is None else differs & mask, token_rows, num_rows)


def _shorten(ids: Tensor) -> str:
    return f"[{', '.join(map(str, ids[:6].tolist()))}{', ...' if len(ids) > 6 else ''}]"


class _Block(NamedTuple):
    """Rows whose supports are padded to K ids."""

    row: Tensor  # [n], in rows.tokens.flatten()
    ids: Tensor  # [n, K]; padding repeats a valid id
    is_padding: Tensor  # [n, K]

    @classmethod
    def split(cls, support: RowSupport, V: int) -> Iterator["_Block"]:
        """Group the rows that have a support by its size, a power of two."""
        ids, ranges, sizes = support
        assert ids is not None and ranges is not None and sizes is not None
        exponents = torch.frexp(sizes.clamp_min(SMALLEST).to(torch.float64) - 1).exponent
        exponents = torch.where(sizes > 0, exponents, 0)
        for exponent in exponents.unique().tolist():
            if exponent == 0:
                continue
            K = min(1 << exponent, max(V, SMALLEST))
            for row in (exponents == exponent).nonzero().flatten().split(max(1, LARGEST // K)):
                row = row.to(ids.device)
                start, length = ranges[row].unsqueeze(1).unbind(-1)
                offset = torch.arange(K, device=ids.device)
                own = ids[start + torch.where(offset < length, offset, 0)]
                yield cls(row, own.clamp_min(0), (offset >= length) | (own == NO_ID))

    def gather(self, rows: RowInputs) -> RowInputs:
        """Copy the entries of the supports to rows [1, n, K]; the padding is -inf."""
        T = rows.tokens.shape[1]
        sequence, token = (self.row // T), (self.row % T)

        def entries(logits: Tensor) -> Tensor:
            values = logits[sequence.unsqueeze(-1), token.unsqueeze(-1), self.ids]
            return values.masked_fill_(self.is_padding, -torch.inf).unsqueeze(0)

        def own(values: Tensor) -> Tensor:
            return values[sequence, token].unsqueeze(0)

        tokens = own(rows.tokens)
        is_token = (self.ids == tokens.squeeze(0).unsqueeze(-1)) & ~self.is_padding
        position = is_token.to(torch.uint8).argmax(-1).unsqueeze(0)
        return rows._replace(
            logits=entries(rows.logits),
            tokens=torch.where(is_token.any(-1).unsqueeze(0), position, OUT_OF_VOCAB),
            temperature=own(rows.temperature),
            mask=None if rows.mask is None else own(rows.mask),
            ref_logits=None if rows.ref_logits is None else entries(rows.ref_logits),
        )

    def scatter(self, gradient: Tensor, d_logits: Tensor) -> None:
        """Write the gradient [1, n, K] of the entries to d_logits [B, T, V], else 0."""
        T = d_logits.shape[1]
        sequence, token = (self.row // T), (self.row % T)
        d_logits[sequence, token] = 0.0
        # A place that several entries share gets the same number from each.
        gradient = torch.where(self.is_padding, 0.0, gradient.squeeze(0))
        first = gradient[:, :1].expand_as(gradient)
        gradient = torch.where(self.ids == self.ids[:, :1], first, gradient)
        d_logits[sequence.unsqueeze(-1), token.unsqueeze(-1), self.ids] = gradient.to(
            d_logits.dtype
        )


def token_stats_forward(rows: RowInputs, support: RowSupport, request: StatsRequest) -> RowStats:
    """Compute the statistics of rows [B, T, V]; see interface.py."""
    forward = backend_for(rows.logits).token_stats_forward
    if support.ids is None:
        return forward(rows, request)
    stats = _stats_of_others(rows, support, request)
    V = rows.logits.shape[-1]
    for block in _Block.split(support, V):
        K = block.ids.shape[-1]
        compact = block.gather(rows)
        part = forward(compact, request._replace(top_logprobs=min(K, request.top_logprobs)))
        if part.top_logprobs is not None and part.top_ids is not None:
            missing = (0, request.top_logprobs - part.top_ids.shape[-1])
            top_ids = block.ids.gather(-1, part.top_ids.squeeze(0)).unsqueeze(0)
            top_ids = torch.nn.functional.pad(top_ids, missing)
            top_logprobs = torch.nn.functional.pad(part.top_logprobs, missing, value=-torch.inf)
            if compact.mask is not None:
                keep = compact.mask.unsqueeze(-1)
                top_logprobs, top_ids = (torch.where(keep, x, 0) for x in (top_logprobs, top_ids))
            part = part._replace(top_logprobs=top_logprobs, top_ids=top_ids)
        _write(stats, block.row, part)
    return stats


def token_stats_backward(
    rows: RowInputs, support: RowSupport, stats: RowStats, grads: TokenGrads, d_logits: Tensor
) -> None:
    """Write the gradient of rows to d_logits [B, T, V], which may be their logits."""
    backward = backend_for(rows.logits).token_stats_backward
    if support.ids is None:
        backward(rows, stats, grads, d_logits)
        return

    def own(x: Tensor, row: Tensor) -> Tensor:
        return x.flatten(0, 1)[row].unsqueeze(0)

    def gradient(block: _Block) -> Tensor:
        compact = block.gather(rows)
        own_grads = TokenGrads(*(x if x is None else own(x, block.row) for x in grads))
        d_entries = torch.empty_like(compact.logits)
        backward(compact, stats.map(lambda x: own(x, block.row)), own_grads, d_entries)
        return d_entries

    def others(d_logits: Tensor) -> None:
        backward(_others(rows, support), stats, grads, d_logits)

    _write_gradients(rows, support, gradient, others, d_logits)


def grpo_loss(
    rows: RowInputs,
    support: RowSupport,
    loss_inputs: LossInputs,
    config: LossConfig,
    d_logits: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute (log-prob, entropy) and write the gradient of a token-level loss to d_logits."""
    loss = backend_for(rows.logits).grpo_loss
    if support.ids is None:
        return loss(rows, loss_inputs, config, d_logits)
    results = tuple(rows.temperature.new_zeros(rows.tokens.shape) for _ in range(2))

    def gradient(block: _Block) -> Tensor:
        compact = block.gather(rows)
        own_inputs = loss_inputs.map(lambda x: x.flatten()[block.row].unsqueeze(0))
        d_entries = torch.empty_like(compact.logits)
        _write(results, block.row, loss(compact, own_inputs, config, d_entries))
        return d_entries

    def others(d_logits: Tensor) -> None:
        parts = loss(_others(rows, support), loss_inputs, config, d_logits)
        for whole, part in zip(results, parts, strict=True):  # the other is 0
            whole.add_(part)

    _write_gradients(rows, support, gradient, others, d_logits)
    return results[0], results[1]


def _others(rows: RowInputs, support: RowSupport) -> RowInputs:
    """Mask the rows that have a support."""
    assert support.ranges is not None
    has_none = (support.ranges[:, 1] == 0).view(rows.tokens.shape)
    return rows._replace(mask=has_none if rows.mask is None else has_none & rows.mask)


def _stats_of_others(rows: RowInputs, support: RowSupport, request: StatsRequest) -> RowStats:
    """Compute the statistics of the rows without a support; those of the others are 0."""
    assert support.sizes is not None
    if (support.sizes == 0).any():
        backend = backend_for(rows.logits)
        return backend.token_stats_forward(_others(rows, support), request)
    temperature = rows.temperature
    return RowStats.allocate(temperature, request, kl=rows.kl is not None).map(Tensor.zero_)


def _write(stats: Sequence[Tensor | None], row: Tensor, part: Sequence[Tensor | None]) -> None:
    """Copy the statistics [1, n] of some rows to those [B, T] of all."""
    for whole, values in zip(stats, part, strict=True):
        if whole is not None and values is not None:
            whole.flatten(0, 1).index_copy_(0, row, values.squeeze(0))


def _write_gradients(
    rows: RowInputs,
    support: RowSupport,
    gradient: Callable[[_Block], Tensor],
    others: Callable[[Tensor], None],
    d_logits: Tensor,
) -> None:
    """Write the gradients of all rows: `gradient` of a block, `others` of the rows without."""
    assert support.sizes is not None
    blocks = _Block.split(support, rows.logits.shape[-1])
    if not (support.sizes == 0).any():
        for block in blocks:
            block.scatter(gradient(block), d_logits)
        return
    # `others` writes zeros where there is a support. In place, that destroys its logits.
    gradients = ((block, gradient(block)) for block in blocks)
    if d_logits.data_ptr() == rows.logits.data_ptr():
        gradients = list(gradients)
    others(d_logits)
    for block, d_entries in gradients:
        block.scatter(d_entries, d_logits)
