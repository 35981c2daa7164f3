"""The two walks over a row, or over a part of it: its softmax partials, and its gradient.

A walk goes over whole tiles without a mask, then over what is left with one. A partial is the tuple
(m, S, U, m_ref, S_ref, D) of row_math.py, [LANES] each, of which those that are not asked for stay
as they were.
"""

import triton
import triton.language as tl

from .row_math import (
    LN2,
    LOWEST,
    divergence,
    floored,
    load_tile,
    rescale_moment,
    softcapped,
    softcapped_derivative,
    softmax_merge,
    softmax_update,
    tile_offsets,
    tile_sum,
)


@triton.jit
def empty_partial(LANES: tl.constexpr, ACC_DTYPE: tl.constexpr):
    lowest = tl.full([LANES], LOWEST, ACC_DTYPE)
    zero = tl.zeros([LANES], ACC_DTYPE)
    return lowest, zero, zero, lowest, zero, zero


@triton.jit
def update_partials(partial, x, y, scale, HAS_ENTROPY: tl.constexpr, KL: tl.constexpr):
    """The partial after tiles x, policy, and y, reference."""
    m, S, U, m_ref, S_ref, D = partial
    m_new, S_new, U, z, e, shift = softmax_update(m, S, U, x, scale, HAS_ENTROPY)
    if KL != "none":
        m_ref, S_ref_new, _, z_ref, e_ref, shift_ref = softmax_update(
            m_ref, S_ref, S_ref, y, scale, False
        )
        if KL == "reverse":
            D = rescale_moment(D, S, shift, shift - shift_ref)
            D += tile_sum(e * (z - z_ref))
        else:
            D = rescale_moment(D, S_ref, shift_ref, shift_ref - shift)
            D += tile_sum(e_ref * (z_ref - z))
        S_ref = S_ref_new
    return m_new, S_new, U, m_ref, S_ref, D


@triton.jit
def merge_partials(a, b, scale, HAS_ENTROPY: tl.constexpr, KL: tl.constexpr):
    """The partial, lane by lane, of what both have seen."""
    m_a, S_a, U_a, m_ref_a, S_ref_a, D_a = a
    m_b, S_b, U_b, m_ref_b, S_ref_b, D_b = b
    m = tl.maximum(m_a, m_b)
    shift_a = floored((m_a - m) * scale)
    shift_b = floored((m_b - m) * scale)
    S = tl.exp2(shift_a) * S_a + tl.exp2(shift_b) * S_b
    U = U_a
    m_ref = m_ref_a
    S_ref = S_ref_a
    D = D_a
    if HAS_ENTROPY:
        U = rescale_moment(U_a, S_a, shift_a, shift_a) + rescale_moment(U_b, S_b, shift_b, shift_b)
    if KL != "none":
        m_ref = tl.maximum(m_ref_a, m_ref_b)
        ref_a = floored((m_ref_a - m_ref) * scale)
        ref_b = floored((m_ref_b - m_ref) * scale)
        S_ref = tl.exp2(ref_a) * S_ref_a + tl.exp2(ref_b) * S_ref_b
        if KL == "reverse":
            D = rescale_moment(D_a, S_a, shift_a, shift_a - ref_a)
            D += rescale_moment(D_b, S_b, shift_b, shift_b - ref_b)
        else:
            D = rescale_moment(D_a, S_ref_a, ref_a, ref_a - shift_a)
            D += rescale_moment(D_b, S_ref_b, ref_b, ref_b - shift_b)
    return m, S, U, m_ref, S_ref, D


