"""Token filters, KL-Cov and the metrics against values by hand, in both implementations."""

import math

import pytest
import torch

from grpo_kernels import LossConfig
from tests.helpers.hand_formulas import IMPLEMENTATIONS, close, evaluate, f64

e, ln = math.exp, math.log


# The off-policy mask: sequences of two tokens, the last one masked


@IMPLEMENTATIONS
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(
    ("distances", "advantages", "threshold", "kept"),
    [
        ((0.5, 0.1), (-1, -1), 0.31, (1, 1)),
        ((0.5, 0.1), (-1, -1), 0.29, (0, 0)),
        ((0.5, 0.1), (1, -1), 0.29, (1, 0)),
        ((0.5, 0.1), (0, -1), -1.0, (1, 0)),
        ((-0.5, -0.1), (-1, -1), -0.31, (0, 0)),
    ],
)
def test_off_policy_mask(implementation, sampled, distances, advantages, threshold, kept):
    """The distance is from the sampler's log-prob, or from the old one where there is none."""
    old_distance = (0.0, 0.0) if sampled else distances
    sampling = [-d for d in distances] + [9.0] if sampled else None  # old - sampling
    fields = {"surrogate": "ratio", "importance_cap": None, "off_policy_threshold": threshold}
    _, grads, metrics = evaluate(
        implementation,
        [*(-d for d in old_distance), -9.0],
        [*advantages, -1.0],
        sampling=sampling,
        call={"mask": torch.tensor([[1, 1, 0]])},
        **fields,
    )
    terms = [-a * k * e(-d) for a, k, d in zip(advantages, kept, distances, strict=True)]
    assert grads == [close([*terms, 0])]
    assert metrics["filters/kept_mean"] == close(sum(kept) / 2)


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("fraction", "kept"),
    [
        (1.0, (1, 1, 1, 1, 1)),
        (0.4, (0, 0, 1, 0, 1)),
        (0.5, (0, 1, 1, 0, 1)),
        (0.01, (0, 0, 1, 0, 0)),
    ],
)
@pytest.mark.parametrize("normalizer", [None, 10])
def test_top_entropy(implementation, fraction, kept, normalizer):
    """Quantiles of 1, 3, 5, 2, 4: the 0.6 quantile is 3.4, the 0.5 quantile is 3."""
    entropies = [1.0, 3.0, 5.0, 2.0, 4.0]
    entropy = f64([[*entropies, 99.0]]).requires_grad_()
    call = {"mask": torch.tensor([[1, 1, 1, 1, 1, 0]]), "entropy": entropy}
    call |= {"normalizer": 1, "entropy_normalizer": normalizer} if normalizer else {}
    fields = {"surrogate": "ratio", "top_entropy": fraction, "entropy_coef": 0.3}
    loss, grads, metrics = evaluate(implementation, [0.0] * 6, [2.0] * 6, call=call, **fields)
    # A given count is of all tokens: the chosen ones' mean then weighs as these 5 do among them.
    count = sum(kept) * (normalizer / 5 if normalizer else 1)
    bonus = sum(h * k for h, k in zip(entropies, kept, strict=True)) / count
    assert loss == close(-2 * sum(kept) - 0.3 * bonus)
    assert grads == [close([-2 * k for k in kept] + [0])]
    assert entropy.grad.tolist() == [close([-0.3 * k / count for k in kept] + [0])]
    assert metrics["filters/kept_mean"] == close(sum(kept) / 5)
    assert metrics["entropy"] == close(3.0)


# Covariances: mean A = 0 and mean logprob = -2, so that they are A·(logprob + 2)


ADVANTAGES = [3.0, -3.0, 1.0, -1.0, 2.0, -2.0]
LOGPROBS = [-1.0, -3.0, 0.0, -4.0, -2.0, -2.0]
COVARIANCES = [3.0, 3.0, 2.0, 2.0, 0.0, 0.0]


