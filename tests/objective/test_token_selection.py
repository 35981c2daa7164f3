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


# M2PO: squared log-ratios of 0.01, 0.04, 0.16, 0.25, whose means are 0.01, 0.025, 0.07, 0.115


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        (0.2, (1, 1, 1, 1)),
        (0.11, (1, 0, 1, 1)),
        (0.04, (1, 0, 0, 1)),
        (0.02, (0, 0, 0, 1)),
        (0.009, (0, 0, 0, 0)),
    ],
)
def test_second_moment(implementation, limit, kept):
    log_ratio = [0.2, -0.5, 0.4, -0.1]
    fields = {"surrogate": "ratio", "second_moment": limit}
    call = {"mask": torch.tensor([[1, 1, 1, 1, 0]])}
    _, grads, metrics = evaluate(implementation, [*log_ratio, 0.0], [2.0] * 5, call=call, **fields)
    assert grads == [close([-2 * k * e(x) for k, x in zip(kept, log_ratio, strict=True)] + [0])]
    assert metrics["filters/kept_mean"] == close(sum(kept) / 4)


@IMPLEMENTATIONS
def test_second_moment_of_log_ratios_that_saturate(implementation):
    fields = {"surrogate": "ratio", "second_moment": 200.0}
    log_ratio = [1e30, 0.0, -1e30, 0.0]
    _, grads, metrics = evaluate(implementation, log_ratio, [1.0] * 4, **fields)
    assert grads == [[0, -1, 0, -1]]
    assert metrics["filters/kept_mean"] == 1.0  # a mean of 400 / 2


# Rejection: l = old - sampling; k1 = -l, k2 = l²/2, k3 = e^l - 1 - l. The last token is masked.


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("rejection", "kept"),
    [
        # k1 is -0.5, 0.1, 0.2 and -0.1, 0.3: its exponential is the ratio sampler to policy.
        (("token_k1=0.7:1.2",), [(0, 1, 0), (1, 0)]),
        (("token_k1=1.2",), [(0, 1, 0), (1, 0)]),  # at least 1 / 1.2
        (("seq_sum_k1=0.7:1.2",), [(1, 1, 1), (0, 0)]),
        (("seq_sum_k1=0.9:1.3",), [(0, 0, 0), (1, 1)]),
        (("seq_mean_k1=0.9:1.05",), [(1, 1, 1), (0, 0)]),
        (("seq_max_k1=0.5:1.25",), [(1, 1, 1), (0, 0)]),
        # k2 is 0.125, 0.005, 0.02 and 0.005, 0.045.
        (("token_k2=0.04",), [(0, 1, 1), (1, 0)]),
        (("seq_sum_k2=0.06",), [(0, 0, 0), (1, 1)]),
        (("seq_mean_k2=0.04",), [(0, 0, 0), (1, 1)]),
        (("seq_max_k2=0.1",), [(0, 0, 0), (1, 1)]),
        # k3 is 0.1487, 0.0048, 0.0187 and 0.0052, 0.0408.
        (("token_k3=0.005",), [(0, 1, 0), (0, 0)]),
        (("seq_sum_k3=0.0461",), [(0, 0, 0), (1, 1)]),
        (("seq_mean_k3=0.0573",), [(0, 0, 0), (1, 1)]),
        (("seq_mean_k3=0.0575",), [(1, 1, 1), (1, 1)]),
        (("seq_max_k3=0.04",), [(0, 0, 0), (0, 0)]),
        (("token_k2=0.04", "seq_max_k1=0.5:1.25"), [(0, 1, 1), (0, 0)]),
        (("seq_sum_k2=9", "token_k3=0.02"), [(0, 1, 1), (1, 0)]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_rejection(implementation, rejection, kept, packed):
    log_weights = [[0.5, -0.1, -0.2, 9.0], [0.1, -0.3, 9.0, 9.0]]
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    sampling = -2.0 - f64(log_weights)
    config = LossConfig(
        surrogate="reinforce", aggregation="sequence_sum_mean", rejection=rejection,
        importance_cap=None,
    )  # fmt: skip
    logprob = torch.full((2, 4), -2.0, dtype=torch.float64).requires_grad_()
    old, call = logprob.detach(), {"mask": mask}
    inputs = [logprob, old, sampling]
    if packed:
        keep = mask.bool()
        inputs = [x[keep] for x in inputs]
        call = {"cu_seqlens": torch.tensor([0, 3, 5])}
    loss, metrics = implementation.policy_loss(
        inputs[0], f64([2.0, 2.0]), old_logprob=inputs[1], sampling_logprob=inputs[2],
        config=config, **call,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss, logprob)
    for row, row_kept, row_weights in zip(grad.tolist(), kept, log_weights, strict=True):
        # The terms that stay keep their importance weight; the loss is a mean of two sequences.
        expected = [-k * e(w) for k, w in zip(row_kept, row_weights, strict=False)]
        assert row[: len(expected)] == close(expected)
    assert metrics["filters/kept_mean"].item() == close(sum(map(sum, kept)) / 5)


@IMPLEMENTATIONS
def test_rejection_saturates_log_ratios(implementation):
    fields = {"surrogate": "reinforce", "importance_cap": None, "rejection": ("token_k2=200",)}
    _, grads, _ = evaluate(implementation, [0.0], [1.0], sampling=[1e30], **fields)
    assert grads == [close([-e(20)])]


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
        {"rejection": ("token_k1=2", "seq_max_k3=1")},
    ],
)
def test_packed_needs_cu_seqlens_if_sequences_matter(implementation, fields):
    config = LossConfig(**{"aggregation": "token_mean", **fields})
    tokens = torch.zeros(3)
    with pytest.raises(ValueError, match="cu_seqlens"):
        implementation.policy_loss(tokens, tokens, sampling_logprob=tokens, config=config)
