"""Row statistics and their gradient: log-prob, entropy and one vocabulary KL of each token.

With p the row's softmax and q that of the reference policy's row, forward computes

    logprob = ln p[token]      entropy = -Σ p ln p
    reverse KL = Σ p (ln p - ln q)      forward KL = Σ q (ln q - ln p)

in one pass over each row. The entropy is log_sum - Σ e·z / Σ e and never lse - Σ p·x, which cancels
for large |x|. Backward reads each row again and writes the gradient:

    dx = d_logprob (1_token - p) - d_entropy p (ln p + entropy)
         + d_reverse p (ln p - ln q - KL) + d_forward (p - q)

Its p = 2^(z - log_sum) comes from the saved pivot and log_sum. They stay two numbers, because their
sum would round. Per entry in bf16, forward moves 2 bytes (4 with a reference policy) and backward 4
(6). Masked rows, and rows without an upstream gradient, are not read.

A row is a sequence of parts of a fixed size, whose partials are merged in order. Where the rows are
too few to fill the device, one program takes one part and another kernel merges them. The additions
happen in the same order, so that the bits of a row do not depend on the number of rows.
"""

import triton
import triton.language as tl

from .row_math import (
    LN2,
    LOG2E,
    is_unmasked,
    load_inverse_temperature,
    load_row_lse,
    load_token_logit,
    row_offset,
    store_row_lse,
    store_zeros,
    tile_offsets,
)
from .row_passes import (
    GradientScalars,
    Partial,
    RowResults,
    accumulate_row_stats,
    empty_partial,
    merge_partials,
    row_results,
    store_row_gradient,
)


@triton.jit
def _store_results(row, results, logprob_ptr, entropy_ptr, kl_ptr, row_lse_ptr, ref_row_lse_ptr):
    tl.store(logprob_ptr + row, results.logprob)
    store_row_lse(row_lse_ptr, row, results.pivot, results.log_sum)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, results.entropy)
    if kl_ptr is not None:
        tl.store(kl_ptr + row, results.kl)
        store_row_lse(ref_row_lse_ptr, row, results.ref_pivot, results.ref_log_sum)


