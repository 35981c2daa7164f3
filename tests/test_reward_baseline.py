"""EMABaseline: advantages by hand, state, error messages."""

import json

import pytest
import torch

from grpo_kernels import EMABaseline


def test_advantages_by_hand():
    baseline = EMABaseline(decay=0.75)
    steps = [
        ([[1.0, 3.0]], [[-1.0, 1.0]]),  # b = 2, its own mean
        ([[4.0, 8.0]], [[2.0, 6.0]]),  # then 0.75·2 + 0.25·6 = 3
        ([[3.0, 3.0]], [[0.0, 0.0]]),
        ([[7.0]], [[4.0]]),  # 0.75·3 + 0.25·3 = 3: one completion is enough
        ([[4.0]], [[0.0]]),  # 0.75·3 + 0.25·7 = 4
    ]
    for rewards, expected in steps:
        assert baseline.advantage(torch.tensor(rewards)).tolist() == expected


def test_agents_have_baselines_of_their_own():
    baseline = EMABaseline(decay=0.5)
    assert baseline.advantage(torch.tensor([2.0]), agent="solver").item() == 0
    assert baseline.advantage(torch.tensor([10.0]), agent="proposer").item() == 0
    assert baseline.advantage(torch.tensor([4.0]), agent="solver").item() == 2
    assert baseline.state_dict() == {"solver": 3.0, "proposer": 10.0}


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.int64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes(dtype, expected):
    rewards = torch.tensor([[1, 0], [0, 1]]).to(dtype)
    found = EMABaseline().advantage(rewards)
    assert found.dtype == expected and found.tolist() == [[0.5, -0.5], [-0.5, 0.5]]


def test_empty_rewards_change_nothing():
    baseline = EMABaseline()
    assert baseline.advantage(torch.zeros(0, 4)).shape == (0, 4)
    assert baseline.state_dict() == {}


def test_state_survives_a_restart():
    rewards = torch.rand(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, first, second = EMABaseline(), EMABaseline(), EMABaseline()
    expected = [whole.advantage(step) for step in rewards]
    found = [first.advantage(step) for step in rewards[:3]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [second.advantage(step) for step in rewards[3:]]
    assert torch.equal(torch.stack(found), torch.stack(expected))


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (TypeError, lambda: EMABaseline("high"), "decay must be a number, got str"),
        (ValueError, lambda: EMABaseline(-0.1), "decay must be at least 0, got -0.1"),
        (ValueError, lambda: EMABaseline(1.0), "decay must be below 1, got 1.0"),
        (TypeError, lambda: EMABaseline().advantage([1.0]), "rewards must be a tensor, got list"),
        (
            TypeError,
            lambda: EMABaseline().advantage(torch.tensor([True])),
            "rewards must hold real numbers, got torch.bool",
        ),
        (
            ValueError,
            lambda: EMABaseline().advantage(torch.tensor([torch.nan])),
            "rewards must be finite",
        ),
        (TypeError, lambda: EMABaseline().load_state_dict(1.0), "state must be a dict of numbers"),
        (
            TypeError,
            lambda: EMABaseline().load_state_dict({"solver": "1"}),
            r"state\['solver'\] must be a number, got str",
        ),
    ],
)
def test_wrong_argument_raises(error, call, message):
    with pytest.raises(error, match=message):
        call()
