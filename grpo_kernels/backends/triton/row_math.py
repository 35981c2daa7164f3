"""Device functions for one row of logits; each formula is written once, its derivative beside it.

A row is processed in tiles [UNROLL, LANES, VEC]. Each lane accumulates an online softmax over the
entries it has read; the lanes are merged at the end of the row. A lane accumulates

    m       the maximum of its logits, after the softcap and before the temperature
    sum_e   Σ e, with z = (logit - m) · scale, e = 2^z and scale = log2(e) / temperature
    sum_ez  Σ e · z, for the entropy
    sum_ed  Σ e · (z - z_other), for a KL; z_other belongs to the same entry of the other row
    sum_ee  Σ e², for Σ p²
    sum_x, count    Σ x over the logits x that are not -inf, and how many they are

m is subtracted before scaling. The difference then rounds once, however far the logits are from
zero; x·c - m·c would round twice and lose the precision of rows with a common offset of 1e4.

A logit of -inf gives z = -inf. z is floored, so that e · z and e · (z - z_other) are 0 and not NaN.
m starts at LOWEST and not at -inf for the same reason: no difference of maxima is inf - inf.
NaN propagates through every step, so that a broken row is visible in the result.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MAX_LOG_RATIO = tl.constexpr(20.0)  # e^20 = 4.9e8: beyond any clip, and far from overflow
LOWEST = tl.constexpr(-3.4e38)
KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)
FLOOR = tl.constexpr(-1.0e30)
MAX_ID = tl.constexpr(0x7FFFFFFF)
LOWEST_KEY = tl.constexpr(-(2**63))
NO_OVERLAP = tl.constexpr(1.0e9)  # |FLOOR| x a probability of 1e-21


@triton.jit
def is_unmasked(mask_ptr, row):
    unmasked = True
    if mask_ptr is not None:
        unmasked = tl.load(mask_ptr + row) != 0
    return unmasked


@triton.jit
def load_inverse_temperature(temperature_ptr, row, stride_temperature, ACC_DTYPE: tl.constexpr):
    return 1.0 / tl.load(temperature_ptr + row * stride_temperature).to(ACC_DTYPE)


@triton.jit
def load_row_lse(row_lse_ptr, row):
    """(pivot, log_sum) of a row."""
    return tl.load(row_lse_ptr + 2 * row), tl.load(row_lse_ptr + 2 * row + 1)


@triton.jit
def store_row_lse(row_lse_ptr, row, pivot, log_sum):
    tl.store(row_lse_ptr + 2 * row, pivot)
    tl.store(row_lse_ptr + 2 * row + 1, log_sum)


@triton.jit
def tile_sum(x):
    """Sum a tile [UNROLL, LANES, VEC] per lane: in registers, without a barrier."""
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def softcap_terms(x, SOFTCAP: tl.constexpr):
    """(t, 2 / (1 + t)) with t = e^(2|x| / softcap)."""
    t = tl.exp2(tl.abs(x) * (2.0 * LOG2E / SOFTCAP))
    half = 0.5 + 0.5 * t
    if x.dtype == tl.float64:
        inverse = 1.0 / half
    else:
        inverse = tl.rsqrt(half * half)  # a division takes three instructions more
    return t, inverse


@triton.jit
def softcapped(x, SOFTCAP: tl.constexpr):
    """softcap · tanh(x / softcap); -inf stays -inf.

    With t = e^(2|x| / softcap), |tanh| is 1 - 2 / (1 + t), which cannot overflow but cancels for
    small |x|. There it is u = x / softcap times a function of u². For fp32 that is a polynomial
    fitted to |u| < 1/2 with a relative error of 1.5e-8. For fp64 it is a quotient, Lambert's
    continued fraction cut seven deep, with a relative error of 2e-16 at |u| = 1/2.
    """
    C: tl.constexpr = 1.0 / (SOFTCAP * SOFTCAP)  # u² = C x²
    _, inverse = softcap_terms(x, SOFTCAP)
    large = SOFTCAP - SOFTCAP * inverse
    square = x * x
    if x.dtype == tl.float64:
        large = tl.where(x < 0, -large, large)
        square *= C
        upper = 135135.0 + square * (17325.0 + square * (378.0 + square))
        lower = 135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0))
        small = x * (upper / lower)
    else:
        # Copy the sign bit of x: one instruction.
        sign = x.to(tl.int32, bitcast=True) & ~MAX_ID
        large = (large.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        high = 0.13325879 * C * C + square * (
            -0.05304549 * C * C * C + square * (0.01724149 * C * C * C * C)
        )
        small = x * (1.0 + square * (-0.33333144 * C + square * high))
    y = tl.where(tl.abs(x) < 0.5 * SOFTCAP, small, large)
    return tl.where(x == -float("inf"), x, y)


@triton.jit
def softcapped_derivative(x, SOFTCAP: tl.constexpr):
    """1 - tanh²(x / softcap) = 4t / (1 + t)², of the terms that softcapped() has computed."""
    t, inverse = softcap_terms(x, SOFTCAP)
    return tl.minimum(t, 1.0e30) * inverse * inverse  # inf · 0 would be NaN


@triton.jit
def load_token_logit(
    logits_row, tokens_ptr, row, V, SOFTCAP: tl.constexpr, ACC_DTYPE: tl.constexpr
):
    """The token's logit after the softcap; NaN for an id outside [0, V)."""
    token = tl.load(tokens_ptr + row)
    in_range = (token >= 0) & (token < V)
    x = tl.load(logits_row + token, mask=in_range, other=float("nan")).to(ACC_DTYPE)
    if SOFTCAP is not None:
        x = softcapped(x, SOFTCAP)
    return x


