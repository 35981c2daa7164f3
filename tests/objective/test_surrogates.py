"""Surrogates and importance weights match numbers from plain Python, in both implementations."""

import math

import pytest
import torch

from grpo_kernels import LossConfig
from grpo_kernels.objective.ratios import LossInputs
from grpo_kernels.objective.surrogates import SURROGATES, Surrogate
from grpo_kernels.objective.token_gradients import token_gradients
from tests.helpers.hand_formulas import IMPLEMENTATIONS, close, evaluate, f64

e, ln = math.exp, math.log


def sigmoid(x):
    return 1 / (1 + e(-x))


# One token, whose old log-prob is -2


def sapo(advantage, tau):
    """Return (log-ratio, advantage, loss, grad) for r = 1.5."""
    value = -advantage * 4 / tau * sigmoid(tau * 0.5)
    grad = -advantage * 4 * sigmoid(tau * 0.5) * sigmoid(-tau * 0.5) * 1.5
    return ln(1.5), advantage, value, grad


def dppo(**fields):
    """p - p_old is e^-1.5 - e^-2 = 0.088 for the log-ratio 0.5, e^-3 - e^-2 = -0.086 for -1."""
    return {"surrogate": "dppo", "ratio_cap": 9.0, **fields}


def dppo_kl(**fields):
    """Set bounds on the binary KL: 0.0249 for the log-ratio 0.5, 0.0538 for -1."""
    return {"surrogate": "dppo_kl", "ratio_cap": 9.0, **fields}


