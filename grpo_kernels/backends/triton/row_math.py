"""Device mathematics of one row of logits: each formula once, its derivative beside it.

A row is walked in tiles [UNROLL, LANES, VEC]; each lane keeps an online-softmax partial over the
entries it has seen, and the lanes' partials are merged at the end. The partial is

    m = running maximum of the logits, before the temperature: an entry of the row, hence exact
    S = Σ 2^z        z = (logit - m) · scale, scale = log2(e) / temperature: odds to m, in bits
    U = Σ 2^z · z
    D = Σ 2^z · (z - z_other), z_other the same entry's z in another row (the reference's logits)

The difference to the pivot m is taken before anything is scaled, so that it rounds once however
far from zero the logits lie; x·c - m·c would round twice and lose a common offset of 1e4.

-inf logits give z = -inf, floored so that 2^z · z and 2^z · (z - z_other) are 0 and not NaN. A
pivot starts at LOWEST and not at -inf for the same reason: no difference of pivots is inf - inf.
NaN passes through every step, so that a broken row shows.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4e38)
KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)
FLOOR = tl.constexpr(-1.0e30)
NO_OVERLAP = tl.constexpr(1.0e9)  # |FLOOR| x a probability of 1e-21
MAX_LOG_RATIO = tl.constexpr(20.0)  # e^20 = 4.9e8: beyond any clip, and far from overflow


@triton.jit
def row_offset(row, T, stride_b, stride_t):
    """Offset of row b·T + t in a strided [B, T, V] tensor; row is int64, as N·V may pass 2^31."""
    return (row // T) * stride_b + (row % T) * stride_t


@triton.jit
def tile_offsets(UNROLL: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """[UNROLL, LANES, VEC]: VEC neighbours belong to one lane, as one load of 16 bytes."""
    unroll = tl.arange(0, UNROLL)[:, None, None] * (LANES * VEC)
    lane = tl.arange(0, LANES)[None, :, None] * VEC
    return unroll + lane + tl.arange(0, VEC)[None, None, :]


@triton.jit
def load_tile(
    row_ptr, offsets, V, TAIL: tl.constexpr, ACC_DTYPE: tl.constexpr, EVICT_LAST: tl.constexpr
):
    """A tile of one row in ACC_DTYPE; only the tail can reach past the end, and finds -inf there.

    EVICT_LAST: it will be read again, so that the L2 should rather let go of something else.
    """
    POLICY: tl.constexpr = "evict_last" if EVICT_LAST else ""
    if TAIL:
        inside = offsets < V
        x = tl.load(row_ptr + offsets, mask=inside, other=-float("inf"), eviction_policy=POLICY)
    else:
        x = tl.load(row_ptr + offsets, eviction_policy=POLICY)
    return x.to(ACC_DTYPE)


@triton.jit
def store_zeros(row_ptr, offsets, begin, end, TILE: tl.constexpr):
    """The gradient of entries that do not count, in a row or a part of one."""
    zeros = tl.zeros(offsets.shape, row_ptr.dtype.element_ty)
    for start in range(begin, end, TILE):
        tl.store(row_ptr + start + offsets, zeros, mask=start + offsets < end)


@triton.jit
def tile_sum(x):
    """Each lane's sum over a tile [UNROLL, LANES, VEC]: registers only, no barrier."""
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def tile_max(x):
    """Each lane's maximum over a tile [UNROLL, LANES, VEC]."""
    return tl.max(tl.max(x, axis=2), axis=0)


@triton.jit
def softcapped(x, SOFTCAP: tl.constexpr):
    """softcap · tanh(x / softcap); -inf stays -inf.

    (1 - t) / (1 + t) with t = e^(-2|x| / softcap), which cannot overflow, cancels for small |x|:
    there it is Lambert's continued fraction, u / (1 + u² / (3 + u² / ...)), seven deep, whose
    relative error u^14 / 2.7e11 is 2e-16 at 1/2 and 1e-9 at 3/2. The two share one division.
    """
    REACH: tl.constexpr = 0.5 if x.dtype == tl.float64 else 1.5
    t = tl.exp2(tl.abs(x) * (-2.0 * LOG2E / SOFTCAP))
    u = tl.abs(x) * (1.0 / SOFTCAP)
    square = u * u
    small = u < REACH
    upper = u * (135135.0 + square * (17325.0 + square * (378.0 + square)))
    lower = 135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0))
    y = SOFTCAP * tl.where(small, upper, 1.0 - t) / tl.where(small, lower, 1.0 + t)
    return tl.where(x == -float("inf"), x, tl.where(x < 0, -y, y))