def of_covariances(implementation, log_ratio=(0.0,) * 6, **fields):
    old = [p - x for p, x in zip(LOGPROBS, log_ratio, strict=True)]
    call = {"mask": torch.tensor([[1, 1, 1, 1, 1, 1, 0]])}
    keywords = {"old": [*old, -50.0], "call": call, **fields}
    return evaluate(implementation, [*log_ratio, 9.0], [*ADVANTAGES, 70.0], **keywords)


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("low", "high", "log_ratio", "dropped"),
    [
        (1.0, 5.0, (0.0,) * 6, (0, 1, 2, 3)),
        (2.0, 5.0, (0.0,) * 6, (0, 1)),
        (-1.0, 3.0, (0.0,) * 6, (2, 3, 4, 5)),
        (3.5, 5.0, (0.0,) * 6, ()),
        # No candidates where the clip bounds already: r > 1.2 and A > 0, r < 0.8 and A < 0.
        (1.0, 5.0, (0.5, 0.5, -0.5, -0.5, 0.0, 0.0), (1, 2)),
    ],
)  # fmt: skip
def test_clip_cov_drops_candidates(implementation, low, high, log_ratio, dropped):
    _, whole, _ = of_covariances(implementation, log_ratio)
    _, grads, metrics = of_covariances(
        implementation, log_ratio, clip_cov=1.0, clip_cov_low=low, clip_cov_high=high
    )
    expected = [0 if i in dropped else grad for i, grad in enumerate(whole[0])]
    assert grads == [close(expected)]
    assert metrics["filters/kept_mean"] == close(1 - len(dropped) / 6)


@IMPLEMENTATIONS
@pytest.mark.parametrize(("fraction", "count"), [(1e-4, 1), (0.3, 1), (0.34, 2), (0.5, 3)])
def test_clip_cov_draws_at_random(implementation, fraction, count):
    torch.manual_seed(0)
    drawn = torch.zeros(7)
    for _ in range(200):
        _, grads, _ = of_covariances(implementation, surrogate="reinforce", clip_cov=fraction)
        zero = torch.tensor(grads[0]) == 0
        zero[-1] = False  # the masked one
        assert zero.sum() == count
        drawn += zero
    assert (drawn[4:] == 0).all()
    expected = 200 * count / 4
    assert ((drawn[:4] - expected).abs() < 35).all()  # five standard deviations of a fair draw


@IMPLEMENTATIONS
@pytest.mark.parametrize(("fraction", "count"), [(1e-4, 1), (0.5, 1), (0.7, 2), (1.0, 3)])
def test_kl_cov_penalises_largest_covariance(implementation, fraction, count):
    """Covariances, of mean A = 0 and mean logprob = -2: 4.5, 1.5, 0; the term is 0.5·|l|."""
    call = {"mask": torch.tensor([[1, 1, 1, 0]]), "old_logprob": f64([[-0.25, -3.5, -2.5, 0.0]])}
    keywords = {"surrogate": "reinforce", "kl_cov": fraction, "kl_cov_coef": 0.5, "call": call}
    advantages, logprobs, log_ratio = [3.0, -3.0, 0.0], [-0.5, -2.5, -3.0], [-0.25, 1.0, -0.5]
    loss, grads, _ = evaluate(
        implementation, [1.5, -0.5, -1.0, 5.0], [*advantages, 9.0], **keywords
    )
    expected = [-a for a in advantages]
    for i in range(count):
        expected[i] += math.copysign(0.5, log_ratio[i])
    penalty = sum(0.5 * abs(x) for x in log_ratio[:count])
    policy = -sum(a * p for a, p in zip(advantages, logprobs, strict=True))
    assert loss == close(policy + penalty)
    assert grads == [close([*expected, 0])]


@IMPLEMENTATIONS
def test_kl_cov_is_not_weighted_or_filtered(implementation):
    entropy = f64([[1.0, 2.0]])
    keywords = {
        "surrogate": "ratio",
        "kl_cov": 1.0,
        "top_entropy": 0.5,
        "call": {"entropy": entropy},
    }
    for log_ratio, grad in [(0.3, 1.0), (0.0, 0.0), (-0.3, -1.0)]:
        loss, grads, metrics = evaluate(
            implementation, [log_ratio, 0.0], [1.0, 1.0], sampling=[ln(3), ln(1.5)], **keywords
        )
        assert grads == [close([grad, -1.5])]
        assert loss == metrics["policy_loss"] == close(abs(log_ratio) - 1.5)