DRO = {"surrogate": "dro", "proximal_coef": 0.3}
TOPR = {"surrogate": "topr", "ratio_cap": 1.5}
RATIO = {"surrogate": "ratio"}
CISPO = {"surrogate": "cispo", "ratio_cap": 1.5}
TAU = {"surrogate": "sapo", "tau_positive": 3.0, "tau_negative": 0.7}


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("fields", "log_ratio", "advantage", "loss", "grad"),
    [
        ({}, 0.1, 2.0, -2 * e(0.1), -2 * e(0.1)),
        ({}, 0.5, 2.0, -2.4, 0.0),
        ({}, -0.5, -2.0, 1.6, 0.0),
        ({}, 0.5, -2.0, 2 * e(0.5), 2 * e(0.5)),
        ({"delta": 1.5}, 0.5, -2.0, 3.0, 0.0),
        ({"dual_clip": 1.5}, 0.5, -2.0, 3.0, 0.0),
        (RATIO, 0.5, 2.0, -2 * e(0.5), -2 * e(0.5)),
        (RATIO, 25.0, -1.0, e(20), 0.0),
        (RATIO, -25.0, -1.0, e(-20), 0.0),
        ({"surrogate": "reinforce"}, 0.5, 2.0, 3.0, -2.0),
        ({"surrogate": "reinforce"}, -0.5, -2.0, -5.0, 2.0),
        # The weight is bounded above only, whatever the sign of A, and is a constant.
        (CISPO, 0.1, 2.0, 3.8 * e(0.1), -2 * e(0.1)),
        (CISPO, 1.0, 2.0, 3.0, -3.0),
        (CISPO, 1.0, -2.0, -3.0, 3.0),
        (CISPO, -3.0, 2.0, 10 * e(-3), -2 * e(-3)),
        (CISPO | {"ratio_floor": 0.7}, -3.0, 2.0, 7.0, -1.4),
        (CISPO | {"ratio_floor": 0.7}, -3.0, -2.0, -7.0, 1.4),
        # At r = 1 the value is -2A/τ and the grad -A.
        ({"surrogate": "sapo"}, 0.0, 2.0, -4.0, -2.0),
        ({"surrogate": "sapo"}, 0.0, -2.0, 4 / 1.05, 2.0),
        (TAU, *sapo(2.0, 3.0)),
        (TAU, *sapo(-2.0, 0.7)),
        (dppo(), 0.5, 2.0, 3 * e(0.5), -2 * e(0.5)),
        (dppo(ratio_cap=1.2), 0.5, 2.0, 3.6, -2.4),
        (dppo(epsilon_high=0.08), 0.5, 2.0, 0.0, 0.0),
        (dppo(epsilon_high=0.08), 0.5, -2.0, -3 * e(0.5), 2 * e(0.5)),
        (dppo(epsilon_low=0.08), -1.0, -2.0, 0.0, 0.0),
        (dppo(epsilon_low=0.09), -1.0, -2.0, -6 * e(-1), 2 * e(-1)),
        (dppo(epsilon_low=0.08), -1.0, 2.0, 6 * e(-1), -2 * e(-1)),
        (dppo_kl(), 0.5, 2.0, 3 * e(0.5), -2 * e(0.5)),
        (dppo_kl(ratio_cap=1.2), 0.5, 2.0, 3.6, -2.4),
        (dppo_kl(epsilon_high=0.024), 0.5, 2.0, 0.0, 0.0),
        (dppo_kl(epsilon_high=0.026), 0.5, 2.0, 3 * e(0.5), -2 * e(0.5)),
        (dppo_kl(epsilon_low=0.01), 0.5, -2.0, -3 * e(0.5), 2 * e(0.5)),
        (dppo_kl(epsilon_low=0.05), -1.0, -2.0, 0.0, 0.0),
        (dppo_kl(epsilon_low=0.06), -1.0, -2.0, -6 * e(-1), 2 * e(-1)),
        (dppo_kl(epsilon_high=0.01), -1.0, 2.0, 6 * e(-1), -2 * e(-1)),
        (DRO, 0.5, 2.0, 3.0375, -1.85),
        (DRO, 0.5, -2.0, -2.9625, 2.15),
        (DRO, 0.5, 0.0, 0.0375, 0.15),
        (TOPR, 0.5, 2.0, 3.0, -2.0),
        (TOPR, -3.0, 2.0, 10.0, -2.0),
        (TOPR, 1.0, -2.0, -3.0, 3.0),
        (TOPR, -3.0, -2.0, -10 * e(-3), 2 * e(-3)),
    ],
)
def test_one_token(implementation, fields, log_ratio, advantage, loss, grad):
    ours = evaluate(implementation, [log_ratio], [advantage], **fields)
    assert ours[0] == close(loss)
    assert ours[1] == [close([grad])]


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("fields", "log_ratio", "advantage", "loss", "grad", "clipped"),
    [
        ({}, 0.5, 2.0, -2 * e(0.5) + 0.0625, -2 * e(0.5) + 0.25, (0, 0)),
        ({"epsilon_high": 0.08}, 0.5, 2.0, 0.0625, 0.25, (0, 1)),
        ({"epsilon_high": 0.08}, 0.5, -2.0, 0.0625, 0.25, (0, 1)),
        ({"epsilon_low": 0.08}, -1.0, 2.0, 0.25, -0.5, (1, 0)),
        ({"epsilon_low": 0.08}, -1.0, -2.0, 0.25, -0.5, (1, 0)),
        ({"epsilon_low": 0.09}, -1.0, -2.0, 2 * e(-1) + 0.25, 2 * e(-1) - 0.5, (0, 0)),
        ({}, 0.5, 0.0, 0.0625, 0.25, (0, 0)),
        ({}, -25.0, -1.0, e(-20) + 156.25, -12.5, (0, 0)),
        ({"sampler_penalty": 0.0}, 0.0, 2.0, -2.0, -2.0, (0, 0)),
    ],
)
def test_ipo(implementation, fields, log_ratio, advantage, loss, grad, clipped):
    """p - p_sampler is 0.088 for log-ratio 0.5 and -0.086 for -1; the old log-prob is not read."""
    fields = {"surrogate": "ipo", "sampler_penalty": 0.25, **fields}
    ours = evaluate(
        implementation, [1 + log_ratio], [advantage], old=-3.0, sampling=[-1.0], **fields
    )
    assert ours[0] == close(loss)
    assert ours[1] == [close([grad])]
    assert ours[2]["ratio_mean"] == close(e(max(log_ratio, -20)))
    assert (ours[2]["clip_ratio/low_mean"], ours[2]["clip_ratio/high_mean"]) == clipped


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("fields", "log_ratio", "advantage", "loss", "grad", "clipped"),
    [
        ({}, 0.1, 2.0, 3.8 * e(0.1), -2 * e(0.1), (0, 0)),
        ({}, 0.5, 2.0, 0.0, 0.0, (0, 1)),
        ({}, 0.5, -2.0, 0.0, 0.0, (0, 1)),
        ({}, -0.5, 2.0, 0.0, 0.0, (1, 0)),
        ({}, -0.5, -2.0, 0.0, 0.0, (1, 0)),
        ({"epsilon_low": 0.4}, -0.5, -2.0, -5 * e(-0.5), 2 * e(-0.5), (0, 0)),
        ({"epsilon_high": 0.0}, 0.0, 2.0, 0.0, 0.0, (0, 1)),  # r must lie strictly inside
        ({"epsilon_low": 0.0}, 0.0, 2.0, 0.0, 0.0, (1, 0)),
    ],
)
def test_rollout_is(implementation, fields, log_ratio, advantage, loss, grad, clipped):
    """The ratio is that to the sampler, and the old log-prob is not read."""
    ours = evaluate(
        implementation,
        [1 + log_ratio],
        [advantage],
        old=-3.0,
        sampling=[-1.0],
        surrogate="rollout_is",
        **fields,
    )
    assert ours[0] == close(loss)
    assert ours[1] == [close([grad])]
    assert (ours[2]["clip_ratio/low_mean"], ours[2]["clip_ratio/high_mean"]) == clipped


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    "surrogate",
    ["clip", "ratio", "cispo", "sapo", "dppo", "reinforce", "gmpo", "dppo_kl", "dro", "topr"],
)
def test_on_policy_gradient(implementation, surrogate):
    fields = {"ratio_cap": 5.0} if surrogate in ("cispo", "dppo", "dppo_kl", "topr") else {}
    call = {"old_logprob": None}
    for advantage in (2.0, -2.0):
        _, grads, _ = evaluate(
            implementation, [0.7], [advantage], surrogate=surrogate, call=call, **fields
        )
        assert grads == [close([-advantage])]