@triton.jit
def softcapped_derivative(x, SOFTCAP: tl.constexpr):
    """1 - tanh²(x / softcap)."""
    t = tl.exp2(tl.abs(x) * (-2.0 * LOG2E / SOFTCAP))
    return 4.0 * t / ((1.0 + t) * (1.0 + t))


@triton.jit
def floored(z):
    """z, but at least FLOOR; NaN stays NaN."""
    return tl.maximum(z, FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def rescale_moment(moment, S, shift, drift):
    """Σ 2^(z + shift) · (w + drift) from moment = Σ 2^z · w and S = Σ 2^z.

    This is how every moment follows its pivot: w and drift are z and shift for U, and the
    differences z - z_other and shift - shift_other for D.
    """
    return tl.exp2(shift) * (moment + drift * S)


@triton.jit
def softmax_update(m, S, U, x, scale, HAS_MOMENT: tl.constexpr):
    """The partials after a tile x: (m, S, U), the tile's z and 2^z, and the pivot's shift."""
    m_new = tl.maximum(m, tile_max(x))
    shift = floored((m - m_new) * scale)
    z = floored((x - m_new[None, :, None]) * scale)
    e = tl.exp2(z)
    if HAS_MOMENT:
        U = rescale_moment(U, S, shift, shift) + tile_sum(e * z)
    S = tl.exp2(shift) * S + tile_sum(e)
    return m_new, S, U, z, e, shift


@triton.jit
def softmax_merge(m, S, scale):
    """The row's pivot and S from the lanes' partials, and the shift of each lane."""
    pivot = tl.max(m, axis=0)
    shift = floored((m - pivot) * scale)
    return pivot, tl.sum(tl.exp2(shift) * S, axis=0), shift


@triton.jit
def divergence(D, S, log_sum, other_log_sum):
    """Σ p (ln p - ln p_other) in nats; inf where p lives on entries that the other row excludes."""
    bits = D / S - log_sum + other_log_sum
    return tl.where(bits > NO_OVERLAP, float("inf"), bits * LN2)


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
    """e^log_weight, saturated; beyond [floor, cap] the bound times `outside`: 1, or 0 to mask."""
    weight, _ = ratio_of(log_weight)
    bounded = at_most(at_least(weight, floor), cap)
    return tl.where(weight == bounded, weight, bounded * outside)


@triton.jit
def surrogate_grad(
    logprob, old, ratio, d_ratio, advantage, lowest, highest, cap, SURROGATE: tl.constexpr
):
    """d/d(logprob) of a policy term.

    clip: -min(r A, clip(r, lowest, highest) A), with r capped where A < 0
    sapo: -A (4/τ) σ(τ (r - 1)), τ = highest where A > 0, else lowest
    score: -s(r within [lowest, cap]) A logprob
    dppo: -s(min(r, cap)) A logprob where the change of probability is within [lowest, highest]
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
    else:
        tl.static_assert(SURROGATE == "dppo")
        shift = tl.exp2(logprob * LOG2E) - tl.exp2(old * LOG2E)
        inside = tl.where(advantage > 0, shift <= highest, shift >= lowest)
        grad = tl.where(inside, -advantage * at_most(ratio, cap), 0.0)
    return grad


@triton.jit
def kl_grad(d, ratio, d_ratio, ESTIMATOR: tl.constexpr):
    """d/d(logprob) of an estimate of the KL from d = logprob - ref_logprob.

    k1: d    k2: d²/2    k3: e^(-d) - 1 + d, with d at least -20    k3+: of k3's value and k2's
    grad    k3_corrected: r·k3    abs: |d|
    """
    if ESTIMATOR == "k1":
        grad = d * 0.0 + 1.0
    elif ESTIMATOR == "abs":
        grad = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
    elif ESTIMATOR == "k2" or ESTIMATOR == "k3+":
        grad = d
    else:
        least = tl.maximum(d, -MAX_LOG_RATIO, propagate_nan=tl.PropagateNan.ALL)
        odds = tl.exp2(-least * LOG2E)
        grad = tl.where(d >= -MAX_LOG_RATIO, 1.0 - odds, 0.0)
        if ESTIMATOR == "k3_corrected":  # r·d where nothing saturates: two terms in e^(-d) cancel
            product_rule = ratio * grad + d_ratio * (odds - 1.0 + least)
            grad = tl.where((d_ratio != 0) & (d >= -MAX_LOG_RATIO), ratio * d, product_rule)
    return grad
