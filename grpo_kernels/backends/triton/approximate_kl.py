"""mini-GRPO's approximate KL: q/p - ln(q/p) - 1 summed over the vocabulary, and its gradient.

p is a probability of the new policy and q of the reference policy, both at least eps. With
t = log2 q - log2 p and r = 2^t, a row has

    total = Σ r - 1 - t · ln 2          weight_sum = Σ w,  w = 1 - r where p >= eps, else 0
    dx = d_total · (w - p · weight_sum)

because p · d(total)/dp = w and dp_j/dx_i = p_j (1_ij - p_i). Forward reads the two rows twice, for
their softmax and then for the sums; the second read finds them in the L2. Backward reads each row
once and writes one. Per entry in bf16, forward moves 4 bytes of memory and 4 of the L2, and
backward 6 of memory. Masked rows are not read.
"""

import triton
import triton.language as tl

from .row_access import (
    UNSPECIALIZED,
    load_tile,
    map_row,
    row_pointer,
    store_zeros,
    tail_offsets,
    tile_offsets,
)
from .row_math import (
    KEEP_NAN,
    LN2,
    LOG2E,
    LOWEST,
    load_row_lse,
    merge_lanes,
    online_softmax,
    store_row_lse,
    tile_sum,
)


@triton.jit
def log2_ratio(z, ref_z, log2_eps):
    """t = log2 of max(q, eps) / max(p, eps). Past the end of a row both are eps, and t is 0."""
    p = tl.maximum(z, log2_eps, propagate_nan=KEEP_NAN)
    return tl.maximum(ref_z, log2_eps, propagate_nan=KEEP_NAN) - p