@triton.jit
def accumulate_row_stats(
    logits_row, ref_row, begin, end, scale,
    HAS_ENTROPY: tl.constexpr, KL: tl.constexpr, SOFTCAP: tl.constexpr, EVICT_LAST: tl.constexpr,
    ACC_DTYPE: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The partial of entries [begin, end); EVICT_LAST: keep them cached."""
    TILE: tl.constexpr = UNROLL * LANES * VEC
    offsets = tile_offsets(UNROLL, LANES, VEC)
    partial = empty_partial(LANES, ACC_DTYPE)
    whole = begin + (end - begin) // TILE * TILE
    for TAIL in tl.static_range(2):
        for start in range(begin + TAIL * (whole - begin), whole + TAIL * (end - whole), TILE):
            at = start + offsets
            x = load_tile(logits_row, at, end, TAIL, ACC_DTYPE, EVICT_LAST)
            y = x
            if KL != "none":
                y = load_tile(ref_row, at, end, TAIL, ACC_DTYPE, EVICT_LAST)
            if SOFTCAP is not None:
                x = softcapped(x, SOFTCAP)
                y = softcapped(y, SOFTCAP)
            partial = update_partials(partial, x, y, scale, HAS_ENTROPY, KL)
    return partial


@triton.jit
def row_statistics(partial, x_token, scale, HAS_ENTROPY: tl.constexpr, KL: tl.constexpr):
    """(logprob, entropy, kl, pivot, log_sum, ref_pivot, ref_log_sum) of a row, in nats."""
    m, S, U, m_ref, S_ref, D = partial
    pivot, row_S, shift = softmax_merge(m, S, scale)
    log_sum = tl.log2(row_S)
    logprob = ((x_token - pivot) * scale - log_sum) * LN2
    entropy = logprob
    kl = logprob
    ref_pivot = pivot
    ref_log_sum = log_sum
    if HAS_ENTROPY:
        row_U = tl.sum(rescale_moment(U, S, shift, shift), axis=0)
        entropy = (log_sum - row_U / row_S) * LN2
    if KL != "none":
        ref_pivot, row_S_ref, shift_ref = softmax_merge(m_ref, S_ref, scale)
        ref_log_sum = tl.log2(row_S_ref)
        if KL == "reverse":
            row_D = tl.sum(rescale_moment(D, S, shift, shift - shift_ref), axis=0)
            kl = divergence(row_D, row_S, log_sum, ref_log_sum)
        else:
            row_D = tl.sum(rescale_moment(D, S_ref, shift_ref, shift_ref - shift), axis=0)
            kl = divergence(row_D, row_S_ref, ref_log_sum, log_sum)
    return logprob, entropy, kl, pivot, log_sum, ref_pivot, ref_log_sum


@triton.jit
def entry_gradient(
    x, y, row_scalars, HAS_ENTROPY: tl.constexpr, KL: tl.constexpr, SOFTCAP: tl.constexpr
):
    """dx of an entry but for the token's one-hot term; x and y as stored, before the softcap."""
    scale, pivot, log_sum, ref_pivot, ref_log_sum, weight, weight_log, weight_kl = row_scalars
    capped = x
    if SOFTCAP is not None:
        capped = softcapped(x, SOFTCAP)
    z = (capped - pivot) * scale - log_sum
    if HAS_ENTROPY or KL == "reverse":
        z = floored(z)
    p = tl.exp2(z)
    factor = weight
    if HAS_ENTROPY:
        factor += weight_log * z
    if KL == "none":
        dx = p * factor
    else:
        if SOFTCAP is not None:
            y = softcapped(y, SOFTCAP)
        z_ref = (y - ref_pivot) * scale - ref_log_sum
        if KL == "reverse":
            dx = p * (factor + weight_kl * (z - floored(z_ref)))
        else:
            q = tl.where(x == -float("inf"), 0.0, tl.exp2(z_ref))  # an excluded entry gets 0
            dx = p * factor - weight_kl * q
    if SOFTCAP is not None:
        dx *= softcapped_derivative(x, SOFTCAP)
    return dx


@triton.jit
def store_row_gradient(
    logits_row, ref_row, d_row, begin, end, token, one_hot, row_scalars,
    HAS_ENTROPY: tl.constexpr, KL: tl.constexpr, SOFTCAP: tl.constexpr,
    REVERSE_ORDER: tl.constexpr,  # 1: the row was walked before; 0
    ACC_DTYPE: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Write dx of entries [begin, end) to d_row, which may be logits_row.

    The token's own entry is written once more after the walk, with its one-hot term: in the loop
    that would cost a comparison and a selection per entry. REVERSE_ORDER goes backwards: caches
    hold the end of the row.
    """
    TILE: tl.constexpr = UNROLL * LANES * VEC
    offsets = tile_offsets(UNROLL, LANES, VEC)
    # Its logits are read before any thread of the loop, working in place, overwrites them.
    here = (token >= begin) & (token < end)
    x_token = tl.load(logits_row + token, mask=here, other=0.0).to(ACC_DTYPE)
    y_token = tl.load(ref_row + token, mask=here, other=0.0).to(ACC_DTYPE)
    tl.debug_barrier()

    whole = begin + (end - begin) // TILE * TILE
    for TAIL in tl.static_range(
        REVERSE_ORDER, 2 - 3 * REVERSE_ORDER, 1 - 2 * REVERSE_ORDER
    ):  # 0, 1, or 1, 0
        first = begin + TAIL * (whole - begin)
        last = whole + TAIL * (end - whole)
        for start in range(first, last, TILE):
            at = start + offsets
            if REVERSE_ORDER and not TAIL:
                at = first + last - TILE - start + offsets
            x = load_tile(logits_row, at, end, TAIL, ACC_DTYPE, False)
            y = x
            if KL != "none":
                y = load_tile(ref_row, at, end, TAIL, ACC_DTYPE, False)
            dx = entry_gradient(x, y, row_scalars, HAS_ENTROPY, KL, SOFTCAP)
            if TAIL:
                tl.store(d_row + at, dx, mask=at < end)
            else:
                tl.store(d_row + at, dx)

    if SOFTCAP is not None:
        one_hot *= softcapped_derivative(x_token, SOFTCAP)
    dx_token = one_hot + entry_gradient(x_token, y_token, row_scalars, HAS_ENTROPY, KL, SOFTCAP)
    dx_token = tl.where(x_token == -float("inf"), 0.0, dx_token)  # outside the vocabulary
    tl.debug_barrier()  # the loop's store to this entry comes from another thread
    tl.store(d_row + token, dx_token, mask=here)
