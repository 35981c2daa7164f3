"""AdaptiveEntropy: updates, state, error messages."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo_kernels


def test_updates_by_hand():
    control = grpo_kernels.AdaptiveEntropy(1.0, coef=0.25, step=0.25, minimum=0.125, maximum=0.625)
    measured = [0.5, 1.0, 0.9, 1.5, 1.2, 2.0, 0.8, 0.7]
    applied, stored = [], []
    for entropy in measured:
        applied.append(control.coef)
        control.update(entropy)
        stored.append(control.state_dict()["coef"])
    assert stored == [0.5, 0.625, 0.625, 0.375, 0.125, 0.125, 0.375, 0.625]
    assert applied == [0.25, 0.5, 0.625, 0.625, 0.0, 0.0, 0.0, 0.375]
    assert control.coef == 0.625


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 3), max_size=30), st.floats(0, 3), st.integers(0, 30))
def test_coef_matches_definition_across_restart(measured, target, stop):
    bounds = {"step": 0.05, "minimum": 0.02, "maximum": 0.4}
    control = grpo_kernels.AdaptiveEntropy(target, coef=0.1, **bounds)
    coef, last = 0.1, None
    for step, entropy in enumerate(measured):
        if step == stop:
            state = json.loads(json.dumps(control.state_dict()))
            control = grpo_kernels.AdaptiveEntropy(target, coef=0.3, **bounds)
            control.load_state_dict(state)
        assert control.coef == (coef if last is None or last <= target else 0.0)
        assert control.coef == 0 or 0.02 <= control.coef <= 0.4
        control.update(entropy)
        coef = min(coef + 0.05, 0.4) if entropy <= target else max(coef - 0.05, 0.02)
        last = entropy
    assert control.state_dict() == {"coef": coef, "entropy": last}


def test_a_loaded_state_is_clamped_to_the_bounds():
    control = grpo_kernels.AdaptiveEntropy(1.0, maximum=0.1)
    control.load_state_dict({"coef": 0.5, "entropy": None})
    assert control.coef == 0.1
    control.load_state_dict({"coef": 0.05, "entropy": 1.5})
    assert control.coef == 0.0


def test_coef_is_a_valid_loss_config_field():
    control = grpo_kernels.AdaptiveEntropy(1.0, coef=0.01)
    for expected in (0.01, 0.0):
        config = replace(grpo_kernels.LossConfig(), entropy_coef=control.coef)
        assert config.entropy_coef == expected
        control.update(2.0)


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (TypeError, {"target": "high"}, "target must be a number, got str"),
        (ValueError, {"target": -1.0}, "target must be at least 0, got -1.0"),
        (ValueError, {"target": 1.0, "step": 0.0}, "step must be greater than 0, got 0.0"),
        (ValueError, {"target": 1.0, "minimum": -0.1}, "minimum must be at least 0, got -0.1"),
        (ValueError, {"target": 1.0, "minimum": 2.0}, "maximum must be at least 2.0, got 1.0"),
        (ValueError, {"target": 1.0, "coef": 1.5}, "coef must be at most 1.0, got 1.5"),
        (ValueError, {"target": 1.0, "minimum": 0.5}, "coef must be at least 0.5, got 0.0"),
    ],
)
def test_wrong_arguments_raise(error, arguments, message):
    with pytest.raises(error, match=message):
        grpo_kernels.AdaptiveEntropy(**arguments)


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (
            ValueError,
            {"coef": 0.1},
            r"state must be a dict of 'coef' and 'entropy', got \['coef'\]",
        ),
        (ValueError, 3, "state must be a dict of 'coef' and 'entropy', got int"),
        (TypeError, {"coef": None, "entropy": None}, r"state\['coef'\] must be a number"),
        (ValueError, {"coef": 0.0, "entropy": float("nan")}, r"state\['entropy'\] must be finite"),
    ],
)
def test_wrong_state_or_entropy_raises(error, state, message):
    control = grpo_kernels.AdaptiveEntropy(1.0)
    with pytest.raises(error, match=message):
        control.load_state_dict(state)
    with pytest.raises(ValueError, match="entropy must be finite, got nan"):
        control.update(float("nan"))
    assert control.state_dict() == {"coef": 0.0, "entropy": None}