# One sequence of two tokens, and a masked one that holds something else


def of_sequence(implementation, log_ratio, advantages, **keywords):
    call = {"mask": torch.tensor([[1, 1, 0]])}
    return evaluate(implementation, [*log_ratio, 50.0], [*advantages, 50.0], call=call, **keywords)


LOW = {"surrogate": "gmpo", "epsilon_low": 0.4}
HIGH = {"surrogate": "gmpo", "epsilon_high": 0.4}


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("level", "fields", "log_ratio", "loss", "grads"),
    [
        ("token", RATIO, (0.1, 0.3), -e(0.1) - 3 * e(0.3), (-e(0.1), -3 * e(0.3))),
        ("sequence", RATIO, (0.1, 0.3), -4 * e(0.2), (-2 * e(0.2), -2 * e(0.2))),
        ("sequence_token", RATIO, (0.1, 0.3), -4 * e(0.2), (-e(0.2), -3 * e(0.2))),
        ("sequence", RATIO, (19.0, 23.0), -4 * e(20), (0, 0)),
        ("sequence_token", RATIO, (19.0, 23.0), -4 * e(20), (0, 0)),
        ("sequence", {}, (0.4, 0.0), -4 * 1.2, (0, 0)),
        # The first token's own ratio is outside these bounds, the sequence's is inside.
        ("sequence", {"epsilon_high": 0.25}, (0.4, 0.0), -4 * e(0.2), (-2 * e(0.2),) * 2),
        ("sequence_token", {"epsilon_high": 0.25}, (0.4, 0.0), -4 * e(0.2), (-e(0.2), -3 * e(0.2))),
        ("sequence_token", {}, (0.4, 0.0), -4 * 1.2, (0, 0)),
        ("sequence", CISPO, (0.1, 0.3), (1.9 + 5.1) * e(0.2), (-e(0.2), -3 * e(0.2))),
        ("sequence_token", CISPO, (1.1, 0.3), 1.5 * (0.9 + 5.1), (-1.5, -4.5)),
    ],
)
def test_ratio_levels(implementation, level, fields, log_ratio, loss, grads):
    ours = of_sequence(implementation, log_ratio, (1, 3), ratio_level=level, **fields)
    assert ours[0] == close(loss)
    assert ours[1] == [close([*grads, 0])]


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("fields", "log_ratio", "advantages", "loss", "grads"),
    [
        (HIGH, (0.1, 0.7), (2, 2), -4 * e(0.25), (-2 * e(0.25), 0)),
        (LOW, (-0.7, 0.3), (-2, -2), 4 * e(-0.05), (0, 2 * e(-0.05))),
        (LOW, (0.7, 0.9), (-2, -2), 4 * e(0.8), (2 * e(0.8), 2 * e(0.8))),
        (HIGH, (0.7, 0.7), (1, -3), 2 * e(0.55), (0, e(0.55))),
        (HIGH, (0.7, 0.1), (0, 2), -2 * e(0.4), (-e(0.4), -e(0.4))),
        (HIGH, (30, 40), (-1, -1), 2 * e(20), (0, 0)),
        (HIGH | {"aggregation": "sequence_mean"}, (0, 0.2), (2, 2), -2 * e(0.1), (-e(0.1),) * 2),
    ],
)
def test_gmpo(implementation, fields, log_ratio, advantages, loss, grads):
    ours = of_sequence(implementation, log_ratio, advantages, **fields)
    assert ours[0] == close(loss)
    assert ours[1] == [close([*grads, 0])]