@triton.jit
def floored(z):
    """max(z, FLOOR), NaN where z is."""
    return tl.maximum(z, FLOOR, propagate_nan=KEEP_NAN)


@triton.jit
def rescale_moment(moment, sum_e, shift, drift):
    """Σ 2^(z + shift) · (w + drift), from moment = Σ 2^z · w and sum_e = Σ 2^z.

    Every moment follows a new maximum in this way. For sum_ez, w is z and drift is shift. For
    sum_ed, w is z - z_other and drift is shift - shift_other.
    """
    return tl.exp2(shift) * (moment + drift * sum_e)


@triton.jit
def online_softmax(m, sum_e, sum_ez, x, scale, HAS_MOMENT: tl.constexpr):
    """Add a tile x to (m, sum_e) and, with HAS_MOMENT, to sum_ez.

    Returns the three updated, z and e of the tile, and the shift of the old maximum.
    """
    # The new maximum, and how far it moves the old sums.
    m_new = tl.maximum(m, tl.max(tl.max(x, axis=2), axis=0))
    shift = floored((m - m_new) * scale)
    # The tile's terms.
    z = floored((x - m_new[None, :, None]) * scale)
    e = tl.exp2(z)
    # Rescale the old sums and add the tile's.
    if HAS_MOMENT:
        sum_ez = rescale_moment(sum_ez, sum_e, shift, shift) + tile_sum(e * z)
    sum_e = tl.exp2(shift) * sum_e + tile_sum(e)
    return m_new, sum_e, sum_ez, z, e, shift


@triton.jit
def sum_of_entries(x):
    """Sum of the logits of a tile that are not -inf, and how many they are, per lane."""
    excluded = x == -float("inf")
    return tile_sum(tl.where(excluded, 0.0, x)), tile_sum(tl.where(excluded, 0.0, 1.0))


@triton.jit
def track_largest(best, first, x, ids):
    """Add a tile x of logits to the largest logit of each lane, and to where it came first.

    ids [UNROLL, LANES]: the first ids of the tile's accesses, each VEC neighbours. `first` becomes
    that of the first access that holds the largest logit: a comparison per access, none per entry.
    """
    largest = tl.max(x, axis=2)
    tile_best = tl.max(largest, axis=0)
    access = tl.min(tl.where(largest == tile_best[None, :], ids, MAX_ID), axis=0)
    first = tl.where(tile_best > best, access, first)
    return tl.maximum(best, tile_best), first


