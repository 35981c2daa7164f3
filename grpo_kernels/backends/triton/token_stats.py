"""Row statistics and their gradient: log-prob, entropy and one vocabulary KL of each token.

Forward, per row of V logits, one read (two with reference logits):

    log_sum = log2 S      logprob = (x_token - m) · scale - log_sum, in nats
    entropy = log_sum - U/S      never lse - Σ p·x, which cancels for large |x|
    reverse = Σ p (ln p - ln q)      forward = Σ q (ln q - ln p)      q the reference's softmax

Backward, one read (two) and one write, from the saved pivot and log_sum, which stay two numbers
because their sum would round: with p = 2^(z - log_sum),

    dx = d_logprob (1_token - p) - d_entropy p (ln p + entropy)
         + d_reverse p (ln p - ln q - KL) + d_forward (p - q)

Bytes per entry in bf16: forward 2 (4 with a reference), backward 4 (6). Masked rows, and rows
without an upstream gradient, are not read.

A row is the sum of parts of a fixed size, whose partials are merged in their order. Where rows are
too few to fill the device, a program takes one part, and another kernel merges; the same additions
then happen in the same order, so that no bit of a row tells how many others there were.
"""

import triton
import triton.language as tl

from .row_math import LN2, LOG2E, row_offset, softcapped, store_zeros, tile_offsets
from .row_passes import (
    accumulate_row_stats,
    empty_partial,
    merge_partials,
    row_statistics,
    store_row_gradient,
)


@triton.jit
def row_counts(mask_ptr, row):
    """Whether the row's token is unmasked."""
    counts = True
    if mask_ptr is not None:
        counts = tl.load(mask_ptr + row) != 0
    return counts


@triton.jit
def _scale(temperature_ptr, row, stride_temperature, ACC_DTYPE: tl.constexpr):
    """As the gradient has it, to the last bit."""
    return 1.0 / tl.load(temperature_ptr + row * stride_temperature).to(ACC_DTYPE) * LOG2E


@triton.jit
def _store_zero_statistics(
    row, logprob_ptr, entropy_ptr, kl_ptr, row_lse_ptr, ref_row_lse_ptr, ACC_DTYPE: tl.constexpr
):
    """The results of a masked row."""
    tl.store(logprob_ptr + row, 0.0)
    tl.store(row_lse_ptr + 2 * row + tl.arange(0, 2), tl.zeros([2], ACC_DTYPE))
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, 0.0)
    if kl_ptr is not None:
        tl.store(kl_ptr + row, 0.0)
        tl.store(ref_row_lse_ptr + 2 * row + tl.arange(0, 2), tl.zeros([2], ACC_DTYPE))


@triton.jit
def token_logit(logits_row, tokens_ptr, row, V, SOFTCAP: tl.constexpr, ACC_DTYPE: tl.constexpr):
    """The token's logit after the softcap; NaN for an id outside [0, V)."""
    token = tl.load(tokens_ptr + row)
    in_range = (token >= 0) & (token < V)
    x = tl.load(logits_row + token, mask=in_range, other=float("nan")).to(ACC_DTYPE)
    if SOFTCAP is not None:
        x = softcapped(x, SOFTCAP)
    return x


@triton.jit
def _store_statistics(
    row, partial, x_token, scale,
    logprob_ptr, entropy_ptr, kl_ptr, row_lse_ptr, ref_row_lse_ptr, KL: tl.constexpr
):  # fmt: skip
    HAS_ENTROPY: tl.constexpr = entropy_ptr is not None
    logprob, entropy, kl, pivot, log_sum, ref_pivot, ref_log_sum = row_statistics(
        partial, x_token, scale, HAS_ENTROPY, KL
    )
    tl.store(logprob_ptr + row, logprob)
    tl.store(row_lse_ptr + 2 * row, pivot)
    tl.store(row_lse_ptr + 2 * row + 1, log_sum)
    if HAS_ENTROPY:
        tl.store(entropy_ptr + row, entropy)
    if KL != "none":
        tl.store(kl_ptr + row, kl)
        tl.store(ref_row_lse_ptr + 2 * row, ref_pivot)
        tl.store(ref_row_lse_ptr + 2 * row + 1, ref_log_sum)


