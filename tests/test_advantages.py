"""group_normalised_advantage: against mini-GRPO's formula, and where that formula breaks."""

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from grpo_kernels.advantages import group_normalised_advantage

both = pytest.mark.parametrize(
    "advantage", [group_normalised_advantage, reference.group_normalised_advantage]
)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(2, 8), st.sampled_from([0.0, 1e4]))
def test_equals_the_reference_and_mini_grpo(seed, prompts, group, offset):
    generator = torch.Generator().manual_seed(seed)
    rewards = offset + torch.randn(prompts, group, generator=generator, dtype=torch.float64)
    ours = group_normalised_advantage(rewards)
    torch.testing.assert_close(ours, reference.group_normalised_advantage(rewards))
    mean = rewards.mean(dim=-1, keepdim=True)
    std = rewards.std(dim=-1, keepdim=True).clamp_min(1e-6)
    torch.testing.assert_close(ours, (rewards - mean) / std, rtol=1e-9, atol=1e-9)


@both
def test_by_hand_with_one_degree_of_freedom_less(advantage):
    rewards = [0.0, 1.0, 3.0, 4.0]
    expected = [(r - 2.0) / statistics.stdev(rewards) for r in rewards]
    torch.testing.assert_close(advantage(torch.tensor([rewards])), torch.tensor([expected]))


@both
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-8, 4.0, 12345.678])
@pytest.mark.parametrize("group", [2, 3, 7, 8])
def test_equal_rewards_give_exactly_zero(advantage, value, group):
    assert (advantage(torch.full((2, group), value)) == 0).all()


@both
def test_rewards_that_differ_by_rounding_stay_small(advantage):
    rewards = torch.tensor([[0.1 + 0.2, 0.3, 0.3, 0.3]]).nextafter(torch.tensor([[1.0, 0, 0, 0]]))
    assert rewards.unique().numel() > 1
    assert advantage(rewards).abs().max() < 0.1


@both
def test_a_large_common_offset_does_not_cancel(advantage):
    rewards = torch.tensor([[0.0, 1.0, 2.0, 5.0]])
    torch.testing.assert_close(advantage(rewards + 1e6), advantage(rewards))


@both
@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.float32, torch.float64])
def test_every_real_dtype_is_computed_in_fp32_or_fp64(advantage, dtype):
    result = advantage(torch.tensor([[0, 1, 1]], dtype=dtype))
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.tensor([[-2.0, 1.0, 1.0]], dtype=result.dtype) / 3**0.5
    torch.testing.assert_close(result, expected)


@both
def test_the_result_is_not_differentiable(advantage):
    assert not advantage(torch.randn(2, 3, requires_grad=True)).requires_grad


def test_compiles_to_one_graph():
    compiled = torch.compile(group_normalised_advantage, fullgraph=True, backend="eager")
    rewards = torch.randn(3, 4)
    torch.testing.assert_close(compiled(rewards), group_normalised_advantage(rewards))


@pytest.mark.parametrize(
    ("error", "rewards", "message"),
    [
        (TypeError, [[0.0, 1.0]], "rewards must be a tensor, got list"),
        (TypeError, torch.ones(2, 2).bool(), "rewards must hold real numbers, got torch.bool"),
        (ValueError, torch.ones(4), r"rewards must be \[B, G\], got shape \(4,\)"),
        (ValueError, torch.ones(4, 1), "at least 2 completions per prompt, got shape"),
        (ValueError, torch.tensor([[0.0, float("nan")]]), "rewards must be finite, got NaN"),
        (ValueError, torch.tensor([[0.0, float("inf")]]), "rewards must be finite, got NaN"),
    ],
)
def test_a_wrong_argument_is_a_clear_error(error, rewards, message):
    with pytest.raises(error, match=message):
        group_normalised_advantage(rewards)