@triton.jit
def _store_masked(row, logprob_ptr, entropy_ptr, kl_ptr, row_lse_ptr, ref_row_lse_ptr):
    """Store the results of a masked row, which are 0."""
    results = RowResults(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    _store_results(row, results, logprob_ptr, entropy_ptr, kl_ptr, row_lse_ptr, ref_row_lse_ptr)


@triton.jit(do_not_specialize=["T"])
def _token_stats_forward_kernel(
    logits_ptr,  # [B, T, V], strided rows
    ref_logits_ptr,  # [B, T, V], strided rows; None without KL
    tokens_ptr,  # [N]
    temperature_ptr,  # [N], or [1] with stride 0
    mask_ptr,  # [N]; None: no row is masked
    logprob_ptr,  # [N]
    entropy_ptr,  # [N]; None: not asked for
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
    if not is_unmasked(mask_ptr, row):
        _store_masked(row, logprob_ptr, entropy_ptr, kl_ptr, row_lse_ptr, ref_row_lse_ptr)
        return

    # Find the row, and the reference policy's.
    HAS_ENTROPY: tl.constexpr = entropy_ptr is not None
    inverse = load_inverse_temperature(temperature_ptr, row, stride_temperature, ACC_DTYPE)
    scale = inverse * LOG2E
    logits_row = logits_ptr + row_offset(row, T, stride_logits_b, stride_logits_t)
    ref_row = None
    if KL != "none":
        ref_row = ref_logits_ptr + row_offset(row, T, stride_ref_logits_b, stride_ref_logits_t)
    # Accumulate part by part, in the order in which the merge kernel adds them.
    offsets = tile_offsets(UNROLL, LANES, VEC)
    partial = empty_partial(LANES, ACC_DTYPE)
    for begin in range(0, V, PART):
        part = accumulate_row_stats(
            logits_row, ref_row, begin, min(begin + PART, V), scale, offsets,
            HAS_ENTROPY=HAS_ENTROPY, KL=KL, SOFTCAP=SOFTCAP, EVICT_LAST=False,
        )  # fmt: skip
        partial = merge_partials(partial, part, scale, HAS_ENTROPY, KL)
    # Merge the lanes and store the row's results.
    x_token = load_token_logit(logits_row, tokens_ptr, row, V, SOFTCAP, ACC_DTYPE)
    results = row_results(partial, x_token, scale, HAS_ENTROPY, KL)
    _store_results(row, results, logprob_ptr, entropy_ptr, kl_ptr, row_lse_ptr, ref_row_lse_ptr)


@triton.jit(do_not_specialize=["T", "parts"])
def _token_stats_part_kernel(
    logits_ptr,  # [B, T, V], strided rows
    ref_logits_ptr,  # [B, T, V], strided rows; None without KL
    temperature_ptr,  # [N], or [1] with stride 0
    mask_ptr,  # [N]; None: no row is masked
    partials_ptr,  # [N, parts, 6, LANES], the fields of Partial
    T,
    V,
    parts,  # programs to a row
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
    if not is_unmasked(mask_ptr, row):
        return

    # Find the row, and the reference policy's.
    inverse = load_inverse_temperature(temperature_ptr, row, stride_temperature, ACC_DTYPE)
    scale = inverse * LOG2E
    logits_row = logits_ptr + row_offset(row, T, stride_logits_b, stride_logits_t)
    ref_row = None
    if KL != "none":
        ref_row = ref_logits_ptr + row_offset(row, T, stride_ref_logits_b, stride_ref_logits_t)
    # Accumulate this program's part.
    begin = (program % parts).to(tl.int32) * PART
    partial = accumulate_row_stats(
        logits_row, ref_row, begin, min(begin + PART, V), scale, tile_offsets(UNROLL, LANES, VEC),
        HAS_ENTROPY=HAS_ENTROPY, KL=KL, SOFTCAP=SOFTCAP, EVICT_LAST=False,
    )  # fmt: skip
    # Store it, field by field.
    lanes = partials_ptr + program * (6 * LANES) + tl.arange(0, LANES)
    for i in tl.static_range(6):
        tl.store(lanes + i * LANES, partial[i])


@triton.jit(do_not_specialize=["T", "parts"])
def _token_stats_merge_kernel(
    logits_ptr,  # [B, T, V], strided rows
    tokens_ptr,  # [N]
    temperature_ptr,  # [N], or [1] with stride 0
    mask_ptr,  # [N]; None: no row is masked
    partials_ptr,  # [N, parts, 6, LANES], the fields of Partial
    logprob_ptr,  # [N]
    entropy_ptr,  # [N]; None: not asked for
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
    if not is_unmasked(mask_ptr, row):
        _store_masked(row, logprob_ptr, entropy_ptr, kl_ptr, row_lse_ptr, ref_row_lse_ptr)
        return

    # Merge the parts in their order.
    HAS_ENTROPY: tl.constexpr = entropy_ptr is not None
    inverse = load_inverse_temperature(temperature_ptr, row, stride_temperature, ACC_DTYPE)
    scale = inverse * LOG2E
    partial = empty_partial(LANES, ACC_DTYPE)
    lanes = partials_ptr + row * parts * (6 * LANES) + tl.arange(0, LANES)
    for _ in range(0, parts):
        part = Partial(
            tl.load(lanes), tl.load(lanes + LANES), tl.load(lanes + 2 * LANES),
            tl.load(lanes + 3 * LANES), tl.load(lanes + 4 * LANES), tl.load(lanes + 5 * LANES),
        )  # fmt: skip
        partial = merge_partials(partial, part, scale, HAS_ENTROPY, KL)
        lanes += 6 * LANES
    # Merge the lanes and store the row's results.
    logits_row = logits_ptr + row_offset(row, T, stride_logits_b, stride_logits_t)
    x_token = load_token_logit(logits_row, tokens_ptr, row, V, SOFTCAP, ACC_DTYPE)
    results = row_results(partial, x_token, scale, HAS_ENTROPY, KL)
    _store_results(row, results, logprob_ptr, entropy_ptr, kl_ptr, row_lse_ptr, ref_row_lse_ptr)


@triton.jit(do_not_specialize=["T", "parts"])
def _token_stats_backward_kernel(
    logits_ptr,  # [B, T, V], strided rows
    ref_logits_ptr,  # [B, T, V], strided rows; None without d_kl
    tokens_ptr,  # [N]
    temperature_ptr,  # [N], or [1] with stride 0
    mask_ptr,  # [N]; None: no row is masked
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
    # A program writes the gradient of one part of a row, or of the row.
    program = tl.program_id(0).to(tl.int64)
    row = program // parts
    begin = (program % parts).to(tl.int32) * PART
    end = min(begin + PART, V)
    if parts == 1:
        end = V
    offsets = tile_offsets(UNROLL, LANES, VEC)
    d_row = d_logits_ptr + row_offset(row, T, stride_d_logits_b, stride_d_logits_t)

    # Turn the upstream gradients into the weights of GradientScalars. Each statistic is a function
    # of logit / temperature; a KL, or the entropy, in nats is LN2 times one in bits.
    inverse = load_inverse_temperature(temperature_ptr, row, stride_temperature, ACC_DTYPE)
    d_logprob = inverse * 0.0
    if d_logprob_ptr is not None:
        d_logprob = inverse * tl.load(d_logprob_ptr + row).to(ACC_DTYPE)
    weight = -d_logprob
    has_gradient = d_logprob != 0
    weight_log = None
    if d_entropy_ptr is not None:
        d_entropy = inverse * tl.load(d_entropy_ptr + row).to(ACC_DTYPE)
        weight -= d_entropy * tl.load(entropy_ptr + row)
        weight_log = -d_entropy * LN2
        has_gradient |= weight_log != 0
    weight_kl = None
    if KL != "none":
        weight_kl = inverse * tl.load(d_kl_ptr + row).to(ACC_DTYPE)
        if KL == "forward":
            weight += weight_kl
        else:
            weight -= weight_kl * tl.load(kl_ptr + row)
            weight_kl *= LN2
        has_gradient |= weight_kl != 0
    if not (has_gradient & is_unmasked(mask_ptr, row)):
        store_zeros(d_row, offsets, begin, end)
        return

    # Find the row and its softmax, and those of the reference policy.
    logits_row = logits_ptr + row_offset(row, T, stride_logits_b, stride_logits_t)
    pivot, log_sum = load_row_lse(row_lse_ptr, row)
    ref_row = None
    ref_pivot = None
    ref_log_sum = None
    if KL != "none":
        ref_row = ref_logits_ptr + row_offset(row, T, stride_ref_logits_b, stride_ref_logits_t)
        ref_pivot, ref_log_sum = load_row_lse(ref_row_lse_ptr, row)
    # Write the gradient.
    scalars = GradientScalars(
        inverse * LOG2E, pivot, log_sum, ref_pivot, ref_log_sum,
        d_logprob, weight, weight_log, weight_kl,
    )  # fmt: skip
    token = tl.load(tokens_ptr + row)
    store_row_gradient(
        logits_row, ref_row, d_row, begin, end, token, scalars, offsets,
        KL=KL, SOFTCAP=SOFTCAP, REVERSE_ORDER=False,
    )  # fmt: skip
