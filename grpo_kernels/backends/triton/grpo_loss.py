"""The token-level loss in one launch: a row's statistics, its loss, and the gradient of its logits.

    loss = Σ weight · (policy + beta · KL) - entropy_weight · Σ entropy - Σ nll_weight · logprob

is `policy_loss`, with the KL estimated on the sampled tokens. A program makes two passes over a
row. The first computes the log-prob and the entropy, from which follow their gradients; the second
computes the gradient of the logits. Per entry in bf16, 2 bytes are read from memory and 2 written,
and 2 more are read from the L2. The second pass goes backwards, starting from the end that was read
last.

The row is still in the L2 if one program at a time runs on each multiprocessor: 132 rows of 256 KB
are 34 MB of an H100's 50. So as many programs as the GPU has multiprocessors are launched, or as
many as have rows that fit together, each of which loops over rows. A program per row would leave
the number that runs at once to the registers that the compiler takes: at 32 two fit, and the rows
do not stay.

The loss is a sum of numbers per token and is not computed here. A second kernel scales a finished
gradient; it touches nothing where the factor is 1.
"""

import triton
import triton.language as tl

from .row_access import UNSPECIALIZED, map_row, row_pointer, store_zeros, tile_offsets
from .row_math import (
    LN2,
    LOG2E,
    importance_weight,
    is_unmasked,
    kl_grad,
    load_inverse_temperature,
    load_token_logit,
    ratio_of,
    surrogate_grad,
)
from .row_passes import GradientScalars, accumulate_row_stats, row_results, store_row_gradient


