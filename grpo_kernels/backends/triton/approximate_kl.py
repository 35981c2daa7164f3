"""mini-GRPO's approximate KL: q/p - ln(q/p) - 1 summed over the vocabulary, and its gradient.

With p of the new policy and q of the reference, both at least eps, t = log2 q - log2 p and
r = 2^t, per row

    total = Σ r - 1 - t · ln 2          W = Σ w,  w = 1 - r where p >= eps, else 0
    dx = d_total · (w - p W)      for p · d(total)/dp = w, and dp_j/dx_i = p_j (1_ij - p_i)

Forward walks the two rows twice, for their row_lses and then for the sums; the second walk
finds them in the L2. Backward is one read of each and one write. Bytes per entry in bf16: forward 4
of memory and 4 of L2, backward 6. Masked rows are not read.
"""

import triton
import triton.language as tl

from .row_math import (
    LN2,
    LOG2E,
    LOWEST,
    load_tile,
    row_offset,
    softmax_merge,
    softmax_update,
    store_zeros,
    tile_offsets,
    tile_sum,
)


@triton.jit(do_not_specialize=["T"])
def _approximate_kl_forward_kernel(
    logits_ptr,  # [B, T, V], strided rows
    ref_logits_ptr,  # [B, T, V], strided rows
    mask_ptr,  # [N]
    total_ptr,  # [N]
    weight_sum_ptr,  # [N]: W
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
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(mask_ptr + row) == 0:
        tl.store(total_ptr + row, 0.0)
        tl.store(weight_sum_ptr + row, 0.0)
        tl.store(row_lse_ptr + 2 * row + tl.arange(0, 2), tl.zeros([2], ACC_DTYPE))
        tl.store(ref_row_lse_ptr + 2 * row + tl.arange(0, 2), tl.zeros([2], ACC_DTYPE))
        return

    logits_row = logits_ptr + row_offset(row, T, stride_logits_b, stride_logits_t)
    ref_row = ref_logits_ptr + row_offset(row, T, stride_ref_logits_b, stride_ref_logits_t)
    scale = tl.full([], LOG2E, ACC_DTYPE)
    log2_eps = tl.full([], LOG2_EPS, ACC_DTYPE)  # a bare constant would enter maximum as fp32
    TILE: tl.constexpr = UNROLL * LANES * VEC
    offsets = tile_offsets(UNROLL, LANES, VEC)
    m = tl.full([LANES], LOWEST, ACC_DTYPE)
    S = tl.zeros([LANES], ACC_DTYPE)
    m_ref = m
    S_ref = S
    for start in range(0, V, TILE):
        x = load_tile(logits_row, start + offsets, V, True, ACC_DTYPE, True)
        y = load_tile(ref_row, start + offsets, V, True, ACC_DTYPE, True)
        m, S, _, _, _, _ = softmax_update(m, S, S, x, scale, False)
        m_ref, S_ref, _, _, _, _ = softmax_update(m_ref, S_ref, S_ref, y, scale, False)
    pivot, row_S, _ = softmax_merge(m, S, scale)
    ref_pivot, row_S_ref, _ = softmax_merge(m_ref, S_ref, scale)
    log_sum = tl.log2(row_S)
    ref_log_sum = tl.log2(row_S_ref)

    total = tl.zeros([LANES], ACC_DTYPE)
    weight = tl.zeros([LANES], ACC_DTYPE)
    for start in range(0, V, TILE):
        x = load_tile(logits_row, start + offsets, V, True, ACC_DTYPE, False)
        y = load_tile(ref_row, start + offsets, V, True, ACC_DTYPE, False)
        z = (x - pivot) * scale - log_sum
        t = _log_ratio(z, (y - ref_pivot) * scale - ref_log_sum, log2_eps)
        total += tile_sum(tl.exp2(t) - 1.0 - t * LN2)
        weight += tile_sum(_weight(z, t, log2_eps))
    tl.store(total_ptr + row, tl.sum(total, axis=0))
    tl.store(weight_sum_ptr + row, tl.sum(weight, axis=0))
    tl.store(row_lse_ptr + 2 * row, pivot)
    tl.store(row_lse_ptr + 2 * row + 1, log_sum)
    tl.store(ref_row_lse_ptr + 2 * row, ref_pivot)
    tl.store(ref_row_lse_ptr + 2 * row + 1, ref_log_sum)


@triton.jit
def _log_ratio(z, z_ref, log2_eps):
    """t = log2 of max(q, eps) / max(p, eps); past the end of a row both are eps, and t is 0."""
    NAN_STAYS: tl.constexpr = tl.PropagateNan.ALL
    p = tl.maximum(z, log2_eps, propagate_nan=NAN_STAYS)
    return tl.maximum(z_ref, log2_eps, propagate_nan=NAN_STAYS) - p


@triton.jit
def _weight(z, t, log2_eps):
    """w: the derivative of an entry with respect to ln p, 0 where the floor holds p."""
    return tl.where(z < log2_eps, 0.0, 1.0 - tl.exp2(t))


@triton.jit(do_not_specialize=["T"])
def _approximate_kl_backward_kernel(
    logits_ptr,  # [B, T, V], strided rows
    ref_logits_ptr,  # [B, T, V], strided rows
    mask_ptr,  # [N]
    weight_sum_ptr,  # [N]: W
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
):
    row = tl.program_id(0).to(tl.int64)
    d_row = d_logits_ptr + row_offset(row, T, stride_d_logits_b, stride_d_logits_t)
    TILE: tl.constexpr = UNROLL * LANES * VEC
    offsets = tile_offsets(UNROLL, LANES, VEC)
    if tl.load(mask_ptr + row) == 0:
        store_zeros(d_row, offsets, 0, V, TILE)
        return

    logits_row = logits_ptr + row_offset(row, T, stride_logits_b, stride_logits_t)
    ref_row = ref_logits_ptr + row_offset(row, T, stride_ref_logits_b, stride_ref_logits_t)
    scale = tl.full([], LOG2E, ACC_DTYPE)
    log2_eps = tl.full([], LOG2_EPS, ACC_DTYPE)  # a bare constant would enter maximum as fp32
    pivot = tl.load(row_lse_ptr + 2 * row)
    log_sum = tl.load(row_lse_ptr + 2 * row + 1)
    ref_pivot = tl.load(ref_row_lse_ptr + 2 * row)
    ref_log_sum = tl.load(ref_row_lse_ptr + 2 * row + 1)
    row_weight = tl.load(weight_sum_ptr + row)
    d_total = tl.load(d_total_ptr + row).to(ACC_DTYPE)
    for start in range(0, V, TILE):
        x = load_tile(logits_row, start + offsets, V, True, ACC_DTYPE, False)
        y = load_tile(ref_row, start + offsets, V, True, ACC_DTYPE, False)
        z = (x - pivot) * scale - log_sum
        t = _log_ratio(z, (y - ref_pivot) * scale - ref_log_sum, log2_eps)
        dx = d_total * (_weight(z, t, log2_eps) - tl.exp2(z) * row_weight)
        tl.store(d_row + start + offsets, dx, mask=start + offsets < V)
