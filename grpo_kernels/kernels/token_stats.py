"""Row statistics and their gradient: log-prob, entropy and one vocabulary KL of each token.

Forward, per row of V logits, one read (two with reference logits):

    log_sum = log2 S      logprob = (x_token - m) · scale - log_sum, in nats
    entropy = log_sum - U/S      never lse - Σ p·x, which cancels for large |x|
    reverse = Σ p (ln p - ln q)      forward = Σ q (ln q - ln p)      q the reference's softmax

Backward, one read (two) and one write, from the saved pivot and log_sum, which stay two numbers
because their sum would round: with p = 2^(z - log_sum),

    dx = d_logprob (1_token - p) - d_entropy p (ln p + entropy)
         + d_reverse p (ln p - ln q - KL) + d_forward (p - q)

The token's own entry is written once more after the loop, with its one-hot term: in the loop that
would cost a comparison and a selection per entry. Bytes per entry in bf16: forward 2 (4 with a
reference), backward 4 (6). Masked rows, and rows without an upstream gradient, are not read.
"""

import triton
import triton.language as tl

from .row_math import (
    LN2,
    LOG2E,
    LOWEST,
    divergence,
    floored,
    load_tile,
    moved,
    row_offset,
    softcapped,
    softcapped_derivative,
    softmax_merge,
    softmax_update,
    store_zeros,
    tile_offsets,
    tile_sum,
)


@triton.jit
def _absorb(partial, x, y, scale, HAS_ENTROPY, KL):
    """The lanes' partial (m, S, U, m_ref, S_ref, D) after tiles x, policy, and y, reference."""
    m, S, U, m_ref, S_ref, D = partial
    m_new, S_new, U, z, e, shift = softmax_update(m, S, U, x, scale, HAS_ENTROPY)
    if KL != "none":
        m_ref, S_ref_new, _, z_ref, e_ref, shift_ref = softmax_update(
            m_ref, S_ref, S_ref, y, scale, False
        )
        if KL == "reverse":
            D = moved(D, S, shift, shift - shift_ref)
            D += tile_sum(e * (z - z_ref))
        else:
            D = moved(D, S_ref, shift_ref, shift_ref - shift)
            D += tile_sum(e_ref * (z_ref - z))
        S_ref = S_ref_new
    return m_new, S_new, U, m_ref, S_ref, D


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
    normaliser_ptr,  # [N, 2]: pivot, log_sum
    ref_normaliser_ptr,  # [N, 2]; None without KL
    T,
    V,
    stride_logits_b,
    stride_logits_t,
    stride_ref_b,
    stride_ref_t,
    stride_temperature,
    KL: tl.constexpr,  # "none", "forward" or "reverse"
    SOFTCAP: tl.constexpr,  # a constant of the model; None: no cap
    ACC: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    HAS_ENTROPY: tl.constexpr = entropy_ptr is not None
    if mask_ptr is not None:
        if tl.load(mask_ptr + row) == 0:
            tl.store(logprob_ptr + row, 0.0)
            tl.store(normaliser_ptr + 2 * row + tl.arange(0, 2), tl.zeros([2], ACC))
            if HAS_ENTROPY:
                tl.store(entropy_ptr + row, 0.0)
            if KL != "none":
                tl.store(kl_ptr + row, 0.0)
                tl.store(ref_normaliser_ptr + 2 * row + tl.arange(0, 2), tl.zeros([2], ACC))
            return

    scale = LOG2E / tl.load(temperature_ptr + row * stride_temperature).to(ACC)
    logits_row = logits_ptr + row_offset(row, T, stride_logits_b, stride_logits_t)
    ref_row = logits_row
    if KL != "none":
        ref_row = ref_logits_ptr + row_offset(row, T, stride_ref_b, stride_ref_t)

    TILE: tl.constexpr = UNROLL * LANES * VEC
    offsets = tile_offsets(UNROLL, LANES, VEC)
    lowest = tl.full([LANES], LOWEST, ACC)
    zero = tl.zeros([LANES], ACC)
    partial = (lowest, zero, zero, lowest, zero, zero)
    whole = V // TILE * TILE
    for TAIL in tl.static_range(2):  # the whole tiles, then what is left, under a mask
        for start in range(TAIL * whole, whole + TAIL * (V - whole), TILE):
            at = start + offsets
            x = load_tile(logits_row, at, V, TAIL, ACC)
            y = x
            if KL != "none":
                y = load_tile(ref_row, at, V, TAIL, ACC)
            if SOFTCAP is not None:
                x = softcapped(x, SOFTCAP)
                y = softcapped(y, SOFTCAP)
            partial = _absorb(partial, x, y, scale, HAS_ENTROPY, KL)
    m, S, U, m_ref, S_ref, D = partial

    pivot, row_S, shift = softmax_merge(m, S, scale)
    log_sum = tl.log2(row_S)
    token = tl.load(tokens_ptr + row)
    in_range = (token >= 0) & (token < V)
    x_token = tl.load(logits_row + token, mask=in_range, other=float("nan")).to(ACC)
    if SOFTCAP is not None:
        x_token = softcapped(x_token, SOFTCAP)
    tl.store(logprob_ptr + row, ((x_token - pivot) * scale - log_sum) * LN2)
    tl.store(normaliser_ptr + 2 * row, pivot)
    tl.store(normaliser_ptr + 2 * row + 1, log_sum)
    if HAS_ENTROPY:
        row_U = tl.sum(moved(U, S, shift, shift), axis=0)
        tl.store(entropy_ptr + row, (log_sum - row_U / row_S) * LN2)
    if KL != "none":
        ref_pivot, row_S_ref, shift_ref = softmax_merge(m_ref, S_ref, scale)
        ref_log_sum = tl.log2(row_S_ref)
        if KL == "reverse":
            row_D = tl.sum(moved(D, S, shift, shift - shift_ref), axis=0)
            tl.store(kl_ptr + row, divergence(row_D, row_S, log_sum, ref_log_sum))
        else:
            row_D = tl.sum(moved(D, S_ref, shift_ref, shift_ref - shift), axis=0)
            tl.store(kl_ptr + row, divergence(row_D, row_S_ref, ref_log_sum, log_sum))
        tl.store(ref_normaliser_ptr + 2 * row, ref_pivot)
        tl.store(ref_normaliser_ptr + 2 * row + 1, ref_log_sum)