@triton.jit
def pack_key(x, ids):
    """An int64 that orders fp32 numbers x by size and equal ones by falling id."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # -0 equals 0
    ordered = bits ^ ((bits >> 31) & MAX_ID)
    return (ordered.to(tl.int64) << 32) | (ids ^ MAX_ID).to(tl.int64)  # MAX_ID - ids


@triton.jit
def unpack_key(key):
    """(x, id) of a key."""
    ordered = (key >> 32).to(tl.int32)
    x = (ordered ^ ((ordered >> 31) & MAX_ID)).to(tl.float32, bitcast=True)
    return x, (key & MAX_ID).to(tl.int32) ^ MAX_ID


@triton.jit
def largest_keys(keys, slots, count):
    """The `count` largest of keys that are all different, in slots; the other slots are LOWEST_KEY.

    Returns:
        int64, in the shape of `slots`, an arange.
    """
    found = tl.full(slots.shape, LOWEST_KEY, tl.int64)
    for i in range(0, count):
        largest = tl.max(keys, axis=0)
        found = tl.where(slots == i, largest, found)
        keys = tl.where(keys == largest, LOWEST_KEY, keys)
    return found


@triton.jit
def merge_lanes(m, sum_e, scale):
    """The row's maximum and Σ e from those of its lanes, and the shift of each lane."""
    pivot = tl.max(m, axis=0)
    shift = floored((m - pivot) * scale)
    return pivot, tl.sum(tl.exp2(shift) * sum_e, axis=0), shift


@triton.jit
def divergence(sum_ed, sum_e, log_sum, other_log_sum):
    """Σ p (ln p - ln p_other) in nats; inf where p has mass on entries the other row excludes."""
    bits = sum_ed / sum_e - log_sum + other_log_sum
    return tl.where(bits > NO_OVERLAP, float("inf"), bits * LN2)


# The loss of one token: gradients of its terms in the log-prob. The formulas are those of
# surrogates.py, importance_sampling.py and kl_estimators.py in objective/.


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
    return ratio, tl.where(tl.abs(log_ratio) > MAX_LOG_RATIO, 0.0, ratio)  # NaN stays NaN


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
    dppo_kl: as dppo, with the binary KL(old‖policy), negative where the probability fell
    dro:   -A logprob + cap/2 (ln r)²
    topr:  -A logprob where A > 0, else -s(min(r, cap)) A logprob
    rollout_is: -s(r) A logprob where lowest < r < highest, else 0
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
    elif SURROGATE == "dro":
        grad = cap * (logprob - old) - advantage
    elif SURROGATE == "topr":
        grad = -advantage * tl.where(advantage > 0, 1.0, at_most(ratio, cap))
    elif SURROGATE == "rollout_is":
        dropped = (ratio <= lowest) | (ratio >= highest)
        grad = tl.where(dropped, 0.0, -advantage * ratio)
    else:
        prob, old_prob = tl.exp2(logprob * LOG2E), tl.exp2(old * LOG2E)
        change = prob - old_prob
        if SURROGATE == "dppo_kl":
            rest, old_rest = at_least(1.0 - prob, 0.0), at_least(1.0 - old_prob, 0.0)
            bits = tl.log2((old_rest + 1e-8) / (rest + 1e-8))
            kl = at_least(old_prob * (old - logprob) + old_rest * bits * LN2, 0.0)
            change = tl.where(logprob < old, -kl, kl)
        else:
            tl.static_assert(SURROGATE == "dppo")
        beyond = tl.where(advantage > 0, change > highest, change < lowest)
        grad = tl.where(beyond, 0.0, -advantage * at_most(ratio, cap))
    return grad


@triton.jit
def kl_grad(d, ratio, d_ratio, ESTIMATOR: tl.constexpr):
    """d/d(logprob) of an estimate of the KL from d = logprob - ref_logprob.

    k1: d      k2: d²/2      k3: e^(-d) - 1 + d, with d at least -20      k3_corrected: ratio · k3
    k3+: the value of k3 with the gradient of k2      abs: |d|
    """
    if ESTIMATOR == "k1":
        grad = tl.where(d == d, 1.0, d)  # NaN stays NaN
    elif ESTIMATOR == "abs":
        grad = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
    elif ESTIMATOR == "k2" or ESTIMATOR == "k3+":
        grad = d
    else:
        bounded = at_least(d, -MAX_LOG_RATIO)
        odds = tl.exp2(-bounded * LOG2E)
        grad = tl.where(d < -MAX_LOG_RATIO, 0.0, 1.0 - odds)
        if ESTIMATOR == "k3_corrected":
            # Where nothing saturates, two terms in e^(-d) cancel and ratio · d remains.
            product_rule = ratio * grad + d_ratio * (odds - 1.0 + bounded)
            grad = tl.where((d_ratio != 0) & (d >= -MAX_LOG_RATIO), ratio * d, product_rule)
    return grad
