"""Terms of policy_loss match numbers from plain Python; the gradient of every KL estimator."""

import math

import pytest
import torch

from grpo_kernels import grpo_loss
from grpo_kernels.objective.kl_estimators import SAMPLED_KL
from grpo_kernels.objective.policy_loss import LossConfig, policy_loss
from reference import losses
from tests.helpers.hand_formulas import IMPLEMENTATIONS


def assert_same(actual, expected, rtol=1e-12, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def loss_and_grad(logprob, advantages, **keywords):
    logprob = torch.as_tensor(logprob, dtype=torch.float64).requires_grad_()
    loss = policy_loss(logprob, torch.as_tensor(advantages).double(), **keywords).loss
    loss.backward()
    return loss.item(), logprob.grad


def one_token(log_ratio, advantage, **fields):
    """Return the loss of one token and its derivative in the log-prob."""
    old = torch.full((1, 1), -1.0, dtype=torch.float64)
    loss, grad = loss_and_grad(
        old + log_ratio, [advantage], old_logprob=old, config=LossConfig(**fields)
    )
    return loss, grad.item()


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "fields", "loss"),
    [
        (math.log(1.1), 2.0, {}, -2.2),
        (math.log(1.5), 2.0, {}, -2.4),
        (math.log(0.5), 2.0, {}, -1.0),
        (math.log(0.5), -2.0, {}, 1.6),
        (math.log(1.5), -2.0, {}, 3.0),
        (math.log(1.25), 2.0, {"epsilon_high": 0.28}, -2.5),
        (math.log(6.0), -2.0, {"delta": 4.0}, 8.0),
        (math.log(6.0), 2.0, {"delta": 4.0}, -2.4),
        (math.log(6.0), -2.0, {"dual_clip": 3.0}, 6.0),
        (math.log(1.15), -2.0, {"dual_clip": 1.1}, 2.2),
        (math.log(6.0), -2.0, {"dual_clip": 3.0, "delta": 2.5}, 5.0),
        (100.0, -1.0, {}, math.exp(20)),
        (-100.0, 1.0, {}, -math.exp(-20)),
    ],
)
def test_surrogate_values_by_hand(log_ratio, advantage, fields, loss):
    assert one_token(log_ratio, advantage, **fields)[0] == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("d", [-30.0, -0.5, 0.0, 1e-9, 2.0, 100.0])
def test_kl_estimators_by_hand(d):
    r, bounded = math.exp(-0.3), max(d, -20.0)
    k3 = math.expm1(-bounded) + bounded
    grad = -math.expm1(-d) if d >= -20 else 0.0
    expected = {
        "k1": (d, 1.0),
        "k2": (d * d / 2, d),
        "k3": (k3, grad),
        "k3+": (k3, d),
        "k3_corrected": (r * k3, r * (grad + k3)),
        "abs": (abs(d), math.copysign(1.0, d) if d else 0.0),
    }
    assert set(expected) == set(SAMPLED_KL)
    for name, (value, gradient) in expected.items():
        loss, grad = loss_and_grad(
            [[-1.0]],
            [0.0],
            old_logprob=f64([[-0.7]]),
            ref_logprob=f64([[-1.0 - d]]),
            config=LossConfig(beta=1.0, kl_estimator=name),
        )
        assert loss == pytest.approx(value, rel=1e-7, abs=1e-15), name
        assert grad.item() == pytest.approx(gradient, rel=1e-7, abs=1e-8), name


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("sequence_mean", (1.5 + 3.0 + 0.0) / 3),
        ("token_mean", 6.0 / 3),
        ("fixed_length", 6.0 / (3 * 10)),
        ("sequence_sum_mean", 6.0 / 3),
        ("prompt_mean", 6.0 / 3),
    ],
)
def test_aggregations_by_hand(aggregation, expected):
    # Token terms 1 and 2 in the first sequence, 3 in the second, none in the third.
    settings = {
        "fixed_length": {"max_completion_length": 10},
        "prompt_mean": {"completions_per_prompt": 3},
    }
    config = LossConfig(aggregation=aggregation, **settings.get(aggregation, {}))
    terms = torch.tensor([[1.0, 2.0], [3.0, 9.0], [9.0, 9.0]])
    mask = torch.tensor([[1, 1], [1, 0], [0, 0]])
    output = policy_loss(torch.zeros(3, 2), -terms, mask=mask, config=config)
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_prompt_mean_by_hand(packed):
    """Two sequences for each of three prompts: terms 1, 2 and 6; 4 and 8; none."""
    terms = f64([[1, 2], [6, 9], [4, 9], [8, 9], [9, 9], [9, 9]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 0], [1, 0], [0, 0], [0, 0]])
    config = LossConfig(aggregation="prompt_mean", completions_per_prompt=2)
    inputs = {"advantages": -terms, "mask": mask}
    if packed:
        keep = mask.bool()
        inputs = {"advantages": -terms[keep], "cu_seqlens": torch.tensor([0, 2, 3, 4, 5, 5, 5])}
    for function in (policy_loss, losses.policy_loss):
        logprob = torch.zeros_like(inputs["advantages"], requires_grad=True)
        loss = function(logprob, **inputs, config=config).loss
        assert loss.item() == pytest.approx((9 / 3 + 12 / 2 + 0) / 3, rel=1e-12)
        (grad,) = torch.autograd.grad(loss, logprob)
        if not packed:
            grad = grad[mask.bool()]
        assert grad.tolist() == pytest.approx([1 / 9, 2 / 9, 6 / 9, 4 / 6, 8 / 6], rel=1e-12)
        loss = function(logprob, **inputs, config=config, normalizer=5).loss
        assert loss.item() == pytest.approx((9 / 3 + 12 / 2) / 5, rel=1e-12)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("normalizer", [None, 5])