THREE = {
    "log_ratio": [[0.5, 0.0], [0.5, 0.5], [9.0, 9.0]],
    "advantages": [[1.0, 1.0], [-1.0, -1.0], [1.0, 1.0]],
    "call": {"mask": torch.tensor([[1, 1], [1, 0], [0, 0]])},
}


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"low_mean": 0, "high_mean": 1 / 3, "low_min": 0, "high_max": 0.5}),
        ({"ratio_level": "sequence"}, {"high_mean": 0.5, "high_max": 1.0, "region_mean": 0.5}),
        ({"ratio_level": "sequence_token"}, {"high_mean": 2 / 3, "high_max": 1.0}),
        ({"surrogate": "cispo", "ratio_cap": 1.5}, {"high_mean": 1 / 3, "low_mean": 0}),
        ({"surrogate": "gmpo", "epsilon_high": 0.4}, {"high_mean": 1 / 3, "high_max": 0.5}),
        ({"surrogate": "ratio"}, {"high_mean": 0, "region_mean": 0, "high_max": 0}),
        ({"surrogate": "dppo", "ratio_cap": 9.0, "epsilon_high": 0.05}, {"high_mean": 1 / 3}),
    ],
)
def test_clip_ratios(implementation, fields, expected):
    """The sequences' ratios are e^0.25 and e^0.5; the third sequence has no token."""
    _, _, metrics = evaluate(implementation, **THREE, **fields)
    for name, value in expected.items():
        assert metrics[f"clip_ratio/{name}"] == close(value), name
    assert ("cispo_clip_ratio" in metrics) == (fields.get("surrogate") == "cispo")
    assert metrics.get("cispo_clip_ratio", 1 / 3) == close(1 / 3)
    assert "filters/kept_mean" not in metrics
    ratios = {
        "token": (2 * e(0.5) + 1) / 3,
        "sequence": (e(0.25) + e(0.5)) / 2,
        "sequence_token": (2 * e(0.25) + e(0.5)) / 3,
    }
    assert metrics["ratio_mean"] == close(ratios[fields.get("ratio_level", "token")])


@IMPLEMENTATIONS
def test_clip_ratio_low_min(implementation):
    log_ratio = [[-0.5, -0.5], [-0.5, 0.0], [9.0, 9.0]]
    _, _, metrics = evaluate(
        implementation,
        log_ratio,
        [[-1.0, -1.0]] * 3,
        call={"mask": torch.tensor([[1, 1], [1, 1], [0, 0]])},
    )
    assert metrics["clip_ratio/low_min"] == close(0.5)
    assert metrics["clip_ratio/low_mean"] == close(0.75)


@IMPLEMENTATIONS
def test_vespo_phi_metric(implementation):
    _, _, metrics = evaluate(implementation, **THREE, surrogate="vespo")
    weights = [e(3 + 2 * 0.5 - 3 * e(0.5)), e(2 + 3 * 0.5 - 2 * e(0.5))]
    assert metrics["vespo/phi_seq_mean"] == close(sum(weights) / 2)


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    "fields",
    [
        {"aggregation": "sequence_mean"},
        {"ratio_level": "sequence"},
        {"ratio_level": "sequence_token"},
        {"surrogate": "vespo"},
        {"surrogate": "gmpo"},
        {"off_policy_threshold": 0.1},
        {"importance_level": "sequence"},
    ],
)
def test_packed_needs_cu_seqlens_if_sequences_matter(implementation, fields):
    config = LossConfig(**{"aggregation": "token_mean", **fields})
    tokens = torch.zeros(3)
    with pytest.raises(ValueError, match="cu_seqlens"):
        implementation.policy_loss(tokens, tokens, sampling_logprob=tokens, config=config)
