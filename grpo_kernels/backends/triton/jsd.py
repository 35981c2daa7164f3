"""The generalised Jensen-Shannon divergence of two models' rows, and its gradient.

With p a probability of the policy, q of the reference policy, w the weight of the latter and
m = (1 - w) p + w q, a row whose two log-sum-exps are known has

    t = log2(q / p)      g = log2(m / max(p, q)), from 2^-|t|: between log2 of w and 0
    log2(m / p) = max(t, 0) + g      log2(m / q) = g - min(t, 0)
    jsd = (1 - w) KL(p‖m) + w KL(q‖m)      dx = d_jsd (1 - w) p (-ln(m / p) - KL(p‖m))

The sums of shards of the vocabulary add up. log2 of p and q is floored, so that an entry which one
model excludes is finite. Per entry in bf16, forward moves 4 bytes and backward 6. Masked rows are
not read.
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
    LN2,
    LOG2E,
    floored,
    is_unmasked,
    load_inverse_temperature,
    load_row_lse,
    softcapped,
    softcapped_derivative,
    tile_sum,
)


@triton.jit
def log_mixture(x, y, scale, pivot, log_sum, ref_pivot, ref_log_sum, weight):
    """(log2 p, log2 q, t, g) of a tile of capped logits x and y."""
    z = floored((x - pivot) * scale - log_sum)
    ref_z = floored((y - ref_pivot) * scale - ref_log_sum)
    t = ref_z - z
    smaller = tl.exp2(-tl.abs(t))
    first = (1.0 - weight) + weight * smaller
    return z, ref_z, t, tl.log2(tl.where(t > 0, weight + (1.0 - weight) * smaller, first))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _jsd_forward_kernel(
    logits_ptr,  # [B, T, V], strided rows
    ref_logits_ptr,  # [B, T, V], strided rows
    temperature_ptr,  # [N], or [1] with stride 0
    mask_ptr,  # [N]; None: no row is masked
    row_lse_ptr,  # [N, 2]: pivot, log_sum
    ref_row_lse_ptr,  # [N, 2]
    weight_ptr,  # [1], of the reference policy in the mixture
    jsd_ptr,  # [N]
    kl_policy_ptr,  # [N]
    T,
    V,
    stride_logits_b,
    stride_logits_t,
    stride_ref_logits_b,
    stride_ref_logits_t,
    stride_temperature,
    SOFTCAP: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # of the rows, as in row_access.py
):
    row = tl.program_id(0).to(tl.int64)
    if not is_unmasked(mask_ptr, row):
        tl.store(jsd_ptr + row, 0.0)
        tl.store(kl_policy_ptr + row, 0.0)
        return

    logits_row = row_pointer(logits_ptr, row, T, stride_logits_b, stride_logits_t, VEC, ALIGNMENT)
    ref_row = row_pointer(
        ref_logits_ptr, row, T, stride_ref_logits_b, stride_ref_logits_t, VEC, ALIGNMENT
    )
    scale = load_inverse_temperature(temperature_ptr, row, stride_temperature, ACC_DTYPE) * LOG2E
    pivot, log_sum = load_row_lse(row_lse_ptr, row)
    ref_pivot, ref_log_sum = load_row_lse(ref_row_lse_ptr, row)
    weight = tl.load(weight_ptr)
    offsets = tile_offsets(UNROLL, LANES, VEC)
    kl_policy = tl.zeros([LANES], ACC_DTYPE)
    kl_ref = tl.zeros([LANES], ACC_DTYPE)
    ALIGNED: tl.constexpr = ALIGNMENT == "vector"
    whole = V // offsets.numel * offsets.numel
    for TAIL in tl.static_range(2):  # 0 for the whole tiles, 1 for the rest
        tile = offsets
        if TAIL:
            tile = tail_offsets(offsets)
        for start in range(TAIL * whole, whole + TAIL * (V - whole), tile.numel):
            # Load a tile of each row, and add its terms to the sums of the lanes.
            x = load_tile(
                logits_row, start, tile, V, ACC_DTYPE, ALIGNED=ALIGNED, TAIL=TAIL, EVICT_LAST=True
            )
            y = load_tile(
                ref_row, start, tile, V, ACC_DTYPE, ALIGNED=ALIGNED, TAIL=TAIL, EVICT_LAST=True
            )
            if SOFTCAP is not None:
                x = softcapped(x, SOFTCAP)
                y = softcapped(y, SOFTCAP)
            z, ref_z, t, g = log_mixture(
                x, y, scale, pivot, log_sum, ref_pivot, ref_log_sum, weight
            )
            kl_policy -= tile_sum(tl.exp2(z) * (tl.where(t < 0, 0.0, t) + g))
            kl_ref += tile_sum(tl.exp2(ref_z) * (tl.where(t > 0, 0.0, t) - g))
    policy = tl.sum(kl_policy, axis=0) * LN2
    ref = tl.sum(kl_ref, axis=0) * LN2
    tl.store(jsd_ptr + row, (1.0 - weight) * policy + weight * ref)
    tl.store(kl_policy_ptr + row, policy)


@triton.jit
def _entry_gradient(x, y, scalars, SOFTCAP: tl.constexpr):
    factor, kl_policy = scalars[6], scalars[7]
    capped = x
    if SOFTCAP is not None:
        capped = softcapped(x, SOFTCAP)
        y = softcapped(y, SOFTCAP)
    z, _, t, g = log_mixture(
        capped, y, scalars[0], scalars[1], scalars[2], scalars[3], scalars[4], scalars[5]
    )
    dx = factor * tl.exp2(z) * (-(tl.where(t < 0, 0.0, t) + g) * LN2 - kl_policy)
    if SOFTCAP is not None:
        dx *= softcapped_derivative(x, SOFTCAP)
    return dx


@triton.jit
def _tile_gradient(x, y, scalars):
    return _entry_gradient(x, y, scalars[0], scalars[1])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _jsd_backward_kernel(
    logits_ptr,  # [B, T, V], strided rows
    ref_logits_ptr,  # [B, T, V], strided rows
    temperature_ptr,  # [N], or [1] with stride 0
    mask_ptr,  # [N]; None: no row is masked
    row_lse_ptr,  # [N, 2]: pivot, log_sum
    ref_row_lse_ptr,  # [N, 2]
    weight_ptr,  # [1], of the reference policy in the mixture
    kl_policy_ptr,  # [N]
    d_jsd_ptr,  # [N]
    d_logits_ptr,  # [B, T, V], strided rows; may be logits_ptr
    T,
    V,
    stride_logits_b,
    stride_logits_t,
    stride_ref_logits_b,
    stride_ref_logits_t,
    stride_d_logits_b,
    stride_d_logits_t,
    stride_temperature,
    SOFTCAP: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # of the rows, as in row_access.py
):
    row = tl.program_id(0).to(tl.int64)
    d_row = row_pointer(d_logits_ptr, row, T, stride_d_logits_b, stride_d_logits_t, VEC, ALIGNMENT)
    offsets = tile_offsets(UNROLL, LANES, VEC)
    d_jsd = tl.load(d_jsd_ptr + row).to(ACC_DTYPE)
    if not ((d_jsd != 0) & is_unmasked(mask_ptr, row)):
        store_zeros(d_row, 0, V, offsets, ALIGNMENT)
        return

    logits_row = row_pointer(logits_ptr, row, T, stride_logits_b, stride_logits_t, VEC, ALIGNMENT)
    ref_row = row_pointer(
        ref_logits_ptr, row, T, stride_ref_logits_b, stride_ref_logits_t, VEC, ALIGNMENT
    )
    inverse = load_inverse_temperature(temperature_ptr, row, stride_temperature, ACC_DTYPE)
    pivot, log_sum = load_row_lse(row_lse_ptr, row)
    ref_pivot, ref_log_sum = load_row_lse(ref_row_lse_ptr, row)
    kl_policy, weight = tl.load(kl_policy_ptr + row), tl.load(weight_ptr)
    factor = (1.0 - weight) * d_jsd * inverse
    scalars = (
        inverse * LOG2E, pivot, log_sum, ref_pivot, ref_log_sum, weight, factor, kl_policy,
    )  # fmt: skip
    # SOFTCAP is passed beside `scalars`: Triton turns a constant in a variable into a tensor.
    map_row(
        _tile_gradient, logits_row, ref_row, d_row, 0, V, (scalars, SOFTCAP), offsets, ACC_DTYPE,
        ALIGNMENT,
    )  # fmt: skip
