"""The token-level loss in one launch: a row's statistics, its objective, and its gradient.

    loss = Σ weight · (policy + beta · KL) - entropy_weight · Σ entropy

of `policy_loss`, with the KL estimated on the sampled tokens. A program walks its row twice: for
the log-prob and the entropy, from which it computes their gradients, and for the gradient of the
logits. Bytes per entry in bf16: 2 read and 2 written in memory, and 2 from the L2, where the row
still lies when one program at a time works on each multiprocessor (132 rows of 256 KB are 34 MB of
an H100's 50). The second walk goes backwards, from what was read last.

The loss itself is a sum of numbers per token, and not made here. Scaling a gradient that is ready
is the other kernel's work; it touches nothing where the factor is 1.
"""

import triton
import triton.language as tl

from .row_math import (
    LN2,
    LOG2E,
    importance_weight,
    kl_grad,
    ratio_of,
    row_offset,
    store_zeros,
    surrogate_grad,
    tile_offsets,
)
from .row_passes import accumulate_row_stats, row_statistics, store_row_gradient
from .token_stats import row_counts, token_logit


@triton.jit
def _log_prob_gradient(
    row, logprob, advantage_ptr, weight_ptr, old_logprob_ptr, ref_logprob_ptr,
    sampling_logprob_ptr, settings_ptr, SURROGATE: tl.constexpr, ESTIMATOR: tl.constexpr
):  # fmt: skip
    """d loss / d logprob of a token."""
    lowest = tl.load(settings_ptr)
    highest = tl.load(settings_ptr + 1)
    cap = tl.load(settings_ptr + 2)
    beta = tl.load(settings_ptr + 3)
    old = logprob
    if old_logprob_ptr is not None:
        old = tl.load(old_logprob_ptr + row)
    ratio, d_ratio = ratio_of(logprob - old)
    advantage = tl.load(advantage_ptr + row)
    grad = surrogate_grad(logprob, old, ratio, d_ratio, advantage, lowest, highest, cap, SURROGATE)
    if sampling_logprob_ptr is not None:
        least = tl.load(settings_ptr + 4)
        most = tl.load(settings_ptr + 5)
        outside = tl.load(settings_ptr + 6)
        grad *= importance_weight(old - tl.load(sampling_logprob_ptr + row), least, most, outside)
    if ref_logprob_ptr is not None:
        d = logprob - tl.load(ref_logprob_ptr + row)
        grad += beta * kl_grad(d, ratio, d_ratio, ESTIMATOR)
    return grad * tl.load(weight_ptr + row)


@triton.jit(do_not_specialize=["T"])
def _grpo_loss_kernel(
    logits_ptr,  # [B, T, V], strided rows
    tokens_ptr,  # [N]
    temperature_ptr,  # [N], or [1] with stride 0
    mask_ptr,  # [N]; None: every token counts
    advantage_ptr,  # [N]
    weight_ptr,  # [N]
    entropy_weight_ptr,  # [1]; None: no bonus
    old_logprob_ptr,  # [N]; None: the policy's own
    ref_logprob_ptr,  # [N]; None: no KL in the loss
    sampling_logprob_ptr,  # [N]; None: no importance weight
    settings_ptr,  # [7]: three of the surrogate, beta; two bounds of the importance, if it masks
    logprob_ptr,  # [N]
    entropy_ptr,  # [N]
    d_logits_ptr,  # [B, T, V], strided rows; may be logits_ptr
    T,
    V,
    stride_logits_b,
    stride_logits_t,
    stride_d_logits_b,
    stride_d_logits_t,
    stride_temperature,
    SURROGATE: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row_offset(row, T, stride_logits_b, stride_logits_t)
    d_row = d_logits_ptr + row_offset(row, T, stride_d_logits_b, stride_d_logits_t)
    offsets = tile_offsets(UNROLL, LANES, VEC)
    TILE: tl.constexpr = UNROLL * LANES * VEC
    if not row_counts(mask_ptr, row):
        tl.store(logprob_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
        store_zeros(d_row, offsets, 0, V, TILE)
        return

    inverse = 1.0 / tl.load(temperature_ptr + row * stride_temperature).to(ACC_DTYPE)
    scale = inverse * LOG2E
    partial = accumulate_row_stats(
        logits_row, logits_row, 0, V, scale,
        True, "none", SOFTCAP, True, ACC_DTYPE, UNROLL, LANES, VEC,
    )  # fmt: skip
    x_token = token_logit(logits_row, tokens_ptr, row, V, SOFTCAP, ACC_DTYPE)
    logprob, entropy, _, pivot, log_sum, _, _ = row_statistics(
        partial, x_token, scale, True, "none"
    )
    tl.store(logprob_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)

    d_logprob = inverse * _log_prob_gradient(
        row, logprob, advantage_ptr, weight_ptr, old_logprob_ptr, ref_logprob_ptr,
        sampling_logprob_ptr, settings_ptr, SURROGATE, ESTIMATOR,
    )  # fmt: skip
    weight = -d_logprob
    weight_log = inverse * 0.0
    HAS_ENTROPY: tl.constexpr = entropy_weight_ptr is not None
    if HAS_ENTROPY:
        d_entropy = -inverse * tl.load(entropy_weight_ptr)
        weight -= d_entropy * entropy
        weight_log = -d_entropy * LN2
    if (d_logprob == 0) & (weight_log == 0):
        store_zeros(d_row, offsets, 0, V, TILE)
        return
    row_scalars = (scale, pivot, log_sum, scale, scale, weight, weight_log, weight_log)
    token = tl.load(tokens_ptr + row)
    store_row_gradient(
        logits_row, logits_row, d_row, 0, V, token, d_logprob, row_scalars,
        HAS_ENTROPY, "none", SOFTCAP, 1, ACC_DTYPE, UNROLL, LANES, VEC,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _scale_kernel(
    x_ptr,  # [B, T, V], strided rows
    factor_ptr,  # [1]
    T,
    V,
    stride_x_b,
    stride_x_t,
    ACC_DTYPE: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    factor = tl.load(factor_ptr).to(ACC_DTYPE)
    if factor == 1.0:
        return
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row_offset(row, T, stride_x_b, stride_x_t)
    offsets = tile_offsets(UNROLL, LANES, VEC)
    for start in range(0, V, UNROLL * LANES * VEC):
        at = start + offsets
        x = tl.load(x_row + at, mask=at < V, other=0.0).to(ACC_DTYPE)
        tl.store(x_row + at, x * factor, mask=at < V)