@triton.jit
def _row_weights(
    row, inverse, entropy_ptr, kl_ptr, d_logprob_ptr, d_entropy_ptr, d_kl_ptr,
    KL: tl.constexpr, ACC: tl.constexpr
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
        d_logprob = inverse * tl.load(d_logprob_ptr + row).to(ACC)
    weight = -d_logprob
    if d_entropy_ptr is not None:
        d_entropy = inverse * tl.load(d_entropy_ptr + row).to(ACC)
        weight -= d_entropy * tl.load(entropy_ptr + row)
        weight_log = -d_entropy * LN2
    if KL != "none":
        weight_kl = inverse * tl.load(d_kl_ptr + row).to(ACC)
        if KL == "forward":
            weight += weight_kl
        else:
            weight -= weight_kl * tl.load(kl_ptr + row)
            weight_kl *= LN2
    return d_logprob, weight, weight_log, weight_kl


@triton.jit
def _row_gradient(
    x, y, row_scalars, HAS_ENTROPY: tl.constexpr, KL: tl.constexpr, SOFTCAP: tl.constexpr
):
    """dx of every entry but for the token's one-hot term; x and y as stored, before the softcap."""
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


@triton.jit(do_not_specialize=["T"])
def _token_stats_backward_kernel(
    logits_ptr,  # [B, T, V], strided rows
    ref_logits_ptr,  # [B, T, V], strided rows; None without d_kl
    tokens_ptr,  # [N]
    temperature_ptr,  # [N], or [1] with stride 0
    mask_ptr,  # [N]; None: every token counts
    normaliser_ptr,  # [N, 2]: pivot, log_sum
    ref_normaliser_ptr,  # [N, 2]; None without d_kl
    entropy_ptr,  # [N]; None without d_entropy
    kl_ptr,  # [N]; None without d_kl
    d_logprob_ptr,  # [N]; None: zero
    d_entropy_ptr,  # [N]; None: zero
    d_kl_ptr,  # [N]; None: zero
    d_logits_ptr,  # [B, T, V], strided rows; may be logits_ptr
    T,
    V,
    stride_logits_b,
    stride_logits_t,
    stride_ref_b,
    stride_ref_t,
    stride_d_logits_b,
    stride_d_logits_t,
    stride_temperature,
    KL: tl.constexpr,  # "none", "forward" or "reverse"
    SOFTCAP: tl.constexpr,  # a constant of the model; None: no cap
    ACC: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    HAS_ENTROPY: tl.constexpr = d_entropy_ptr is not None
    d_row = d_logits_ptr + row_offset(row, T, stride_d_logits_b, stride_d_logits_t)
    offsets = tile_offsets(UNROLL, LANES, VEC)
    TILE: tl.constexpr = UNROLL * LANES * VEC

    inverse = 1.0 / tl.load(temperature_ptr + row * stride_temperature).to(ACC)
    d_logprob, weight, weight_log, weight_kl = _row_weights(
        row, inverse, entropy_ptr, kl_ptr, d_logprob_ptr, d_entropy_ptr, d_kl_ptr, KL, ACC
    )
    active = (d_logprob != 0) | (weight_log != 0) | (weight_kl != 0)
    if mask_ptr is not None:
        active &= tl.load(mask_ptr + row) != 0
    if not active:
        store_zeros(d_row, offsets, V, TILE)
        return

    logits_row = logits_ptr + row_offset(row, T, stride_logits_b, stride_logits_t)
    ref_row = logits_row
    ref_pivot = inverse
    ref_log_sum = inverse
    if KL != "none":
        ref_row = ref_logits_ptr + row_offset(row, T, stride_ref_b, stride_ref_t)
        ref_pivot = tl.load(ref_normaliser_ptr + 2 * row)
        ref_log_sum = tl.load(ref_normaliser_ptr + 2 * row + 1)
    pivot = tl.load(normaliser_ptr + 2 * row)
    log_sum = tl.load(normaliser_ptr + 2 * row + 1)
    row_scalars = (
        inverse * LOG2E, pivot, log_sum, ref_pivot, ref_log_sum, weight, weight_log, weight_kl,
    )  # fmt: skip

    # The token's logits are read before any thread of the loop, working in place, overwrites them.
    token = tl.load(tokens_ptr + row)
    in_range = (token >= 0) & (token < V)
    x_token = tl.load(logits_row + token, mask=in_range, other=0.0).to(ACC)
    y_token = tl.load(ref_row + token, mask=in_range, other=0.0).to(ACC)
    tl.debug_barrier()

    whole = V // TILE * TILE
    for TAIL in tl.static_range(2):
        for start in range(TAIL * whole, whole + TAIL * (V - whole), TILE):
            at = start + offsets
            x = load_tile(logits_row, at, V, TAIL, ACC)
            y = x
            if KL != "none":
                y = load_tile(ref_row, at, V, TAIL, ACC)
            dx = _row_gradient(x, y, row_scalars, HAS_ENTROPY, KL, SOFTCAP)
            if TAIL:
                tl.store(d_row + at, dx, mask=at < V)
            else:
                tl.store(d_row + at, dx)

    one_hot = d_logprob
    if SOFTCAP is not None:
        one_hot *= softcapped_derivative(x_token, SOFTCAP)
    dx_token = one_hot + _row_gradient(x_token, y_token, row_scalars, HAS_ENTROPY, KL, SOFTCAP)
    tl.debug_barrier()  # the loop's store to this entry comes from another thread
    tl.store(d_row + token, dx_token, mask=in_range)