@triton.jit(do_not_specialize=["T"])
def _token_stats_forward_kernel(
    logits_ptr,  # [B, T, V], strided rows
    ref_logits_ptr,  # [B, T, V], strided rows; None without KL
    tokens_ptr,  # [N]
    temperature_ptr,  # [N], or [1] with stride 0
    mask_ptr,  # [N]; None: every token counts
    logprob_ptr,  # [N]
    entropy_ptr,  # [N]; None: not wanted
    kl_ptr,  # [N]; None without KL
    row_lse_ptr,  # [N, 2]: pivot, log_sum
    ref_row_lse_ptr,  # [N, 2]; None without KL
    T,
    V,
    stride_logits_b,
    stride_logits_t,
    stride_ref_logits_b,
    stride_ref_logits_t,
    stride_temperature,
    KL: tl.constexpr,  # "none", "forward" or "reverse"
    SOFTCAP: tl.constexpr,  # a constant of the model; None: no cap
    ACC_DTYPE: tl.constexpr,
    PART: tl.constexpr,  # entries
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    HAS_ENTROPY: tl.constexpr = entropy_ptr is not None
    if not row_counts(mask_ptr, row):
        _store_zero_statistics(
            row, logprob_ptr, entropy_ptr, kl_ptr, row_lse_ptr, ref_row_lse_ptr, ACC_DTYPE
        )
        return

    scale = _scale(temperature_ptr, row, stride_temperature, ACC_DTYPE)
    logits_row = logits_ptr + row_offset(row, T, stride_logits_b, stride_logits_t)
    ref_row = logits_row
    if KL != "none":
        ref_row = ref_logits_ptr + row_offset(row, T, stride_ref_logits_b, stride_ref_logits_t)
    partial = empty_partial(LANES, ACC_DTYPE)
    for begin in range(0, V, PART):
        part = accumulate_row_stats(
            logits_row, ref_row, begin, min(begin + PART, V), scale,
            HAS_ENTROPY, KL, SOFTCAP, False, ACC_DTYPE, UNROLL, LANES, VEC,
        )  # fmt: skip
        partial = merge_partials(partial, part, scale, HAS_ENTROPY, KL)
    x_token = token_logit(logits_row, tokens_ptr, row, V, SOFTCAP, ACC_DTYPE)
    _store_statistics(
        row, partial, x_token, scale,
        logprob_ptr, entropy_ptr, kl_ptr, row_lse_ptr, ref_row_lse_ptr, KL,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "parts"])
