"""Device functions for the loss of one token: its terms' gradients in the log-prob, in closed form.

The formulas are those of surrogates.py, importance_sampling.py and kl_estimators.py in objective/.
"""

import triton
import triton.language as tl

from .row_math import KEEP_NAN, LOG2E

MAX_LOG_RATIO = tl.constexpr(20.0)  # e^20 = 4.9e8: beyond any clip, and far from overflow


@triton.jit
def at_most(x, bound):
    """min(x, bound), NaN where x is."""
    return tl.minimum(x, bound, propagate_nan=KEEP_NAN)


@triton.jit
def at_least(x, bound):
    """max(x, bound), NaN where x is."""
    return tl.maximum(x, bound, propagate_nan=KEEP_NAN)


@triton.jit
def ratio_of(log_ratio):
    """(e^log_ratio, its derivative), saturated at a log-ratio of ±20."""
    # Not tl.clamp: it drops a NaN, and for fp64 it does not compile.
    bounded = at_most(at_least(log_ratio, -MAX_LOG_RATIO), MAX_LOG_RATIO)
    ratio = tl.exp2(bounded * LOG2E)
    return ratio, tl.where(tl.abs(log_ratio) <= MAX_LOG_RATIO, ratio, 0.0)


@triton.jit
def importance_weight(log_weight, floor, cap, outside):
    """e^log_weight, saturated. Outside [floor, cap] it is the bound times `outside`.

    outside: 1 to truncate the weight, 0 to mask the token.
    """
    weight, _ = ratio_of(log_weight)
    bounded = at_most(at_least(weight, floor), cap)
    return tl.where(weight == bounded, weight, bounded * outside)


@triton.jit
def surrogate_grad(
    logprob, old, ratio, d_ratio, advantage, lowest, highest, cap, SURROGATE: tl.constexpr
):
    """d/d(logprob) of a policy term; r is the ratio, A the advantage, s() a stop-gradient.

    clip:  -min(r A, clip(r, lowest, highest) A), with r at most cap where A < 0
    sapo:  -A (4/τ) σ(τ (r - 1)), with τ = highest where A > 0, else lowest
    score: -s(clip(r, lowest, cap)) A logprob
    dppo:  -s(min(r, cap)) A logprob, 0 where the probability has changed beyond [lowest, highest]
           in the direction in which A pushes it
    ipo:   -r A, 0 where the probability has changed beyond [lowest, highest], plus cap (ln r)²
    """
    if SURROGATE == "clip":
        falling = (ratio >= lowest) & (ratio <= cap)
        rising = ratio <= highest
        inside = tl.where(advantage < 0, falling, rising)
        grad = tl.where(inside, -advantage, 0.0) * d_ratio
    elif SURROGATE == "sapo":
        odds = tl.exp2(tl.where(advantage > 0, highest, lowest) * (1.0 - ratio) * LOG2E)
        gate = 1.0 / (1.0 + odds)
        grad = -advantage * 4.0 * gate * (1.0 - gate) * d_ratio
    elif SURROGATE == "score":
        grad = -advantage * at_most(at_least(ratio, lowest), cap)
    elif SURROGATE == "ipo":
        prob_diff = tl.exp2(logprob * LOG2E) - tl.exp2(old * LOG2E)
        dropped = (prob_diff < lowest) | (prob_diff > highest)
        grad = tl.where(dropped, 0.0, -advantage * d_ratio) + 2.0 * cap * (logprob - old)
    else:
        tl.static_assert(SURROGATE == "dppo")
        prob_diff = tl.exp2(logprob * LOG2E) - tl.exp2(old * LOG2E)
        inside = tl.where(advantage > 0, prob_diff <= highest, prob_diff >= lowest)
        grad = tl.where(inside, -advantage * at_most(ratio, cap), 0.0)
    return grad


@triton.jit
def kl_grad(d, ratio, d_ratio, ESTIMATOR: tl.constexpr):
    """d/d(logprob) of an estimate of the KL from d = logprob - ref_logprob.

    k1: d      k2: d²/2      k3: e^(-d) - 1 + d, with d at least -20      k3_corrected: ratio · k3
    k3+: the value of k3 with the gradient of k2      abs: |d|
    """
    if ESTIMATOR == "k1":
        grad = d * 0.0 + 1.0
    elif ESTIMATOR == "abs":
        grad = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
    elif ESTIMATOR == "k2" or ESTIMATOR == "k3+":
        grad = d
    else:
        bounded = at_least(d, -MAX_LOG_RATIO)
        odds = tl.exp2(-bounded * LOG2E)
        grad = tl.where(d >= -MAX_LOG_RATIO, 1.0 - odds, 0.0)
        if ESTIMATOR == "k3_corrected":
            # Where nothing saturates, two terms in e^(-d) cancel and ratio · d remains.
            product_rule = ratio * grad + d_ratio * (odds - 1.0 + bounded)
            grad = tl.where((d_ratio != 0) & (d >= -MAX_LOG_RATIO), ratio * d, product_rule)
    return grad
