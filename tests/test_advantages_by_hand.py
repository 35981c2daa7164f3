"""Advantages match their definitions, computed by hand."""

import statistics
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo_kernels
from tests.helpers import advantage_formulas

property_test = settings(max_examples=40, deadline=None)


def test_group_normalised_has_ddof_1():
    rewards = [0.0, 1.0, 3.0, 4.0]
    expected = torch.tensor([[(r - 2.0) / statistics.stdev(rewards) for r in rewards]])
    for offset in (0.0, 1e5):
        found = grpo_kernels.group_normalised_advantage(torch.tensor([rewards]) + offset)
        torch.testing.assert_close(found, expected)


def test_batch_normalised():
    rewards = torch.tensor([[0.0, 2.0], [3.0, 3.0], [5.0, -1.0]])
    expected = torch.tensor([[-1.0, 1.0], [0.0, 0.0], [3.0, -3.0]]) / statistics.stdev(
        rewards.flatten().tolist()
    )
    torch.testing.assert_close(grpo_kernels.batch_normalised_advantage(rewards), expected)
    torch.testing.assert_close(
        grpo_kernels.batch_normalised_advantage(rewards[:1]),
        grpo_kernels.group_normalised_advantage(rewards[:1]),
    )


def test_centered_leave_one_out_and_max_rl():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 4.0, 6.0]])
    cases = {
        "centered": [[0.75, -0.25, -0.25, -0.25], [-3.0, -1.0, 1.0, 3.0]],
        "leave_one_out": [[1.0, -1 / 3, -1 / 3, -1 / 3], [-4.0, -4 / 3, 4 / 3, 4.0]],
        "max_rl": [[3.0, -1.0, -1.0, -1.0], [-1.0, -1 / 3, 1 / 3, 1.0]],
    }
    for name, expected in cases.items():
        found = grpo_kernels.ADVANTAGES[name](rewards)
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_max_rl_of_negative_rewards_raises():
    with pytest.raises(ValueError, match=r"rewards must be at least 0, got -2.0"):
        grpo_kernels.max_rl_advantage(torch.tensor([[1.0, -2.0]]))


def pass_at_k_by_enumeration(rewards, k):
    def mean_gain(i):
        others = [r for j, r in enumerate(rewards) if j != i]
        return statistics.mean(
            max([rewards[i], *rest]) - max(rest) for rest in combinations(others, k - 1)
        )

    return [mean_gain(i) for i in range(len(rewards))]


@property_test
@given(rewards=st.lists(st.integers(-3, 3), min_size=2, max_size=7), data=st.data())
def test_pass_at_k_matches_enumeration(rewards, data):
    k = data.draw(st.integers(2, len(rewards)))
    found = grpo_kernels.pass_at_k_advantage(torch.tensor([rewards], dtype=torch.float64), k)
    expected = torch.tensor([pass_at_k_by_enumeration(rewards, k)], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_pass_at_group_size():
    rewards = torch.tensor([[0.0, 7.0, 3.0, 5.0], [4.0, 1.0, 4.0, 0.0]])
    expected = torch.tensor([[0.0, 2.0, 0.0, 0.0], [0.0] * 4])
    assert torch.equal(grpo_kernels.pass_at_k_advantage(rewards, 4), expected)


def test_pass_at_k_of_large_group_in_fp32():
    rewards = torch.rand(1, 128, generator=torch.Generator().manual_seed(0))
    for k in (2, 16, 127):
        found = grpo_kernels.pass_at_k_advantage(rewards, k)
        expected = advantage_formulas.pass_at_k_advantage(rewards.double(), k)
        assert (found - expected).abs().max() <= 1e-5 * expected.max()


@pytest.mark.parametrize(
    ("error", "k", "message"),
    [
        (ValueError, 1, r"k must lie in \[2, 4\], where 4 is the size of a group, got 1"),
        (ValueError, 5, r"k must lie in \[2, 4\]"),
        (TypeError, 2.0, "k must be an integer, got float"),
        (TypeError, True, "k must be an integer, got bool"),
    ],
)
def test_wrong_k_raises(error, k, message):
    with pytest.raises(error, match=message):
        grpo_kernels.pass_at_k_advantage(torch.rand(2, 4), k)


def random_rewards(seed, rewards=3, prompts=4, group=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rewards, prompts, group, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("weights", [None, [2.0, -1.0, 0.5], torch.tensor([2.0, -1.0, 0.5])])
def test_weighted_reward(weights):
    rewards = random_rewards(0)
    w = [1.0, 1.0, 1.0] if weights is None else [2.0, -1.0, 0.5]
    expected = w[0] * rewards[0] + w[1] * rewards[1] + w[2] * rewards[2]
    torch.testing.assert_close(grpo_kernels.weighted_reward(rewards, weights), expected)


@property_test
@given(seed=st.integers(0, 2**31), weights=st.none() | st.just([2.0, -1.0, 0.5]))
def test_multi_reward(seed, weights):
    rewards = random_rewards(seed)
    normalised = (rewards - rewards.mean(-1, keepdim=True)) / rewards.std(-1, keepdim=True)
    total = (torch.tensor(weights or [1.0] * 3)[:, None, None] * normalised).sum(0)
    expected = (total - total.mean()) / total.std()
    found = grpo_kernels.multi_reward_advantage(rewards, weights)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    # The scale and the offset of each reward have no effect.
    scaled = rewards * torch.tensor([100.0, 1.0, 0.01])[:, None, None] + 3
    torch.testing.assert_close(grpo_kernels.multi_reward_advantage(scaled, weights), expected)


def test_multi_reward_differs_from_weighted_sum():
    """The sums are (1, 0) and (2, 0); in group 2 both rewards prefer the first completion."""
    rewards = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]])
    found = grpo_kernels.multi_reward_advantage(rewards)
    torch.testing.assert_close(found[1], 2 * found[0])
    summed_first = grpo_kernels.group_normalised_advantage(grpo_kernels.weighted_reward(rewards))
    torch.testing.assert_close(summed_first[1], summed_first[0])