def test_nll_by_hand(packed, normalizer):
    """Three tokens have a weight; of the third, outside of the mask, it is the only term."""
    logprob = f64([[-1.0, -2.0, -3.0, torch.nan]]).requires_grad_()
    keywords = {
        "mask": torch.tensor([[1, 1, 0, 0]]),
        "nll_weight": f64([[0.0, 0.5, 2.0, 0.0]]),
        "config": LossConfig(surrogate="ratio", nll_coef=0.3),
    }
    if normalizer is not None:
        keywords |= {"normalizer": 1, "nll_normalizer": normalizer}
    advantages, flat = f64([[4.0, 4.0, 9.0, 9.0]]), logprob
    if packed:
        keywords |= {name: keywords[name][0] for name in ("mask", "nll_weight")}
        keywords["cu_seqlens"] = torch.tensor([0, 4])
        flat, advantages = flat[0], advantages[0]
    nll = 0.3 / (normalizer or 2)
    for function in (policy_loss, losses.policy_loss):
        loss, metrics = function(flat, advantages, **keywords)
        assert loss.item() == pytest.approx(-4 + nll * (0.5 * 2 + 2 * 3), rel=1e-12)
        assert metrics["nll_loss"].item() == pytest.approx(nll * 7, rel=1e-12)
        assert metrics["num_tokens"] == 2
        (grad,) = torch.autograd.grad(loss, logprob, retain_graph=True)
        expected = [-2, -2 - nll * 0.5, -nll * 2, 0]
        assert grad[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_nll_weight_of_sequences():
    logprob = f64([[-1.0, -2.0], [-3.0, -4.0]])
    keywords = {"mask": torch.tensor([[1, 0], [1, 1]]), "config": LossConfig(nll_coef=1.0)}
    padded = {"nll_weight": f64([0.0, 1.0]), **keywords}
    packed = {"nll_weight": f64([0.0, 1.0]), "config": keywords["config"]}
    packed["cu_seqlens"] = torch.tensor([0, 1, 3])
    for function in (policy_loss, losses.policy_loss):
        assert function(logprob, torch.zeros(2), **padded).loss.item() == 3.5
        rows = logprob[keywords["mask"].bool()]
        assert function(rows, torch.zeros(3), **packed).loss.item() == 3.5


def test_prompt_mean_of_incomplete_groups_raises():
    config = LossConfig(aggregation="prompt_mean", completions_per_prompt=2)
    with pytest.raises(ValueError, match=r"completions_per_prompt=2 must divide .*, got 3"):
        policy_loss(torch.zeros(3, 2), torch.zeros(3), config=config)


def test_sequence_ratio_is_geometric_mean():
    log_ratio = torch.tensor([[0.1, 0.3, 50.0]])
    output = policy_loss(
        log_ratio - 1,
        torch.ones(1),
        mask=torch.tensor([[1, 1, 0]]),
        old_logprob=torch.full((1, 3), -1.0),
        config=LossConfig.gspo(epsilon_high=1.0),
    )
    assert output.loss.item() == pytest.approx(-math.exp(0.2), rel=1e-6)
    assert output.metrics["ratio_max"].item() == pytest.approx(math.exp(0.2), rel=1e-6)


def test_importance_weight_scales_policy_term_only():
    common = {
        "old_logprob": f64([[-1.0, -1.0]]),
        "ref_logprob": f64([[-1.5, -1.5]]),
        "config": LossConfig(beta=1.0, kl_estimator="k1", importance_cap=2.0),
    }
    sampling = f64([[-1.0 - math.log(1.5), -4.0]])
    loss, _ = loss_and_grad([[-1.0, -1.0]], [1.0], sampling_logprob=sampling, **common)
    assert loss == pytest.approx(-(1.5 + 2.0) / 2 + 0.5, rel=1e-12)


def test_loss_adds_kl_and_entropy_bonus():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    output = policy_loss(
        torch.zeros(2, 3),
        torch.tensor([1.0, 3.0]),
        mask=mask,
        ref_logprob=torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]]),
        entropy=torch.tensor([[1.0, 2.0, 3.0], [10.0, 0.0, 0.0]]),
        config=LossConfig(beta=0.1, kl_estimator="k1", entropy_coef=0.5),
    )
    assert output.loss.item() == pytest.approx(-2 + 0.1 * (2 + 4) / 2 - 0.5 * 16 / 4, rel=1e-6)


