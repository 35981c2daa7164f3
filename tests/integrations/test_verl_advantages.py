"""The estimators for verl, with groups of any sizes, match numbers by hand."""

import statistics
from types import SimpleNamespace

import pytest
import torch

from grpo_kernels.integrations.verl_advantages import ESTIMATORS

# Completions of the prompts a (three), b (two) and c (one), in any order; tokens 3, 1, 2, 2, 1, 3.
INDEX = ["b", "a", "c", "a", "b", "a"]
REWARDS = [1.0, 1.0, 5.0, 0.0, 2.0, 4.0]
MASK = torch.tensor(
    [[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 1, 1], [1, 0, 0], [1, 1, 1]], dtype=torch.float64
)
LENGTHS = [3, 1, 2, 2, 1, 3]


def estimate(name, **keywords):
    """Give each reward to the last token of its completion, as verl does."""
    rewards = torch.zeros_like(MASK)
    for row, reward in enumerate(REWARDS):
        rewards[row, MASK[row].nonzero().max()] = reward
    advantages, _ = ESTIMATORS[name](
        token_level_rewards=rewards, response_mask=MASK, index=INDEX, **keywords
    )
    return advantages


def whitened(tokens):
    """Normalise the unmasked tokens [6, 3], of which there are 12."""
    values = tokens[MASK > 0].tolist()
    return (tokens - statistics.mean(values)) / statistics.stdev(values) * MASK


STD_A, STD_B = statistics.stdev([1, 0, 4]), statistics.stdev([1, 2])
STDS = [STD_B, STD_A, 1, STD_A, STD_B, STD_A]
CENTRED = [-0.5, 1 - 5 / 3, 5.0, -5 / 3, 0.5, 4 - 5 / 3]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("centered", CENTRED),
        ("group", [x / s for x, s in zip(CENTRED, STDS, strict=True)]),
        ("leave_one_out", [-1.0, -1.0, 5.0, -2.5, 1.0, 3.5]),
        # The means by length are (1·1 + 0·2 + 4·3) / 6 = 13/6 and (1·3 + 2·1) / 4 = 5/4.
        ("opo", [-0.25, 1 - 13 / 6, 5.0, -13 / 6, 0.75, 4 - 13 / 6]),
    ],
)
def test_group_estimators(name, expected):
    expected = torch.tensor(expected, dtype=torch.float64)[:, None] * MASK
    torch.testing.assert_close(estimate(name), expected)


def test_reinforce_plus_plus():
    rewards = torch.tensor(REWARDS, dtype=torch.float64)[:, None].expand(6, 3)
    found = estimate("reinforce_plus_plus", config=SimpleNamespace(gamma=1.0))
    torch.testing.assert_close(found, whitened(rewards))
    # A token that is n before the last one is discounted n times.
    distance = torch.tensor([[2, 1, 0], [0, 0, 0], [1, 0, 0], [2, 1, 0], [0, 0, 0], [2, 1, 0]])
    found = estimate("reinforce_plus_plus", config=SimpleNamespace(gamma=0.5))
    torch.testing.assert_close(found, whitened(rewards * 0.5**distance))


def test_reinforce_plus_plus_with_baseline():
    centred = torch.tensor(CENTRED, dtype=torch.float64)[:, None].expand(6, 3)
    torch.testing.assert_close(estimate("reinforce_plus_plus_baseline"), whitened(centred))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_no_gradient(name):
    rewards = MASK.clone().requires_grad_()
    inputs = {"token_level_rewards": rewards, "response_mask": MASK, "index": INDEX}
    found = ESTIMATORS[name](**inputs, config=SimpleNamespace(gamma=0.5))
    assert [x.requires_grad for x in found] == [False, False]
