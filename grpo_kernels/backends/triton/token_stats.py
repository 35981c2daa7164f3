"""Row statistics and their gradient: log-prob, entropy and one vocabulary KL of each token.

With p the row's softmax and q that of the reference policy's row, forward computes

    logprob = ln p[token]      entropy = -Σ p ln p
    reverse KL = Σ p (ln p - ln q)      forward KL = Σ q (ln q - ln p)

in one pass over each row. The entropy is log_sum - Σ e·z / Σ e and never lse - Σ p·x, which cancels
for large |x|. Backward reads each row again and writes the gradient:

    dx = d_logprob (1_token - p) - d_entropy p (ln p + entropy)
         + d_reverse p (ln p - ln q - KL) + d_forward (p - q)

On request the same pass computes ln Σ p² and the mean of the n logits x that are not -inf:

    dx += 2 d_squares p (p / Σ p² - 1) + d_mean / n

Its p = 2^(z - log_sum) comes from the saved pivot and log_sum. They stay two numbers, because their
sum would round. Per entry in bf16, forward moves 2 bytes (4 with a reference policy) and backward 4
(6). Masked rows, and rows without an upstream gradient, are not read.

A row is a sequence of parts of a fixed size, whose partials are merged in order. Where the rows are
too few to fill the device, one program takes one part and another kernel merges them. The additions
happen in the same order, so that the bits of a row do not depend on the number of rows. Nor do they
depend on the address of the row; row_access.py says why.

The K largest logits are found without a list in the loop over the entries. That loop tracks each
lane's largest logit in a group of parts, and the access of VEC neighbours that held it first: a few
instructions per access. With groups ordered by that logit, and equal ones by that access, the K
largest entries of the row lie in the first K groups, because each group before an entry's own holds
an entry that comes before it. A second kernel takes these K groups, reads their entries again,
0.4% of a row of 128,256 for K = 8, and takes the K largest. Logits are ordered before the softcap,
which may round two of them to one; of equal logits the smaller id comes first.
"""

import triton
import triton.language as tl

from .row_access import UNSPECIALIZED, row_offset, row_pointer, store_zeros, tile_offsets
from .row_math import (
    LN2,
    LOG2E,
    LOWEST_KEY,
    is_unmasked,
    largest_keys,
    load_inverse_temperature,
    load_row_lse,
    load_token_logit,
    pack_key,
    softcapped,
    store_row_lse,
    unpack_key,
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
def _store_results(
    row, results, inverse, logprob_ptr, entropy_ptr, kl_ptr, row_lse_ptr, ref_row_lse_ptr,
    sum_sq_probs_ptr, mean_logit_ptr, num_entries_ptr,
):  # fmt: skip
    tl.store(logprob_ptr + row, results.logprob)
    store_row_lse(row_lse_ptr, row, results.pivot, results.log_sum)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, results.entropy)
    if kl_ptr is not None:
        tl.store(kl_ptr + row, results.kl)
        store_row_lse(ref_row_lse_ptr, row, results.ref_pivot, results.ref_log_sum)
    if sum_sq_probs_ptr is not None:
        tl.store(sum_sq_probs_ptr + row, results.sum_sq_probs)
    if mean_logit_ptr is not None:
        tl.store(mean_logit_ptr + row, results.mean_logit * inverse)
        tl.store(num_entries_ptr + row, results.count)