def phi(log_w, k, rate):
    return e(rate + k * log_w - rate * e(log_w))


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("log_ratio", "advantages", "log_w", "sampling", "fields"),
    [
        ((0.1, 0.3), (2, 2), 0.4, None, {}),
        ((0.1, -0.3), (-2, 0), -0.2, None, {}),
        ((0.1, -0.3), (-1, 2), -0.2, None, {"k_positive": 1.5, "lambda_positive": 0.5}),
        ((0.1, -0.3), (-1, 2), -0.2, None, {"k_negative": 1.5, "lambda_negative": 0.5}),
        ((-30.0, 19.0), (1, 1), -1.0, None, {}),
        ((-15.0, -15.0), (1, 1), ln(1e-8), None, {}),
        ((30.0, -9.0), (-1, -1), 11.0, None, {"lambda_negative": 1e-4}),
        ((15.0, 15.0), (-1, -1), 20.0, None, {"lambda_negative": 1e-9}),
        ((0.1, 0.3), (2, 2), 0.4 + ln(2) - 0.5, (1.5, -0.5), {}),
        ((9.0, 10.0), (2, 2), 19 + ln(1e-8) - 0.5, (1.5, -0.5), {"importance_mode": "mask"}),
    ],
)
def test_vespo(implementation, log_ratio, advantages, log_w, sampling, fields):
    loss_inputs = {"k_positive": 2, "lambda_positive": 3, "k_negative": 3, "lambda_negative": 2}
    loss_inputs |= {name: fields[name] for name in fields if name in loss_inputs}
    positive, negative = list(loss_inputs.values())[:2], list(loss_inputs.values())[2:]
    weights = [phi(log_w, *(positive if a >= 0 else negative)) for a in advantages]
    grads = [-w * a for w, a in zip(weights, advantages, strict=True)]
    loss = sum(grad * (x - 2) for grad, x in zip(grads, log_ratio, strict=True))
    sampling = None if sampling is None else [*sampling, 7.0]
    ours = of_sequence(
        implementation, log_ratio, advantages, surrogate="vespo", sampling=sampling, **fields
    )
    assert ours[0] == close(loss)
    assert ours[1] == [close([*grads, 0])]
    assert ours[2]["vespo/phi_seq_mean"] == close(sum(weights) / 2)


# Importance: where every ratio is 1 the weighted term is -A·weight