def test_metrics_by_hand():
    ratio = torch.tensor([[0.5, 0.5, 1.5, 1.5, 1.0]])
    output = policy_loss(
        ratio.log(),
        torch.tensor([[-1.0, 1.0, 1.0, -1.0, 0.0]]),
        old_logprob=torch.zeros(1, 5),
        ref_logprob=ratio.log() - 0.5,
        entropy=torch.arange(5.0)[None],
        config=LossConfig(kl_estimator="k1"),
    )
    r = [0.5, 0.5, 1.5, 1.5, 1.0]
    expected = {
        "policy_loss": (0.8 - 0.5 - 1.2 + 1.5) / 5,
        "kl": 0.5,
        "entropy": 2.0,
        "clip_ratio/low_mean": 0.2,
        "clip_ratio/high_mean": 0.2,
        "clip_ratio/region_mean": 0.4,
        "clip_ratio/low_min": 0.2,
        "clip_ratio/high_max": 0.2,
        "approx_kl": sum(x - 1 - math.log(x) for x in r) / 5,
        "ratio_mean": 1.0,
        "ratio_max": 1.5,
        "num_tokens": 5.0,
    }
    assert {k: v.item() for k, v in output.metrics.items()} == pytest.approx(expected, rel=1e-5)
    assert all(v.dim() == 0 and not v.requires_grad for v in output.metrics.values())


def test_optional_metrics():
    metrics = policy_loss(torch.zeros(1, 2), torch.ones(1)).metrics
    assert "kl" not in metrics
    assert "entropy" not in metrics


@pytest.mark.parametrize(
    ("log_ratio", "advantage"), [(0.5, 1.0), (-0.5, -1.0), (100.0, 1.0), (-100.0, -1.0)]
)
def test_gradient_is_zero_outside_clip(log_ratio, advantage):
    assert one_token(log_ratio, advantage)[1] == 0


@pytest.mark.parametrize(("epsilon", "advantage"), [(0.25, 1.0), (0.25, -1.0)])
def test_ratio_on_clip_boundary_has_gradient(epsilon, advantage):
    ratio = 1 + math.copysign(epsilon, advantage)
    old = torch.zeros(1, 1, dtype=torch.float64)
    boundary = abs(math.exp(math.log(ratio)) - 1)
    fields = {"epsilon_low": boundary, "epsilon_high": boundary}
    loss, grad = loss_and_grad(
        [[math.log(ratio)]], [advantage], old_logprob=old, config=LossConfig(**fields)
    )
    assert loss == pytest.approx(-ratio * advantage, rel=1e-12)
    assert grad.item() == pytest.approx(-ratio * advantage, rel=1e-12)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_on_policy_gradient(level):
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    logprob = -torch.rand(4, 3, dtype=torch.float64)
    loss, grad = loss_and_grad(logprob, advantages, config=LossConfig(ratio_level=level))
    assert loss == pytest.approx(0, abs=1e-15)
    assert_same(grad, -advantages.double()[:, None].expand(4, 3) / (4 * 3))