@triton.jit
def entry_weight(z, t, log2_eps):
    """w, the derivative of an entry in ln p: 0 where p is below eps."""
    return tl.where(z < log2_eps, 0.0, 1.0 - tl.exp2(t))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _approximate_kl_forward_kernel(
    logits_ptr,  # [B, T, V], strided rows
    ref_logits_ptr,  # [B, T, V], strided rows
    mask_ptr,  # [N]
    total_ptr,  # [N]
    weight_sum_ptr,  # [N]
    row_lse_ptr,  # [N, 2]: pivot, log_sum
    ref_row_lse_ptr,  # [N, 2]
    T,
    V,
    stride_logits_b,
    stride_logits_t,
    stride_ref_logits_b,
    stride_ref_logits_t,
    LOG2_EPS: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # of the rows, as in row_access.py
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(mask_ptr + row) == 0:
        tl.store(total_ptr + row, 0.0)
        tl.store(weight_sum_ptr + row, 0.0)
        store_row_lse(row_lse_ptr, row, 0.0, 0.0)
        store_row_lse(ref_row_lse_ptr, row, 0.0, 0.0)
        return

    logits_row = row_pointer(logits_ptr, row, T, stride_logits_b, stride_logits_t, VEC, ALIGNMENT)
    ref_row = row_pointer(
        ref_logits_ptr, row, T, stride_ref_logits_b, stride_ref_logits_t, VEC, ALIGNMENT
    )
    scale = tl.full([], LOG2E, ACC_DTYPE)
    log2_eps = tl.full([], LOG2_EPS, ACC_DTYPE)  # a bare constant would enter maximum as fp32
    offsets = tile_offsets(UNROLL, LANES, VEC)
    ALIGNED: tl.constexpr = ALIGNMENT == "vector"
    # First pass: the softmax of both rows.
    m = tl.full([LANES], LOWEST, ACC_DTYPE)
    sum_e = tl.zeros([LANES], ACC_DTYPE)
    ref_m = m
    ref_sum_e = sum_e
    whole = V // offsets.numel * offsets.numel
    for TAIL in tl.static_range(2):  # 0 for the whole tiles, 1 for the rest
        tile = offsets
        if TAIL:
            tile = tail_offsets(offsets)
        for start in range(TAIL * whole, whole + TAIL * (V - whole), tile.numel):
            x = load_tile(
                logits_row, start, tile, V, ACC_DTYPE, ALIGNED=ALIGNED, TAIL=TAIL, EVICT_LAST=True
            )
            y = load_tile(
                ref_row, start, tile, V, ACC_DTYPE, ALIGNED=ALIGNED, TAIL=TAIL, EVICT_LAST=True
            )
            m, sum_e, _, _, _, _ = online_softmax(m, sum_e, sum_e, x, scale, HAS_MOMENT=False)
            ref_m, ref_sum_e, _, _, _, _ = online_softmax(
                ref_m, ref_sum_e, ref_sum_e, y, scale, HAS_MOMENT=False
            )
    pivot, row_sum_e, _ = merge_lanes(m, sum_e, scale)
    ref_pivot, ref_row_sum_e, _ = merge_lanes(ref_m, ref_sum_e, scale)
    log_sum = tl.log2(row_sum_e)
    ref_log_sum = tl.log2(ref_row_sum_e)

    # Second pass: the sums over the entries.
    total = tl.zeros([LANES], ACC_DTYPE)
    weight_sum = tl.zeros([LANES], ACC_DTYPE)
    for TAIL in tl.static_range(2):  # 0 for the whole tiles, 1 for the rest
        tile = offsets
        if TAIL:
            tile = tail_offsets(offsets)
        for start in range(TAIL * whole, whole + TAIL * (V - whole), tile.numel):
            x = load_tile(
                logits_row, start, tile, V, ACC_DTYPE, ALIGNED=ALIGNED, TAIL=TAIL, EVICT_LAST=False
            )
            y = load_tile(
                ref_row, start, tile, V, ACC_DTYPE, ALIGNED=ALIGNED, TAIL=TAIL, EVICT_LAST=False
            )
            z = (x - pivot) * scale - log_sum
            t = log2_ratio(z, (y - ref_pivot) * scale - ref_log_sum, log2_eps)
            total += tile_sum(tl.exp2(t) - 1.0 - t * LN2)
            weight_sum += tile_sum(entry_weight(z, t, log2_eps))
    # Merge the lanes and store the row's results.
    tl.store(total_ptr + row, tl.sum(total, axis=0))
    tl.store(weight_sum_ptr + row, tl.sum(weight_sum, axis=0))
    store_row_lse(row_lse_ptr, row, pivot, log_sum)
    store_row_lse(ref_row_lse_ptr, row, ref_pivot, ref_log_sum)


@triton.jit
def _entry_gradient(x, y, scalars):
    scale, pivot, log_sum, ref_pivot, ref_log_sum, weight_sum, d_total, log2_eps = scalars
    z = (x - pivot) * scale - log_sum
    t = log2_ratio(z, (y - ref_pivot) * scale - ref_log_sum, log2_eps)
    return d_total * (entry_weight(z, t, log2_eps) - tl.exp2(z) * weight_sum)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _approximate_kl_backward_kernel(
    logits_ptr,  # [B, T, V], strided rows
    ref_logits_ptr,  # [B, T, V], strided rows
    mask_ptr,  # [N]
    weight_sum_ptr,  # [N]
    row_lse_ptr,  # [N, 2]: pivot, log_sum
    ref_row_lse_ptr,  # [N, 2]
    d_total_ptr,  # [N]
    d_logits_ptr,  # [B, T, V], strided rows
    T,
    V,
    stride_logits_b,
    stride_logits_t,
    stride_ref_logits_b,
    stride_ref_logits_t,
    stride_d_logits_b,
    stride_d_logits_t,
    LOG2_EPS: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # of the rows, as in row_access.py
):
    row = tl.program_id(0).to(tl.int64)
    d_row = row_pointer(d_logits_ptr, row, T, stride_d_logits_b, stride_d_logits_t, VEC, ALIGNMENT)
    offsets = tile_offsets(UNROLL, LANES, VEC)
    if tl.load(mask_ptr + row) == 0:
        store_zeros(d_row, 0, V, offsets, ALIGNMENT)
        return

    # Load what forward saved of the row.
    logits_row = row_pointer(logits_ptr, row, T, stride_logits_b, stride_logits_t, VEC, ALIGNMENT)
    ref_row = row_pointer(
        ref_logits_ptr, row, T, stride_ref_logits_b, stride_ref_logits_t, VEC, ALIGNMENT
    )
    scale = tl.full([], LOG2E, ACC_DTYPE)
    log2_eps = tl.full([], LOG2_EPS, ACC_DTYPE)  # a bare constant would enter maximum as fp32
    pivot, log_sum = load_row_lse(row_lse_ptr, row)
    ref_pivot, ref_log_sum = load_row_lse(ref_row_lse_ptr, row)
    weight_sum = tl.load(weight_sum_ptr + row)
    d_total = tl.load(d_total_ptr + row).to(ACC_DTYPE)
    scalars = (
        scale, pivot, log_sum, ref_pivot, ref_log_sum, weight_sum, d_total, log2_eps,
    )  # fmt: skip
    map_row(
        _entry_gradient, logits_row, ref_row, d_row, 0, V, scalars, offsets, ACC_DTYPE, ALIGNMENT
    )