MASK = {"importance_mode": "mask"}
SEQUENCE = {"importance_level": "sequence"}


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("fields", "log_weights", "weights"),
    [
        ({}, (ln(1.5), ln(4)), (1.5, 2)),
        ({"importance_cap": None}, (ln(0.2), ln(4)), (0.2, 4)),
        ({"importance_cap": None}, (25.0, -25.0), (e(20), e(-20))),
        ({"importance_floor": 0.5}, (ln(0.2), ln(4)), (0.5, 2)),
        (MASK, (ln(4), ln(0.01)), (0, 0.01)),
        (MASK | {"importance_floor": 0.5}, (ln(0.2), ln(1.5)), (0, 1.5)),
        (MASK | {"importance_floor": 0.5, "importance_cap": None}, (ln(0.2), ln(9)), (0, 9)),
        (MASK | {"importance_cap": 1.0}, (0.0, 0.0), (1, 1)),
        (MASK | {"importance_floor": 1.0}, (0.0, 0.0), (1, 1)),
        (SEQUENCE, (ln(1.5), ln(1.2)), (1.8, 1.8)),
        (SEQUENCE, (ln(1.5), ln(4)), (2, 2)),
        (SEQUENCE | {"importance_floor": 0.5}, (ln(0.5), ln(0.8)), (0.5, 0.5)),
        (SEQUENCE | {"importance_cap": None}, (24.0, -1.0), (e(20), e(20))),
        (SEQUENCE | MASK, (ln(4), ln(0.3)), (1.2, 1.2)),
        (SEQUENCE | MASK, (ln(4), ln(0.6)), (0, 0)),
    ],
)
@pytest.mark.parametrize("surrogate", ["clip", "ratio", "gmpo"])
def test_importance_weights(implementation, surrogate, fields, log_weights, weights):
    ours = of_sequence(
        implementation, (0, 0), (1, 1), sampling=[*log_weights, 9.0], surrogate=surrogate, **fields
    )
    grads = (sum(weights) / 2,) * 2 if surrogate == "gmpo" else weights  # each moves the mean
    assert ours[0] == close(-sum(weights))
    assert ours[1] == [close([-grads[0], -grads[1], 0])]
    name = "sampling/importance_sampling_ratio/"
    assert ours[2][name + "min"] == close(min(weights))
    assert ours[2][name + "mean"] == close(sum(weights) / 2)
    assert ours[2][name + "max"] == close(max(weights))


# Exactly on a bound the gradient is that of the inside: with an epsilon of 0 r = 1 is a bound

ON_BOUND = [
    ({"epsilon_low": 0.0, "epsilon_high": 0.0}, 0.0),
    ({"delta": e(0.5)}, 0.5),
    ({"dual_clip": e(0.5)}, 0.5),
    (RATIO, 20.0),
    (RATIO, -20.0),
    ({"surrogate": "gmpo", "epsilon_low": 0.25, "epsilon_high": 0.25}, 0.25),
    ({"surrogate": "gmpo", "epsilon_low": 0.25, "epsilon_high": 0.25}, -0.25),
]


@IMPLEMENTATIONS
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize(("fields", "log_ratio"), ON_BOUND)
def test_gradient_exactly_on_a_clip_bound(implementation, fields, log_ratio, advantage):
    clipped = advantage > 0 and "surrogate" not in fields and log_ratio > 0.2  # r > 1.2
    expected = close([0.0 if clipped else -advantage * e(log_ratio)])
    ours = evaluate(implementation, [log_ratio], [advantage], old=0.0, **fields)
    assert ours[1] == [expected]
    config = LossConfig(**fields)
    if config.policy_term.token_level:  # the closed form, as the fused ops compute it
        one = f64([1.0])
        inputs = LossInputs(advantage * one, one, None, 0 * one, None, None)
        assert token_gradients(log_ratio * one, inputs, config).logprob.tolist() == expected


@IMPLEMENTATIONS
def test_binary_kl_of_nearly_equal_policies_is_not_negative(implementation):
    """Rounding made it so, and a token that rose by little counted as one that fell."""
    log_ratios = [10.0**-k for k in range(5, 16)]
    fields = {"surrogate": "dppo_kl", "epsilon_low": 0.0, "ratio_cap": 9.0}
    for old in (-3.0, -0.7, -0.2):
        ours = evaluate(implementation, log_ratios, [-1.0] * len(log_ratios), old=old, **fields)
        assert ours[2]["clip_ratio/low_mean"] == 0


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("estimator", "grad"), [("k3", 1 - e(20)), ("k3_corrected", -20.0), ("k3+", -20.0)]
)
def test_kl_gradient_exactly_where_k3_saturates(implementation, estimator, grad):
    call = {"ref_logprob": f64([[20.0]])}
    fields = {"beta": 1.0, "kl_estimator": estimator}
    ours = evaluate(implementation, [0.0], [0.0], old=0.0, call=call, **fields)
    cancelled = 1e-6 if estimator == "k3_corrected" else 0  # two terms of e^20 in autograd
    assert ours[1][0][0] == pytest.approx(grad, rel=1e-11, abs=cancelled)


@pytest.mark.parametrize("name", SURROGATES)
def test_token_level_surrogates_have_grad_and_kernel_form(name):
    surrogate = SURROGATES[name]
    assert (surrogate.kernel_form is not Surrogate.kernel_form) == surrogate.token_level
    assert surrogate.grad is not Surrogate.grad or not surrogate.token_level