def exact_gradients(name, logits, ref_logits, old_logits):
    """Return the gradients of Σ old·estimate over the vocabulary and of both KLs."""
    old, logits = old_logits.softmax(-1), logits.clone().requires_grad_()
    p, q = logits.softmax(-1), ref_logits.softmax(-1)
    reverse = (p * (p.log() - q.log())).sum()
    forward = (q * (q.log() - p.log())).sum()
    # Every entry of the vocabulary is one token, weighted by its probability of being sampled.
    values = SAMPLED_KL[name].value(p.log() - q.log(), p.log() - old.log())
    of = [(old * values).sum(), forward, reverse]
    return [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in of], of


@pytest.mark.parametrize(
    ("name", "whose"),
    [
        ("k1", "nobody"),
        ("k2", "reverse"),
        ("k3", "forward"),
        ("k3+", "reverse"),
        ("k3_corrected", "reverse"),
        ("abs", "neither"),
    ],
)
def test_expected_kl_gradient_on_policy(name, whose):
    logits, ref_logits = torch.randn(2, 12, dtype=torch.float64).unbind()
    (ours, forward, reverse), (value, _, reverse_value) = exact_gradients(
        name, logits, ref_logits, logits
    )
    expected = {"nobody": torch.zeros(12).double(), "forward": forward, "reverse": reverse}
    if whose in expected:
        assert_same(ours, expected[whose])
    else:
        assert not any(torch.allclose(ours, other, atol=1e-3) for other in expected.values())
    if name in ("k1", "k3", "k3+", "k3_corrected"):
        assert_same(value, reverse_value)


def test_k3_corrected_is_unbiased_off_policy():
    logits, ref_logits, old_logits = torch.randn(3, 12, dtype=torch.float64).unbind()
    (ours, _, reverse), (value, _, reverse_value) = exact_gradients(
        "k3_corrected", logits, ref_logits, old_logits
    )
    assert_same(ours, reverse)
    assert_same(value, reverse_value)


def test_distillation_by_hand():
    """A policy of (3/4, 1/4), a teacher of (1/2, 1/2), the first token and an advantage of 2."""
    for changes, beta, kl, grad_kl in (
        ({}, 1.0, 0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.1875 * math.log(3)),
        ({"beta": 0.4}, 0.4, 0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.1875 * math.log(3)),
        ({"kl_estimator": "forward"}, 1.0, 0.5 * math.log(4 / 3), 0.25),
    ):
        logits = f64([[3.0, 1.0]]).log().requires_grad_()
        loss, metrics = grpo_loss(
            logits, torch.tensor([0]), f64([2.0]), ref_logits=f64([[0.0, 0.0]]),
            config=LossConfig.distillation(**changes),
        )  # fmt: skip
        assert_same(loss, f64(-2.0 + beta * kl))
        assert_same(metrics["kl"], f64(kl))
        assert_same(metrics["policy_loss"], f64(-2.0))
        grad = -2.0 * 0.25 + beta * grad_kl
        assert_same(torch.autograd.grad(loss, logits)[0], f64([[grad, -grad]]))


@IMPLEMENTATIONS
@pytest.mark.parametrize(("entropy_normalizer", "divisor"), [(None, 8), (5, 5)])
def test_normalizer_of_a_token_mean_divides_the_entropy_too(
    implementation, entropy_normalizer, divisor
):
    entropy = f64([[1.0, 2.0, 4.0]])
    config = LossConfig(aggregation="token_mean", entropy_coef=0.5)
    loss = implementation.policy_loss(
        f64([[0.0, 0.0, 0.0]]),
        f64([3.0]),
        entropy=entropy,
        config=config,
        normalizer=8,
        entropy_normalizer=entropy_normalizer,
    ).loss
    assert loss.item() == pytest.approx(-9 / 8 - 0.5 * 7 / divisor)
