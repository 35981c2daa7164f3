"""The divergence from a teacher's K most likely tokens and the rest, from logits.

Top to bottom: the teacher's arguments checked and laid out, the operator, its gradient.
"""

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..backends import RowInputs
from ..backends.listed_entries import capped, listed_logits, take_listed, write_listed_gradient
from ..lm_head.vocab_parallel import local_tokens
from ..objective.top_k_divergence import Rest, teacher_outcomes, top_k_divergence
from ..validation import expect_ids, expect_tensor, shape_of, values_are_readable
from .bundled_op import bundled_op

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BLOCK_BYTES = 64 << 20  # of the copies of rows whose listed logits are then -inf
LARGEST_SUM = 1.01  # of a teacher's probabilities: logprobs in bf16 are right to 0.4 %


class TopKTeacher(NamedTuple):
    """The K most likely tokens of a teacher for each of N tokens; both None: all its logits."""

    columns: Tensor | None = None  # [N, K], int64: columns of the logits; negative: none
    logq: Tensor | None = None  # [N, K + 1]: ln of their probabilities and of the rest


def prepare_top_k(
    top_logprobs: object,
    like: Tensor,
    mask: Tensor | None,
    V: int,
    dtype: torch.dtype,
    vocab_group: "ProcessGroup | None" = None,
) -> TopKTeacher:
    """Check `teacher_top_logprobs` and lay it out.

    Args:
        like: a tensor of the shape of the tokens, on their device.
        V: columns of the logits; with a vocab_group, of this rank's.
        dtype: of the logits after accumulation.
    """
    if not isinstance(top_logprobs, (tuple, list)) or len(top_logprobs) != 2:
        kind = type(top_logprobs).__name__
        if isinstance(top_logprobs, (tuple, list)):
            kind += f" of length {len(top_logprobs)}"
        raise TypeError(f"teacher_top_logprobs must be a pair (ids, logprobs), got {kind}")
    ids, logprobs = top_logprobs
    expect_ids("the ids of teacher_top_logprobs", ids)
    if ids.shape[:-1] != like.shape or ids.dim() != like.dim() + 1 or ids.shape[-1] < 1:
        raise ValueError(
            f"the ids of teacher_top_logprobs must have shape {(*like.shape, 'K')}, that of the "
            f"tokens and at least one id for each, got {shape_of(ids)}"
        )
    expect_tensor("the ids of teacher_top_logprobs", ids, device_of=like)
    expect_tensor(
        "the logprobs of teacher_top_logprobs",
        logprobs,
        floating=True,
        shape=ids.shape,
        device_of=like,
    )
    ids = ids.detach().to(torch.int64).flatten(0, -2)
    logprobs = logprobs.detach().flatten(0, -2)
    if logprobs.dtype != torch.float64:
        logprobs = logprobs.float()
    is_listed = (ids != -1) & (logprobs != -torch.inf)
    if mask is not None:
        is_listed &= (mask != 0).flatten().unsqueeze(-1)
    logprobs = torch.where(is_listed, logprobs, -torch.inf)
    columns, vocab_size = ids, V
    if vocab_group is not None:
        unchecked = torch.zeros_like(ids, dtype=torch.bool).flatten()
        columns, _, vocab_size = local_tokens(
            ids.flatten(), unchecked, V, 0, vocab_group.group_name
        )
        columns = columns.view_as(ids)
    is_wrong = _wrong_lists(ids, is_listed, logprobs, vocab_size)
    columns = torch.where(is_listed & ~is_wrong.unsqueeze(-1), columns, -1)
    logq = teacher_outcomes(logprobs, dtype)
    return TopKTeacher(columns, torch.where(is_wrong.unsqueeze(-1), torch.nan, logq))


def _wrong_lists(
    ids: Tensor, is_listed: Tensor, logprobs: Tensor, vocab_size: int | Tensor
) -> Tensor:
    """Find lists [N] with an id that is outside or there twice, or a sum of probabilities above 1.

    They raise where the values are readable.
    """
    place = torch.arange(ids.shape[-1], device=ids.device)
    ordered = torch.where(is_listed, ids, -1 - place).sort(dim=-1).values
    is_twice = (ordered[:, 1:] == ordered[:, :-1]).any(-1)
    is_outside = (is_listed & ((ids < 0) | (ids >= vocab_size))).any(-1)
    total = logprobs.double().exp().sum(-1)
    is_too_much = ~(total <= LARGEST_SUM)
    if values_are_readable(ids):
        for rows, what in (
            (is_outside, f"in [0, {int(vocab_size)}), or -1 where a list is shorter"),
            (is_twice, "different for each token"),
        ):
            for i in rows.nonzero()[:1, 0].tolist():
                raise ValueError(
                    f"the ids of teacher_top_logprobs must be {what}, got {ids[i].tolist()} for "
                    f"token {i}"
                )
        for i in is_too_much.nonzero()[:1, 0].tolist():
            raise ValueError(
                "the logprobs of teacher_top_logprobs must be of probabilities whose sum is at "
                f"most 1, got {total[i]:.3f} for token {i}"
            )
    return is_twice | is_outside | is_too_much