@triton.jit
def _store_masked(
    row, logprob_ptr, entropy_ptr, kl_ptr, row_lse_ptr, ref_row_lse_ptr,
    sum_sq_probs_ptr, mean_logit_ptr, num_entries_ptr,
):  # fmt: skip
    """Store the results of a masked row, which are 0."""
    results = RowResults(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    _store_results(
        row, results, 1.0, logprob_ptr, entropy_ptr, kl_ptr, row_lse_ptr, ref_row_lse_ptr,
        sum_sq_probs_ptr, mean_logit_ptr, num_entries_ptr,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
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
    sum_sq_probs_ptr,  # [N]; None: not asked for
    mean_logit_ptr,  # [N]; None: not asked for
    num_entries_ptr,  # [N]; None without mean_logit_ptr
    keys_ptr,  # [N, groups, LANES], of lanes' largest logits; None: not asked for
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
    GROUP_PARTS: tl.constexpr,  # parts to a group of keys
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # of the rows, as in row_access.py
):
    row = tl.program_id(0).to(tl.int64)
    if not is_unmasked(mask_ptr, row):
        _store_masked(
            row, logprob_ptr, entropy_ptr, kl_ptr, row_lse_ptr, ref_row_lse_ptr,
            sum_sq_probs_ptr, mean_logit_ptr, num_entries_ptr,
        )  # fmt: skip
        return

    # Find the row, and the reference policy's.
    HAS_ENTROPY: tl.constexpr = entropy_ptr is not None
    HAS_SQUARES: tl.constexpr = sum_sq_probs_ptr is not None
    HAS_MEAN: tl.constexpr = mean_logit_ptr is not None
    inverse = load_inverse_temperature(temperature_ptr, row, stride_temperature, ACC_DTYPE)
    scale = inverse * LOG2E
    logits_row = row_pointer(logits_ptr, row, T, stride_logits_b, stride_logits_t, VEC, ALIGNMENT)
    ref_row = None
    if KL != "none":
        ref_row = row_pointer(
            ref_logits_ptr, row, T, stride_ref_logits_b, stride_ref_logits_t, VEC, ALIGNMENT
        )
    # Accumulate part by part, in the order in which the merge kernel adds them.
    HAS_TOP: tl.constexpr = keys_ptr is not None
    offsets = tile_offsets(UNROLL, LANES, VEC)
    partial = empty_partial(LANES, ACC_DTYPE)
    if HAS_TOP:
        best = tl.zeros([LANES], ACC_DTYPE)
        first = tl.zeros([LANES], tl.int32)
        keys = keys_ptr + row * tl.cdiv(V, GROUP_PARTS * PART) * LANES + tl.arange(0, LANES)
    for begin in range(0, V, PART):
        part = accumulate_row_stats(
            logits_row, ref_row, begin, min(begin + PART, V), scale, offsets,
            HAS_ENTROPY=HAS_ENTROPY, KL=KL, SOFTCAP=SOFTCAP, ALIGNMENT=ALIGNMENT, EVICT_LAST=False,
            HAS_SQUARES=HAS_SQUARES, HAS_MEAN=HAS_MEAN, HAS_TOP=HAS_TOP,
        )  # fmt: skip
        partial = merge_partials(partial, part, scale, HAS_ENTROPY, KL, HAS_SQUARES, HAS_MEAN)
        # Store the keys of a group of parts at its end.
        if HAS_TOP:
            place = begin // PART % GROUP_PARTS
            is_newer = (part.best > best) | (place == 0)
            best = tl.where(is_newer, part.best, best)
            first = tl.where(is_newer, part.first, first)
            if (place == GROUP_PARTS - 1) | (begin + PART >= V):
                tl.store(keys, pack_key(best, first))
                keys += LANES
    # Merge the lanes and store the row's results.
    x_token = load_token_logit(logits_row, tokens_ptr, row, V, SOFTCAP, ACC_DTYPE)
    results = row_results(partial, x_token, scale, HAS_ENTROPY, KL, HAS_SQUARES, HAS_MEAN)
    _store_results(
        row, results, inverse, logprob_ptr, entropy_ptr, kl_ptr, row_lse_ptr, ref_row_lse_ptr,
        sum_sq_probs_ptr, mean_logit_ptr, num_entries_ptr,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _token_stats_part_kernel(
    logits_ptr,  # [B, T, V], strided rows
    ref_logits_ptr,  # [B, T, V], strided rows; None without KL
    temperature_ptr,  # [N], or [1] with stride 0
    mask_ptr,  # [N]; None: no row is masked
    partials_ptr,  # [N, parts, FIELDS, LANES], fields of Partial
    keys_ptr,  # [N, parts, LANES], of lanes' largest logits; None: not asked for
    T,
    V,
    parts,  # programs to a row
    stride_logits_b,
    stride_logits_t,
    stride_ref_logits_b,
    stride_ref_logits_t,
    stride_temperature,
    HAS_ENTROPY: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    FIELDS: tl.constexpr,  # six, one with HAS_SQUARES and two with HAS_MEAN
    KL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    PART: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # of the rows, as in row_access.py
):
    program = tl.program_id(0).to(tl.int64)
    row = program // parts
    if not is_unmasked(mask_ptr, row):
        return

    # Find the row, and the reference policy's.
    inverse = load_inverse_temperature(temperature_ptr, row, stride_temperature, ACC_DTYPE)
    scale = inverse * LOG2E
    logits_row = row_pointer(logits_ptr, row, T, stride_logits_b, stride_logits_t, VEC, ALIGNMENT)
    ref_row = None
    if KL != "none":
        ref_row = row_pointer(
            ref_logits_ptr, row, T, stride_ref_logits_b, stride_ref_logits_t, VEC, ALIGNMENT
        )
    # Accumulate this program's part.
    begin = (program % parts).to(tl.int32) * PART
    partial = accumulate_row_stats(
        logits_row, ref_row, begin, min(begin + PART, V), scale, tile_offsets(UNROLL, LANES, VEC),
        HAS_ENTROPY=HAS_ENTROPY, KL=KL, SOFTCAP=SOFTCAP, ALIGNMENT=ALIGNMENT, EVICT_LAST=False,
        HAS_SQUARES=HAS_SQUARES, HAS_MEAN=HAS_MEAN, HAS_TOP=keys_ptr is not None,
    )  # fmt: skip
    # Store it, field by field.
    lanes = partials_ptr + program * (FIELDS * LANES) + tl.arange(0, LANES)
    for i in tl.static_range(6):
        tl.store(lanes + i * LANES, partial[i])
    if HAS_SQUARES:
        tl.store(lanes + 6 * LANES, partial.sum_ee)
    if HAS_MEAN:
        tl.store(lanes + (FIELDS - 2) * LANES, partial.sum_x)
        tl.store(lanes + (FIELDS - 1) * LANES, partial.count)
    if keys_ptr is not None:
        keys = keys_ptr + program * LANES + tl.arange(0, LANES)
        tl.store(keys, pack_key(partial.best, partial.first))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _token_stats_merge_kernel(
    logits_ptr,  # [B, T, V], strided rows
    tokens_ptr,  # [N]
    temperature_ptr,  # [N], or [1] with stride 0
    mask_ptr,  # [N]; None: no row is masked
    partials_ptr,  # [N, parts, FIELDS, LANES], fields of Partial
    logprob_ptr,  # [N]
    entropy_ptr,  # [N]; None: not asked for
    kl_ptr,  # [N]; None without KL
    row_lse_ptr,  # [N, 2]: pivot, log_sum
    ref_row_lse_ptr,  # [N, 2]; None without KL
    sum_sq_probs_ptr,  # [N]; None: not asked for
    mean_logit_ptr,  # [N]; None: not asked for
    num_entries_ptr,  # [N]; None without mean_logit_ptr
    T,
    V,
    parts,
    stride_logits_b,
    stride_logits_t,
    stride_temperature,
    FIELDS: tl.constexpr,
    KL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if not is_unmasked(mask_ptr, row):
        _store_masked(
            row, logprob_ptr, entropy_ptr, kl_ptr, row_lse_ptr, ref_row_lse_ptr,
            sum_sq_probs_ptr, mean_logit_ptr, num_entries_ptr,
        )  # fmt: skip
        return

    # Merge the parts in their order.
    HAS_ENTROPY: tl.constexpr = entropy_ptr is not None
    HAS_SQUARES: tl.constexpr = sum_sq_probs_ptr is not None
    HAS_MEAN: tl.constexpr = mean_logit_ptr is not None
    inverse = load_inverse_temperature(temperature_ptr, row, stride_temperature, ACC_DTYPE)
    scale = inverse * LOG2E
    partial = empty_partial(LANES, ACC_DTYPE)
    lanes = partials_ptr + row * parts * (FIELDS * LANES) + tl.arange(0, LANES)
    for _ in range(0, parts):
        sum_ee = partial.sum_ee
        if HAS_SQUARES:
            sum_ee = tl.load(lanes + 6 * LANES)
        sum_x = partial.sum_x
        count = partial.count
        if HAS_MEAN:
            sum_x = tl.load(lanes + (FIELDS - 2) * LANES)
            count = tl.load(lanes + (FIELDS - 1) * LANES)
        part = Partial(
            tl.load(lanes), tl.load(lanes + LANES), tl.load(lanes + 2 * LANES),
            tl.load(lanes + 3 * LANES), tl.load(lanes + 4 * LANES), tl.load(lanes + 5 * LANES),
            sum_ee, sum_x, count, partial.best, partial.first,
        )  # fmt: skip
        partial = merge_partials(partial, part, scale, HAS_ENTROPY, KL, HAS_SQUARES, HAS_MEAN)
        lanes += FIELDS * LANES
    # Merge the lanes and store the row's results.
    logits_row = logits_ptr + row_offset(row, T, stride_logits_b, stride_logits_t)
    x_token = load_token_logit(logits_row, tokens_ptr, row, V, SOFTCAP, ACC_DTYPE)
    results = row_results(partial, x_token, scale, HAS_ENTROPY, KL, HAS_SQUARES, HAS_MEAN)
    _store_results(
        row, results, inverse, logprob_ptr, entropy_ptr, kl_ptr, row_lse_ptr, ref_row_lse_ptr,
        sum_sq_probs_ptr, mean_logit_ptr, num_entries_ptr,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _top_entries_kernel(
    logits_ptr,  # [B, T, V], strided rows
    tokens_ptr,  # [N]
    temperature_ptr,  # [N], or [1] with stride 0
    mask_ptr,  # [N]; None: no row is masked
    row_lse_ptr,  # [N, 2]: pivot, log_sum
    keys_ptr,  # [N, groups], of lanes' largest logits
    is_top1_ptr,  # [N]; None: not asked for
    top_logprobs_ptr,  # [N, K]; None: not asked for
    top_ids_ptr,  # [N, K]; None without top_logprobs_ptr
    T,
    V,
    groups,  # keys of a row
    stride_logits_b,
    stride_logits_t,
    stride_temperature,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,  # powers of two, at least K and groups
    GROUP_BLOCK: tl.constexpr,
    SPAN: tl.constexpr,  # entries that the groups of one span of a row share
    SOFTCAP: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, K_BLOCK)
    has_slot = slots < K
    if not is_unmasked(mask_ptr, row):
        if is_top1_ptr is not None:
            tl.store(is_top1_ptr + row, False)
        if top_logprobs_ptr is not None:
            tl.store(top_logprobs_ptr + row * K + slots, 0.0, mask=has_slot)
            tl.store(top_ids_ptr + row * K + slots, 0, mask=has_slot)
        return

    # The groups with the largest logits.
    group = tl.arange(0, GROUP_BLOCK)
    keys = tl.load(keys_ptr + row * groups + group, mask=group < groups, other=LOWEST_KEY)
    count = min(K, groups)
    _, access = unpack_key(largest_keys(keys, slots, count))
    # Load their entries: a lane's accesses in a span are LANES * VEC entries apart.
    STEP: tl.constexpr = LANES * VEC
    begin = access // SPAN * SPAN + access % STEP
    accesses = tl.arange(0, SPAN // STEP)[None, :, None] * STEP
    entries = begin[:, None, None] + accesses + tl.arange(0, VEC)[None, None, :]
    in_group = (slots < count)[:, None, None]
    logits_row = logits_ptr + row_offset(row, T, stride_logits_b, stride_logits_t)
    inside = in_group & (entries < V)
    x = tl.load(logits_row + entries, mask=inside, other=-float("inf")).to(ACC_DTYPE)
    # The largest of them.
    entry_keys = tl.where(in_group, pack_key(x, entries), LOWEST_KEY)
    flat_keys = tl.reshape(entry_keys, [K_BLOCK * SPAN // LANES], can_reorder=True)
    x, ids = unpack_key(largest_keys(flat_keys, slots, K))
    if SOFTCAP is not None:
        x = softcapped(x, SOFTCAP)
    inverse = load_inverse_temperature(temperature_ptr, row, stride_temperature, ACC_DTYPE)
    pivot, log_sum = load_row_lse(row_lse_ptr, row)
    logprob = ((x - pivot) * (inverse * LOG2E) - log_sum) * LN2
    # Store them. Neither a NaN nor -inf is greater than -inf.
    if is_top1_ptr is not None:
        token = tl.load(tokens_ptr + row)
        is_top1 = (slots == 0) & (ids == token) & (logprob > -float("inf"))
        tl.store(is_top1_ptr + row, tl.max(is_top1.to(tl.int32), axis=0) != 0)
    if top_logprobs_ptr is not None:
        tl.store(top_logprobs_ptr + row * K + slots, logprob, mask=has_slot)
        tl.store(top_ids_ptr + row * K + slots, ids, mask=has_slot)


@triton.jit(do_not_specialize=UNSPECIALIZED)
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
    sum_sq_probs_ptr,  # [N]; None without d_sum_sq_probs
    num_entries_ptr,  # [N]; None without d_mean_logit
    d_logprob_ptr,  # [N]; None: zero
    d_entropy_ptr,  # [N]; None: zero
    d_kl_ptr,  # [N]; None: zero
    d_sum_sq_probs_ptr,  # [N]; None: zero
    d_mean_logit_ptr,  # [N]; None: zero
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
    ALIGNMENT: tl.constexpr,  # of the rows, as in row_access.py
):
    # A program writes the gradient of one part of a row, or of the row.
    program = tl.program_id(0).to(tl.int64)
    row = program // parts
    begin = (program % parts).to(tl.int32) * PART
    end = min(begin + PART, V)
    if parts == 1:
        end = V
    offsets = tile_offsets(UNROLL, LANES, VEC)
    d_row = row_pointer(d_logits_ptr, row, T, stride_d_logits_b, stride_d_logits_t, VEC, ALIGNMENT)

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
    weight_square = None
    if d_sum_sq_probs_ptr is not None:
        d_squares = 2.0 * inverse * tl.load(d_sum_sq_probs_ptr + row).to(ACC_DTYPE)
        weight -= d_squares
        weight_square = d_squares * tl.exp2(tl.load(sum_sq_probs_ptr + row) * -LOG2E)
        has_gradient |= d_squares != 0
    uniform = None
    if d_mean_logit_ptr is not None:
        d_mean = inverse * tl.load(d_mean_logit_ptr + row).to(ACC_DTYPE)
        uniform = d_mean / tl.load(num_entries_ptr + row)
        has_gradient |= d_mean != 0
    if not (has_gradient & is_unmasked(mask_ptr, row)):
        store_zeros(d_row, begin, end, offsets, ALIGNMENT)
        return

    # Find the row and its softmax, and those of the reference policy.
    logits_row = row_pointer(logits_ptr, row, T, stride_logits_b, stride_logits_t, VEC, ALIGNMENT)
    pivot, log_sum = load_row_lse(row_lse_ptr, row)
    ref_row = None
    ref_pivot = None
    ref_log_sum = None
    if KL != "none":
        ref_row = row_pointer(
            ref_logits_ptr, row, T, stride_ref_logits_b, stride_ref_logits_t, VEC, ALIGNMENT
        )
        ref_pivot, ref_log_sum = load_row_lse(ref_row_lse_ptr, row)
    # Write the gradient.
    scalars = GradientScalars(
        inverse * LOG2E, pivot, log_sum, ref_pivot, ref_log_sum,
        d_logprob, weight, weight_log, weight_kl, weight_square, uniform,
    )  # fmt: skip
    token = tl.load(tokens_ptr + row)
    store_row_gradient(
        logits_row, ref_row, d_row, begin, end, token, scalars, offsets,
        KL=KL, SOFTCAP=SOFTCAP, ALIGNMENT=ALIGNMENT, REVERSE_ORDER=False,
    )  # fmt: skip