def test_multi_reward_does_not_amplify_rounding():
    rewards = torch.tensor([[[1.0, 1.0, 1.0]], [[0.1, 0.2, 0.4]]])
    rewards[0, 0, 0] += 2**-23
    found = grpo_kernels.multi_reward_advantage(rewards)
    torch.testing.assert_close(
        found, grpo_kernels.multi_reward_advantage(rewards[1:]), rtol=0, atol=0
    )
    assert (grpo_kernels.multi_reward_advantage(rewards[:1]) == 0).all()
    cancelling = torch.stack([rewards[1], 3 * rewards[1]])
    assert grpo_kernels.multi_reward_advantage(cancelling, [1.0, -1.0]).abs().max() < 1 / 4


@pytest.mark.parametrize("function", ["weighted_reward", "multi_reward_advantage"])
@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, (torch.ones(2, 3),), r"rewards must be \[K, B, G\], got shape \(2, 3\)"),
        (ValueError, (torch.ones(0, 1, 2),), "rewards must hold at least 1 reward"),
        (ValueError, (torch.ones(2, 1, 2), [1.0]), "weights must be 2 numbers, one per reward"),
        (TypeError, (torch.ones(2, 1, 2), ["a", 1]), r"weights\[0\] must be a number, got str"),
        (TypeError, (torch.ones(2, 1, 2), 3.0), "weights must be a tensor or a sequence"),
        (ValueError, (torch.ones(2, 1, 2), torch.ones(3)), r"weights must have shape \(2,\)"),
        (ValueError, (torch.ones(1, 1, 2), torch.tensor([torch.nan])), "weights must be finite"),
    ],
)
def test_wrong_rewards_or_weights_raise(function, error, arguments, message):
    with pytest.raises(error, match=message):
        getattr(grpo_kernels, function)(*arguments)