@bundled_op("top_k_divergence_forward")
def top_k_rows(
    rows: RowInputs, teacher: TopKTeacher, divergence: str, jsd_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute what `_allocate` lists, the first two of them being results."""
    B, T, V = rows.logits.shape
    results = _allocate(rows, teacher)
    assert teacher.columns is not None and teacher.logq is not None
    size = max(1, BLOCK_BYTES // (rows.logits.itemsize * V))
    for b, t in itertools.product(range(B), range(0, T, size)):
        block = slice(b, b + 1), slice(t, t + size)
        part = RowInputs(
            rows.logits[block].clone(memory_format=torch.contiguous_format),
            rows.tokens[block],
            rows.temperature[block],
            None if rows.mask is None else rows.mask[block],
            None,
            rows.softcap,
            None,
        )
        place = slice(b * T + t, b * T + min(t + size, T))
        listed, stats, is_empty = take_listed(part, teacher.columns[place].unsqueeze(0))
        pivot, log_sum = stats.row_lse.unbind(-1)
        rest = Rest(pivot, log_sum, stats.entropy, is_empty)
        found = top_k_divergence(
            capped(listed, rows.softcap),
            rest,
            part.temperature.flatten(),
            teacher.logq[place],
            divergence,
            jsd_weight,
        )
        metrics = torch.stack(found[1:6])
        values = found.divergence, metrics.t(), found.gradient, pivot, log_sum, is_empty
        for whole, value in zip(results, values, strict=True):
            if part.mask is not None:
                is_active = part.mask.flatten().view(-1, *(1,) * (value.dim() - 1))
                value = torch.where(is_active, value, 0)
            whole[place] = value
    return results


def _allocate(
    rows: RowInputs, teacher: TopKTeacher
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Divergence [N], its metrics [N, 5], its gradient [N, K + 1], and the rest but its entropy."""
    assert teacher.logq is not None
    new, (N, outcomes) = rows.temperature.new_empty, teacher.logq.shape
    return new(N), new((N, 5)), new((N, outcomes)), new(N), new(N), new(N, dtype=torch.bool)


@top_k_rows.register_fake
def _(rows: RowInputs, teacher: TopKTeacher, *_: Any) -> tuple[Tensor, ...]:
    return _allocate(rows, teacher)


@bundled_op("top_k_divergence_backward")
def _backward(
    rows: RowInputs, columns: Tensor, dx: Tensor, pivot: Tensor, log_sum: Tensor, is_empty: Tensor
) -> Tensor:
    columns = columns.view(*rows.tokens.shape, columns.shape[-1])
    d_logits = rows.logits.new_empty(rows.logits.shape)
    listed = listed_logits(rows, columns).flatten(0, 1)
    rest = Rest(pivot, log_sum, None, is_empty)
    write_listed_gradient(rows, listed, columns, rest, dx, d_logits)
    return d_logits


@_backward.register_fake
def _(rows: RowInputs, *_: Any) -> Tensor:
    return rows.logits.new_empty(rows.logits.shape)


def _setup_context(ctx: Any, bundles: list, output: tuple[Tensor, ...]) -> None:
    rows, teacher, *_ = bundles
    *tensors, ctx.softcap, ctx.kl = rows
    _, metrics, *saved = output
    ctx.save_for_backward(*tensors, teacher.columns, *saved)
    ctx.mark_non_differentiable(metrics, *saved)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, d_divergence: Tensor | None, *_: Any) -> tuple[Tensor | None]:
    if d_divergence is None:
        return (None,)
    *tensors, columns, gradient, pivot, log_sum, is_empty = ctx.saved_tensors
    rows = RowInputs._make((*tensors, ctx.softcap, ctx.kl))
    upstream = d_divergence.unsqueeze(-1)
    dx = torch.where(upstream == 0, 0.0, gradient * upstream)
    return (_backward(rows, columns, dx, pivot, log_sum, is_empty),)


top_k_rows.register_autograd(_autograd, setup_context=_setup_context)