def _token_stats_part_kernel(
    logits_ptr,  # [B, T, V], strided rows
    ref_logits_ptr,  # [B, T, V], strided rows; None without KL
    temperature_ptr,  # [N], or [1] with stride 0
    mask_ptr,  # [N]; None: every token counts
    partials_ptr,  # [N, parts, 6, LANES]
    T,
    V,
    parts,
    stride_logits_b,
    stride_logits_t,
    stride_ref_logits_b,
    stride_ref_logits_t,
    stride_temperature,
    HAS_ENTROPY: tl.constexpr,
    KL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    PART: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // parts
    if not row_counts(mask_ptr, row):
        return

    scale = _scale(temperature_ptr, row, stride_temperature, ACC_DTYPE)
    logits_row = logits_ptr + row_offset(row, T, stride_logits_b, stride_logits_t)
    ref_row = logits_row
    if KL != "none":
        ref_row = ref_logits_ptr + row_offset(row, T, stride_ref_logits_b, stride_ref_logits_t)
    begin = (program % parts).to(tl.int32) * PART
    partial = accumulate_row_stats(
        logits_row, ref_row, begin, min(begin + PART, V), scale,
        HAS_ENTROPY, KL, SOFTCAP, False, ACC_DTYPE, UNROLL, LANES, VEC,
    )  # fmt: skip
    lanes = partials_ptr + program * (6 * LANES) + tl.arange(0, LANES)
    for i in tl.static_range(6):
        tl.store(lanes + i * LANES, partial[i])


@triton.jit(do_not_specialize=["T", "parts"])
def _token_stats_merge_kernel(
    logits_ptr,  # [B, T, V], strided rows
    tokens_ptr,  # [N]
    temperature_ptr,  # [N], or [1] with stride 0
    mask_ptr,  # [N]; None: every token counts
    partials_ptr,  # [N, parts, 6, LANES]
    logprob_ptr,  # [N]
    entropy_ptr,  # [N]; None: not wanted
    kl_ptr,  # [N]; None without KL
    row_lse_ptr,  # [N, 2]: pivot, log_sum
    ref_row_lse_ptr,  # [N, 2]; None without KL
    T,
    V,
    parts,
    stride_logits_b,
    stride_logits_t,
    stride_temperature,
    KL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    HAS_ENTROPY: tl.constexpr = entropy_ptr is not None
    if not row_counts(mask_ptr, row):
        _store_zero_statistics(
            row, logprob_ptr, entropy_ptr, kl_ptr, row_lse_ptr, ref_row_lse_ptr, ACC_DTYPE
        )
        return

    scale = _scale(temperature_ptr, row, stride_temperature, ACC_DTYPE)
    logits_row = logits_ptr + row_offset(row, T, stride_logits_b, stride_logits_t)
    partial = empty_partial(LANES, ACC_DTYPE)
    lanes = partials_ptr + row * parts * (6 * LANES) + tl.arange(0, LANES)
    for _ in range(0, parts):
        part = (
            tl.load(lanes), tl.load(lanes + LANES), tl.load(lanes + 2 * LANES),
            tl.load(lanes + 3 * LANES), tl.load(lanes + 4 * LANES), tl.load(lanes + 5 * LANES),
        )  # fmt: skip
        partial = merge_partials(partial, part, scale, HAS_ENTROPY, KL)
        lanes += 6 * LANES
    x_token = token_logit(logits_row, tokens_ptr, row, V, SOFTCAP, ACC_DTYPE)
    _store_statistics(
        row, partial, x_token, scale,
        logprob_ptr, entropy_ptr, kl_ptr, row_lse_ptr, ref_row_lse_ptr, KL,
    )  # fmt: skip


@triton.jit
def _row_weights(
    row, inverse, entropy_ptr, kl_ptr, d_logprob_ptr, d_entropy_ptr, d_kl_ptr,
    KL: tl.constexpr, ACC_DTYPE: tl.constexpr
):  # fmt: skip
    """The upstream gradients of a row as weights of its entries; inverse is 1 / temperature.

        dx = d_logprob · 1_token + p · (weight + weight_log · log2 p + ...)

    with, for the KL, weight_kl · (log2 p - log2 q) within the brackets if it is the reverse one,
    and - weight_kl · q outside if it is the forward one.
    """
    d_logprob = inverse * 0.0
    weight_log = inverse * 0.0
    weight_kl = inverse * 0.0
    if d_logprob_ptr is not None:
        d_logprob = inverse * tl.load(d_logprob_ptr + row).to(ACC_DTYPE)
    weight = -d_logprob
    if d_entropy_ptr is not None:
        d_entropy = inverse * tl.load(d_entropy_ptr + row).to(ACC_DTYPE)
        weight -= d_entropy * tl.load(entropy_ptr + row)
        weight_log = -d_entropy * LN2
    if KL != "none":
        weight_kl = inverse * tl.load(d_kl_ptr + row).to(ACC_DTYPE)
        if KL == "forward":
            weight += weight_kl
        else:
            weight -= weight_kl * tl.load(kl_ptr + row)
            weight_kl *= LN2
    return d_logprob, weight, weight_log, weight_kl


@triton.jit(do_not_specialize=["T", "parts"])
def _token_stats_backward_kernel(
    logits_ptr,  # [B, T, V], strided rows
    ref_logits_ptr,  # [B, T, V], strided rows; None without d_kl
    tokens_ptr,  # [N]
    temperature_ptr,  # [N], or [1] with stride 0
    mask_ptr,  # [N]; None: every token counts
    row_lse_ptr,  # [N, 2]: pivot, log_sum
    ref_row_lse_ptr,  # [N, 2]; None without d_kl
    entropy_ptr,  # [N]; None without d_entropy
    kl_ptr,  # [N]; None without d_kl
    d_logprob_ptr,  # [N]; None: zero
    d_entropy_ptr,  # [N]; None: zero
    d_kl_ptr,  # [N]; None: zero
    d_logits_ptr,  # [B, T, V], strided rows; may be logits_ptr
    T,
    V,
    parts,  # programs to a row
    stride_logits_b,
    stride_logits_t,
    stride_ref_logits_b,
    stride_ref_logits_t,
    stride_d_logits_b,
    stride_d_logits_t,
    stride_temperature,
    KL: tl.constexpr,  # "none", "forward" or "reverse"
    SOFTCAP: tl.constexpr,  # a constant of the model; None: no cap
    ACC_DTYPE: tl.constexpr,
    PART: tl.constexpr,  # entries
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // parts
    begin = (program % parts).to(tl.int32) * PART
    end = min(begin + PART, V)
    if parts == 1:
        end = V
    HAS_ENTROPY: tl.constexpr = d_entropy_ptr is not None
    d_row = d_logits_ptr + row_offset(row, T, stride_d_logits_b, stride_d_logits_t)

    inverse = 1.0 / tl.load(temperature_ptr + row * stride_temperature).to(ACC_DTYPE)
    d_logprob, weight, weight_log, weight_kl = _row_weights(
        row, inverse, entropy_ptr, kl_ptr, d_logprob_ptr, d_entropy_ptr, d_kl_ptr, KL, ACC_DTYPE
    )
    active = (d_logprob != 0) | (weight_log != 0) | (weight_kl != 0)
    if not (active & row_counts(mask_ptr, row)):
        TILE: tl.constexpr = UNROLL * LANES * VEC
        store_zeros(d_row, tile_offsets(UNROLL, LANES, VEC), begin, end, TILE)
        return

    logits_row = logits_ptr + row_offset(row, T, stride_logits_b, stride_logits_t)
    ref_row = logits_row
    ref_pivot = inverse
    ref_log_sum = inverse
    if KL != "none":
        ref_row = ref_logits_ptr + row_offset(row, T, stride_ref_logits_b, stride_ref_logits_t)
        ref_pivot = tl.load(ref_row_lse_ptr + 2 * row)
        ref_log_sum = tl.load(ref_row_lse_ptr + 2 * row + 1)
    pivot = tl.load(row_lse_ptr + 2 * row)
    log_sum = tl.load(row_lse_ptr + 2 * row + 1)
    row_scalars = (
        inverse * LOG2E, pivot, log_sum, ref_pivot, ref_log_sum, weight, weight_log, weight_kl,
    )  # fmt: skip
    token = tl.load(tokens_ptr + row)
    store_row_gradient(
        logits_row, ref_row, d_row, begin, end, token, d_logprob, row_scalars,
        HAS_ENTROPY, KL, SOFTCAP, 0, ACC_DTYPE, UNROLL, LANES, VEC,
    )  # fmt: skip