def test_process_advantage():
    """The normalised rewards 0, 2, 1 are -1, 1, 0."""
    rewards = torch.tensor([[[0.0, 2.0], [1.0, torch.nan]]])
    ends = torch.tensor([[[0, 2], [1, -1]]])
    expected = torch.tensor([[[0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    found = grpo_kernels.process_advantage(rewards, ends, 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_process_advantage_of_equal_or_no_steps_is_zero():
    rewards = torch.tensor([[[0.1], [0.1], [0.1]], [[5.0], [1.0], [1.0]]])
    ends = torch.tensor([[[0], [1], [0]], [[1], [-1], [-1]]])
    assert (grpo_kernels.process_advantage(rewards, ends, 2) == 0).all()
    no_steps = grpo_kernels.process_advantage(torch.zeros(2, 3, 0), torch.zeros(2, 3, 0).long(), 4)
    assert torch.equal(no_steps, torch.zeros(2, 3, 4))


def test_process_advantage_does_not_amplify_rounding():
    rewards = torch.full((1, 2, 2), 1e6)
    rewards[0, 0, 0] = rewards[0, 0, 0].nextafter(torch.tensor(torch.inf))
    found = grpo_kernels.process_advantage(rewards, torch.tensor([[[0, 1], [0, 1]]]), 2)
    assert found.abs().max() <= 1 / 8


@property_test
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_process_advantage_matches_formula_in_any_order_of_steps(seed, B, G, S):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(B, G, S, generator=generator, dtype=torch.float64) + 100
    ends = torch.randint(-1, 6, (B, G, S), generator=generator)
    found = grpo_kernels.process_advantage(rewards.where(ends >= 0, torch.nan), ends, 6)
    expected = advantage_formulas.process_advantage(rewards, ends, 6)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    flipped = grpo_kernels.process_advantage(rewards.flip(-1), ends.flip(-1), 6)
    torch.testing.assert_close(flipped, expected, rtol=1e-10, atol=1e-12)


def test_process_advantage_compiles_fullgraph_without_device_sync():
    arguments = torch.rand(2, 3, 2), torch.randint(0, 5, (2, 3, 2)), 5
    compiled = torch.compile(grpo_kernels.process_advantage, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments), grpo_kernels.process_advantage(*arguments))
    found = grpo_kernels.process_advantage(*(x.to("meta") for x in arguments[:2]), 5)
    assert found.shape == (2, 3, 5)


ENDS = torch.zeros(1, 2, 2).long()


@pytest.mark.parametrize(
    ("error", "rewards", "ends", "length", "message"),
    [
        (ValueError, torch.ones(2, 2), ENDS, 3, r"step_rewards must be \[B, G, S\]"),
        (TypeError, torch.ones(1, 2, 2), ENDS.float(), 3, "step_ends must be int32 or int64"),
        (ValueError, torch.ones(1, 2, 3), ENDS, 3, "step_ends must have the shape of step_rew"),
        (ValueError, torch.ones(1, 2, 2), ENDS + 3, 3, r"step_ends must lie in \[0, 3\), .* got 3"),
        (ValueError, torch.ones(1, 2, 2), ENDS - 2, 3, "be -1 where there is no step, got -2"),
        (ValueError, torch.full((1, 2, 2), torch.nan), ENDS, 3, "step_rewards must be finite"),
        (TypeError, torch.ones(1, 2, 2), ENDS, 3.0, "length must be an integer, got float"),
        (ValueError, torch.ones(1, 2, 2), ENDS - 1, -1, "length must be at least 0, got -1"),
    ],
)
def test_wrong_steps_raise(error, rewards, ends, length, message):
    with pytest.raises(error, match=message):
        grpo_kernels.process_advantage(rewards, ends, length)


def test_length_weighted():
    """The weighted mean of 1, 0, 4 with lengths 1, 3, 2 is 9/6."""
    rewards, lengths = torch.tensor([[1.0, 0.0, 4.0]]), torch.tensor([[1, 3, 2]])
    for offset in (0.0, 1e5):
        found = grpo_kernels.length_weighted_advantage(rewards + offset, lengths)
        torch.testing.assert_close(found, torch.tensor([[-0.5, -1.5, 2.5]]))
    without = grpo_kernels.length_weighted_advantage(rewards, torch.zeros(1, 3))
    torch.testing.assert_close(without, torch.tensor([[1.0, 0.0, 4.0]]) - 5 / 3)
    with pytest.raises(ValueError, match="lengths must be at least 0, got -1"):
        grpo_kernels.length_weighted_advantage(rewards, lengths - 2)
    with pytest.raises(ValueError, match=r"lengths must have shape \(1, 3\), got shape \(3,\)"):
        grpo_kernels.length_weighted_advantage(rewards, lengths[0])


def test_reinforce_plus_plus():
    """Its tokens are 1, 0, 0, 0, 4, 4 and 2."""
    rewards, lengths = torch.tensor([[1.0, 0.0], [4.0, 2.0]]), torch.tensor([[1, 3], [2, 1]])
    tokens = [1, 0, 0, 0, 4, 4, 2]
    expected = (rewards - statistics.mean(tokens)) / statistics.stdev(tokens)
    for offset in (0.0, 1e5):
        found = grpo_kernels.reinforce_plus_plus_advantage(rewards + offset, lengths)
        torch.testing.assert_close(found, expected)
    for equal in (torch.full((2, 2), 0.1), torch.tensor([[1 / 3, 1 / 3]])):
        found = grpo_kernels.reinforce_plus_plus_advantage(equal, torch.ones_like(equal))
        assert not found.any()
    assert grpo_kernels.reinforce_plus_plus_advantage(rewards, lengths * 0).isfinite().all()
