"""The two passes over a row, or over a part of it: accumulate its statistics, store its gradient.

A pass processes whole tiles without a mask, then the rest under one. Where KL is "none" the row of
the reference policy is None.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .row_access import access_ids, load_tile, map_row, tail_offsets
from .row_math import (
    LN2,
    LOWEST,
    divergence,
    floored,
    merge_lanes,
    online_softmax,
    rescale_moment,
    softcapped,
    softcapped_derivative,
    sum_of_entries,
    tile_sum,
    track_largest,
)


class Partial(NamedTuple):
    """Sums of the lanes, [LANES] each, as row_math.py defines them.

    A field that is not asked for holds another field: Triton 3.6 cannot return None.
    """

    m: tl.tensor
    sum_e: tl.tensor
    sum_ez: tl.tensor  # for the entropy
    ref_m: tl.tensor  # this and the next two for the KL
    ref_sum_e: tl.tensor
    sum_ed: tl.tensor
    sum_ee: tl.tensor
    sum_x: tl.tensor
    count: tl.tensor
    best: tl.tensor  # this and the next are of one part, and not merged
    first: tl.tensor


class RowResults(NamedTuple):
    """Statistics of a row, scalars; log_sum is log2 of Σ e over the row, pivot its maximum.

    As in Partial, a field that is not asked for holds another field.
    """

    logprob: tl.tensor
    entropy: tl.tensor
    kl: tl.tensor
    pivot: tl.tensor
    log_sum: tl.tensor
    ref_pivot: tl.tensor
    ref_log_sum: tl.tensor
    sum_sq_probs: tl.tensor
    mean_logit: tl.tensor  # before the temperature
    count: tl.tensor


class GradientScalars(NamedTuple):
    """The scalars of a row's gradient. With p and q the probabilities of an entry

    dx = one_hot · [entry is the token] + p · (weight + weight_log · log2 p + weight_square · p)
         reverse KL: + p · weight_kl · (log2 p - log2 q)      forward KL: - weight_kl · q
         + uniform where the logit is not -inf
    """

    scale: tl.tensor
    pivot: tl.tensor
    log_sum: tl.tensor
    ref_pivot: tl.tensor | None  # None without a gradient of the KL
    ref_log_sum: tl.tensor | None
    one_hot: tl.tensor
    weight: tl.tensor
    weight_log: tl.tensor | None  # None without a gradient of the entropy
    weight_kl: tl.tensor | None  # None without a gradient of the KL
    weight_square: tl.tensor | None  # None without a gradient of Σ p²
    uniform: tl.tensor | None  # None without a gradient of the mean


@triton.jit
def empty_partial(LANES: tl.constexpr, ACC_DTYPE: tl.constexpr):
    lowest = tl.full([LANES], LOWEST, ACC_DTYPE)
    zero = tl.zeros([LANES], ACC_DTYPE)
    return Partial(lowest, zero, zero, lowest, zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def update_partials(
    partial, x, y, scale,
    HAS_ENTROPY: tl.constexpr, KL: tl.constexpr, HAS_SQUARES: tl.constexpr, HAS_MEAN: tl.constexpr,
):  # fmt: skip
    """Add a tile x of the policy's row, and a tile y of the reference policy's."""
    m, sum_e, sum_ez, ref_m, ref_sum_e, sum_ed, sum_ee, sum_x, count, best, first = partial
    m_new, sum_e_new, sum_ez, z, e, shift = online_softmax(
        m, sum_e, sum_ez, x, scale, HAS_MOMENT=HAS_ENTROPY
    )
    if KL != "none":
        ref_m, ref_sum_e_new, _, ref_z, ref_e, ref_shift = online_softmax(
            ref_m, ref_sum_e, ref_sum_e, y, scale, HAS_MOMENT=False
        )
        # The KL's sum is over the softmax that comes first in it.
        if KL == "reverse":
            sum_ed = rescale_moment(sum_ed, sum_e, shift, shift - ref_shift)
            sum_ed += tile_sum(e * (z - ref_z))
        else:
            sum_ed = rescale_moment(sum_ed, ref_sum_e, ref_shift, ref_shift - shift)
            sum_ed += tile_sum(ref_e * (ref_z - z))
        ref_sum_e = ref_sum_e_new
    if HAS_SQUARES:
        decay = tl.exp2(shift)
        sum_ee = decay * decay * sum_ee + tile_sum(e * e)
    if HAS_MEAN:
        tile_sum_x, tile_count = sum_of_entries(x)
        sum_x += tile_sum_x
        count += tile_count
    return Partial(
        m_new, sum_e_new, sum_ez, ref_m, ref_sum_e, sum_ed, sum_ee, sum_x, count, best, first
    )


@triton.jit
def merge_partials(
    a, b, scale,
    HAS_ENTROPY: tl.constexpr, KL: tl.constexpr, HAS_SQUARES: tl.constexpr, HAS_MEAN: tl.constexpr,
):  # fmt: skip
    """Merge two partials, lane by lane."""
    # Move both to the larger maximum.
    m = tl.maximum(a.m, b.m)
    shift_a = floored((a.m - m) * scale)
    shift_b = floored((b.m - m) * scale)
    sum_e = tl.exp2(shift_a) * a.sum_e + tl.exp2(shift_b) * b.sum_e
    sum_ez = a.sum_ez
    if HAS_ENTROPY:
        sum_ez = rescale_moment(a.sum_ez, a.sum_e, shift_a, shift_a)
        sum_ez += rescale_moment(b.sum_ez, b.sum_e, shift_b, shift_b)
    sum_ee = a.sum_ee
    if HAS_SQUARES:
        decay_a = tl.exp2(shift_a)
        decay_b = tl.exp2(shift_b)
        sum_ee = decay_a * decay_a * a.sum_ee + decay_b * decay_b * b.sum_ee
    sum_x = a.sum_x
    count = a.count
    if HAS_MEAN:
        sum_x += b.sum_x
        count += b.count
    if KL == "none":
        return Partial(
            m, sum_e, sum_ez, a.ref_m, a.ref_sum_e, a.sum_ed, sum_ee, sum_x, count, a.best, a.first
        )
    else:
        # The same for the reference policy, then the KL's sum over the softmax that comes first.
        ref_m = tl.maximum(a.ref_m, b.ref_m)
        ref_shift_a = floored((a.ref_m - ref_m) * scale)
        ref_shift_b = floored((b.ref_m - ref_m) * scale)
        ref_sum_e = tl.exp2(ref_shift_a) * a.ref_sum_e + tl.exp2(ref_shift_b) * b.ref_sum_e
        if KL == "reverse":
            sum_ed = rescale_moment(a.sum_ed, a.sum_e, shift_a, shift_a - ref_shift_a)
            sum_ed += rescale_moment(b.sum_ed, b.sum_e, shift_b, shift_b - ref_shift_b)
        else:
            sum_ed = rescale_moment(a.sum_ed, a.ref_sum_e, ref_shift_a, ref_shift_a - shift_a)
            sum_ed += rescale_moment(b.sum_ed, b.ref_sum_e, ref_shift_b, ref_shift_b - shift_b)
        return Partial(
            m, sum_e, sum_ez, ref_m, ref_sum_e, sum_ed, sum_ee, sum_x, count, a.best, a.first
        )


@triton.jit
def accumulate_row_stats(
    logits_row, ref_row, begin, end, scale, offsets,
    HAS_ENTROPY: tl.constexpr, KL: tl.constexpr, SOFTCAP: tl.constexpr, ALIGNMENT: tl.constexpr,
    EVICT_LAST: tl.constexpr, HAS_SQUARES: tl.constexpr = False, HAS_MEAN: tl.constexpr = False,
    HAS_TOP: tl.constexpr = False, BESIDE_WRITES: tl.constexpr = False,
):  # fmt: skip
    """Accumulate the Partial of entries [begin, end).

    EVICT_LAST: keep the row in the L2. BESIDE_WRITES: the entries are a row, and other programs may
    be overwriting the rows beside it, so nothing of these is loaded, not even as part of a word.
    """
    TILE: tl.constexpr = offsets.numel
    LANES: tl.constexpr = offsets.shape[1]
    partial = empty_partial(LANES, scale.dtype)
    best = partial.best
    first = partial.first
    if HAS_TOP:
        best = tl.full([LANES], -float("inf"), scale.dtype)
        first = begin + tl.arange(0, LANES) * offsets.shape[2]
    ALIGNED: tl.constexpr = ALIGNMENT == "vector"
    first_entry = None
    last = end
    if BESIDE_WRITES:
        first_entry = tl.load(logits_row + begin)
        last = end - 1  # words of whole tiles end before the last entry
    whole = begin + (last - begin) // TILE * TILE
    for TAIL in tl.static_range(2):  # 0 for the whole tiles, 1 for the rest
        tile = offsets
        if TAIL:
            tile = tail_offsets(offsets)
        for start in range(
            begin + TAIL * (whole - begin), whole + TAIL * (end - whole), tile.numel
        ):
            # Load a tile of each row.
            x = load_tile(
                logits_row, start, tile, end, scale.dtype,
                ALIGNED=ALIGNED, TAIL=TAIL, EVICT_LAST=EVICT_LAST, first_entry=first_entry,
            )  # fmt: skip
            y = None
            if KL != "none":
                y = load_tile(
                    ref_row, start, tile, end, scale.dtype,
                    ALIGNED=ALIGNED, TAIL=TAIL, EVICT_LAST=EVICT_LAST,
                )  # fmt: skip
            # The largest logits, before the softcap: what it makes equal is not.
            if HAS_TOP:
                ids = start + access_ids(tile.shape[0], LANES, tile.shape[2])
                best, first = track_largest(best, first, x, ids)
            # Apply the softcap.
            if SOFTCAP is not None:
                x = softcapped(x, SOFTCAP)
                if KL != "none":
                    y = softcapped(y, SOFTCAP)
            # Add the tile to the lanes' sums.
            partial = update_partials(partial, x, y, scale, HAS_ENTROPY, KL, HAS_SQUARES, HAS_MEAN)
    return Partial(
        partial.m, partial.sum_e, partial.sum_ez, partial.ref_m, partial.ref_sum_e, partial.sum_ed,
        partial.sum_ee, partial.sum_x, partial.count, best, first,
    )  # fmt: skip


@triton.jit
def row_results(
    partial, x_token, scale, HAS_ENTROPY: tl.constexpr, KL: tl.constexpr,
    HAS_SQUARES: tl.constexpr = False, HAS_MEAN: tl.constexpr = False,
):  # fmt: skip
    """The RowResults in nats, from the lanes' sums and the token's capped logit."""
    # Merge the lanes into the row's softmax.
    pivot, row_sum_e, shift = merge_lanes(partial.m, partial.sum_e, scale)
    log_sum = tl.log2(row_sum_e)
    logprob = ((x_token - pivot) * scale - log_sum) * LN2
    # The entropy is log_sum minus the mean of z, which does not cancel for large logits.
    entropy = logprob
    if HAS_ENTROPY:
        row_sum_ez = tl.sum(rescale_moment(partial.sum_ez, partial.sum_e, shift, shift), axis=0)
        entropy = (log_sum - row_sum_ez / row_sum_e) * LN2
    sum_sq_probs = logprob
    if HAS_SQUARES:
        decay = tl.exp2(shift)
        row_sum_ee = tl.sum(decay * decay * partial.sum_ee, axis=0)
        sum_sq_probs = (tl.log2(row_sum_ee) - 2.0 * log_sum) * LN2
    mean_logit = logprob
    count = logprob
    if HAS_MEAN:
        count = tl.sum(partial.count, axis=0)
        mean_logit = tl.sum(partial.sum_x, axis=0) / count
    if KL == "none":
        return RowResults(
            logprob, entropy, logprob, pivot, log_sum, pivot, log_sum,
            sum_sq_probs, mean_logit, count,
        )  # fmt: skip
    else:
        # The reference policy's softmax, and the KL.
        ref_pivot, ref_row_sum_e, ref_shift = merge_lanes(partial.ref_m, partial.ref_sum_e, scale)
        ref_log_sum = tl.log2(ref_row_sum_e)
        if KL == "reverse":
            drift = shift - ref_shift
            sum_ed = tl.sum(rescale_moment(partial.sum_ed, partial.sum_e, shift, drift), axis=0)
            kl = divergence(sum_ed, row_sum_e, log_sum, ref_log_sum)
        else:
            drift = ref_shift - shift
            lanes_ed = rescale_moment(partial.sum_ed, partial.ref_sum_e, ref_shift, drift)
            kl = divergence(tl.sum(lanes_ed, axis=0), ref_row_sum_e, ref_log_sum, log_sum)
        return RowResults(
            logprob, entropy, kl, pivot, log_sum, ref_pivot, ref_log_sum,
            sum_sq_probs, mean_logit, count,
        )  # fmt: skip


@triton.jit
def entry_gradient(x, y, row, KL: tl.constexpr, SOFTCAP: tl.constexpr):
    """dx of an entry without the one-hot term; x and y are the logits before the softcap."""
    # log2 of the probability, and the probability.
    capped = x
    if SOFTCAP is not None:
        capped = softcapped(x, SOFTCAP)
    z = (capped - row.pivot) * row.scale - row.log_sum
    if row.weight_log is not None or KL == "reverse":
        z = floored(z)
    p = tl.exp2(z)
    # The gradients of the log-prob and of the entropy.
    factor = row.weight
    if row.weight_log is not None:
        factor += row.weight_log * z
    if row.weight_square is not None:
        factor += row.weight_square * p
    # The gradient of the KL.
    if KL == "none":
        dx = p * factor
    else:
        if SOFTCAP is not None:
            y = softcapped(y, SOFTCAP)
        ref_z = (y - row.ref_pivot) * row.scale - row.ref_log_sum
        if KL == "reverse":
            dx = p * (factor + row.weight_kl * (z - floored(ref_z)))
        else:
            q = tl.where(x == -float("inf"), 0.0, tl.exp2(ref_z))  # an excluded entry gets 0
            dx = p * factor - row.weight_kl * q
    # The gradient of the mean.
    if row.uniform is not None:
        dx += tl.where(x == -float("inf"), 0.0, row.uniform)
    # The chain rule through the softcap.
    if SOFTCAP is not None:
        dx *= softcapped_derivative(x, SOFTCAP)
    return dx


@triton.jit
def _tile_gradient(x, y, scalars):
    return entry_gradient(x, y, scalars[0], scalars[1], scalars[2])


@triton.jit
def store_row_gradient(
    logits_row, ref_row, d_row, begin, end, token, row, offsets,
    KL: tl.constexpr, SOFTCAP: tl.constexpr, ALIGNMENT: tl.constexpr, REVERSE_ORDER: tl.constexpr,
):  # fmt: skip
    """Store dx of entries [begin, end) to d_row, which may be logits_row.

    The token's own entry is stored again after the others, with its one-hot term: inside the loop
    that would cost a comparison and a selection per entry.
    """
    ACC_DTYPE: tl.constexpr = row.scale.dtype
    # Load the token's logits before they are overwritten in place.
    has_token = (token >= begin) & (token < end)
    x_token = tl.load(logits_row + token, mask=has_token, other=0.0).to(ACC_DTYPE)
    y_token = None
    if KL != "none":
        y_token = tl.load(ref_row + token, mask=has_token, other=0.0).to(ACC_DTYPE)
    # Store the gradient without the one-hot term.
    map_row(
        _tile_gradient, logits_row, ref_row, d_row, begin, end, (row, KL, SOFTCAP), offsets,
        ACC_DTYPE, ALIGNMENT, REVERSE_ORDER,
    )  # fmt: skip
    # Store the token's entry with it; an excluded entry, -inf, keeps gradient 0.
    one_hot = row.one_hot
    if SOFTCAP is not None:
        one_hot *= softcapped_derivative(x_token, SOFTCAP)
    dx_token = one_hot + entry_gradient(x_token, y_token, row, KL, SOFTCAP)
    dx_token = tl.where(x_token == -float("inf"), 0.0, dx_token)
    tl.debug_barrier()  # another thread has stored to this entry
    tl.store(d_row + token, dx_token, mask=has_token)