@triton.jit
def logprob_gradient(
    row, logprob, advantage_ptr, weight_ptr, old_logprob_ptr, ref_logprob_ptr,
    sampling_logprob_ptr, nll_weight_ptr, settings_ptr,
    SURROGATE: tl.constexpr, ESTIMATOR: tl.constexpr
):  # fmt: skip
    """d loss / d logprob of a token."""
    # Load the settings of the surrogate and of the KL.
    lowest = tl.load(settings_ptr)
    highest = tl.load(settings_ptr + 1)
    cap = tl.load(settings_ptr + 2)
    beta = tl.load(settings_ptr + 3)
    # The ratio to the old policy, which is the policy itself where none is given.
    old = logprob
    if old_logprob_ptr is not None:
        old = tl.load(old_logprob_ptr + row)
    ratio, d_ratio = ratio_of(logprob - old)
    # The policy term, with the importance weight of the sampler.
    advantage = tl.load(advantage_ptr + row)
    grad = surrogate_grad(logprob, old, ratio, d_ratio, advantage, lowest, highest, cap, SURROGATE)
    if sampling_logprob_ptr is not None:
        floor = tl.load(settings_ptr + 4)
        ceiling = tl.load(settings_ptr + 5)
        outside = tl.load(settings_ptr + 6)
        sampling = tl.load(sampling_logprob_ptr + row)
        grad *= importance_weight(old - sampling, floor, ceiling, outside)
    if SURROGATE != "ipo" and SURROGATE != "dro":  # advantage 0: gradient 0, also of a NaN log-prob
        grad = tl.where(advantage == 0, 0.0, grad)
    # The KL term, and the token's weight in the loss.
    if ref_logprob_ptr is not None:
        log_ratio = logprob - tl.load(ref_logprob_ptr + row)
        grad += beta * kl_grad(log_ratio, ratio, d_ratio, ESTIMATOR)
    weight = tl.load(weight_ptr + row)
    grad *= weight
    # The cross-entropy term, which tokens of weight 0 have alone.
    if nll_weight_ptr is not None:
        grad = tl.where(weight == 0, 0.0, grad) - tl.load(nll_weight_ptr + row)
    return grad


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _grpo_loss_kernel(
    logits_ptr,  # [B, T, V], strided rows
    tokens_ptr,  # [N]
    temperature_ptr,  # [N], or [1] with stride 0
    mask_ptr,  # [N]; None: no row is masked
    advantage_ptr,  # [N]
    weight_ptr,  # [N]
    entropy_weight_ptr,  # [1]; None: no bonus
    old_logprob_ptr,  # [N]; None: the policy's own
    ref_logprob_ptr,  # [N]; None: no KL in the loss
    sampling_logprob_ptr,  # [N]; None: no importance weight
    nll_weight_ptr,  # [N]; None: no cross-entropy term
    settings_ptr,  # [7], as logprob_gradient reads them
    logprob_ptr,  # [N]
    entropy_ptr,  # [N]
    d_logits_ptr,  # [B, T, V], strided rows; may be logits_ptr
    rows,  # B · T
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
    ALIGNMENT: tl.constexpr,  # of the rows, as in row_access.py
):
    offsets = tile_offsets(UNROLL, LANES, VEC)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        logits_row = row_pointer(
            logits_ptr, row, T, stride_logits_b, stride_logits_t, VEC, ALIGNMENT
        )
        d_row = row_pointer(
            d_logits_ptr, row, T, stride_d_logits_b, stride_d_logits_t, VEC, ALIGNMENT
        )
        if is_unmasked(mask_ptr, row):
            # First pass: the log-prob and the entropy. The row stays in the L2.
            inverse = load_inverse_temperature(temperature_ptr, row, stride_temperature, ACC_DTYPE)
            scale = inverse * LOG2E
            partial = accumulate_row_stats(
                logits_row, None, 0, V, scale, offsets,
                HAS_ENTROPY=True, KL="none", SOFTCAP=SOFTCAP, ALIGNMENT=ALIGNMENT, EVICT_LAST=True,
                BESIDE_WRITES=True,
            )  # fmt: skip
            x_token = load_token_logit(logits_row, tokens_ptr, row, V, SOFTCAP, ACC_DTYPE)
            results = row_results(partial, x_token, scale, HAS_ENTROPY=True, KL="none")
            tl.store(logprob_ptr + row, results.logprob)
            tl.store(entropy_ptr + row, results.entropy)

            # The gradients of the loss in the log-prob and in the entropy.
            d_logprob = inverse * logprob_gradient(
                row, results.logprob, advantage_ptr, weight_ptr, old_logprob_ptr, ref_logprob_ptr,
                sampling_logprob_ptr, nll_weight_ptr, settings_ptr, SURROGATE, ESTIMATOR,
            )  # fmt: skip
            weight = -d_logprob
            has_gradient = d_logprob != 0
            weight_log = None
            if entropy_weight_ptr is not None:
                d_entropy = -inverse * tl.load(entropy_weight_ptr)
                if nll_weight_ptr is not None:
                    d_entropy = tl.where(tl.load(weight_ptr + row) == 0, 0.0, d_entropy)
                weight -= d_entropy * results.entropy
                weight_log = -d_entropy * LN2
                has_gradient |= weight_log != 0

            # Second pass: the gradient of the logits.
            if has_gradient:
                scalars = GradientScalars(
                    scale, results.pivot, results.log_sum, None, None,
                    d_logprob, weight, weight_log, None, None, None,
                )  # fmt: skip
                token = tl.load(tokens_ptr + row)
                store_row_gradient(
                    logits_row, None, d_row, 0, V, token, scalars, offsets,
                    KL="none", SOFTCAP=SOFTCAP, ALIGNMENT=ALIGNMENT, REVERSE_ORDER=True,
                )  # fmt: skip
            else:
                tl.debug_barrier()  # every thread has loaded the token's logit
                store_zeros(d_row, 0, V, offsets, ALIGNMENT)
        else:
            tl.store(logprob_ptr + row, 0.0)
            tl.store(entropy_ptr + row, 0.0)
            store_zeros(d_row, 0, V, offsets, ALIGNMENT)


@triton.jit
def _product(x, _, scalars):
    return x * scalars[0]


@triton.jit(do_not_specialize=UNSPECIALIZED)
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
    ALIGNMENT: tl.constexpr,  # of the rows, as in row_access.py
):
    factor = tl.load(factor_ptr).to(ACC_DTYPE)
    if factor == 1.0:
        return
    row = tl.program_id(0).to(tl.int64)
    x_row = row_pointer(x_ptr, row, T, stride_x_b, stride_x_t, VEC, ALIGNMENT)
    offsets = tile_offsets(UNROLL, LANES, VEC)
    map_row(_product, x_row, None, x_row, 0, V, (factor,), offsets, ACC_DTYPE, ALIGNMENT)
