"""Group advantages: formulas in float64, properties of every advantage, error messages."""

from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo_kernels
from tests.helpers import advantage_formulas

sizes = {"seed": st.integers(0, 2**31), "prompts": st.integers(1, 4), "group": st.integers(2, 8)}
property_test = settings(max_examples=40, deadline=None)


FUNCTIONS = {
    **grpo_kernels.ADVANTAGES,
    "pass_at_k": partial(grpo_kernels.pass_at_k_advantage, k=2),
    "multi_reward": lambda rewards: grpo_kernels.multi_reward_advantage(rewards[None]),
    "length_weighted": lambda rewards: grpo_kernels.length_weighted_advantage(
        rewards, torch.ones_like(rewards)
    ),
}
FORMULAS = {
    **{
        name: getattr(advantage_formulas, function.__name__)
        for name, function in grpo_kernels.ADVANTAGES.items()
    },
    "pass_at_k": partial(advantage_formulas.pass_at_k_advantage, k=2),
    "multi_reward": lambda rewards: advantage_formulas.multi_reward_advantage(rewards[None]),
    "length_weighted": advantage_formulas.centred_advantage,
}
NAMES = list(FUNCTIONS)
every_advantage = pytest.mark.parametrize("name", NAMES)


def random_rewards(seed, prompts, group):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(prompts, group, generator=generator, dtype=torch.float64)


@every_advantage
@property_test
@given(**sizes)
def test_matches_formula(name, seed, prompts, group):
    rewards = 10 * random_rewards(seed, prompts, group)
    expected = FORMULAS[name](rewards)
    torch.testing.assert_close(FUNCTIONS[name](rewards), expected, rtol=1e-11, atol=1e-12)
    single = FUNCTIONS[name](rewards.float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-3, atol=1e-4)


@every_advantage
@property_test
@given(**sizes)
def test_permutation_equivariant(name, seed, prompts, group):
    advantage = FUNCTIONS[name]
    rewards = random_rewards(seed, prompts, group)
    order = torch.randperm(group, generator=torch.Generator().manual_seed(seed))
    expected = advantage(rewards)
    torch.testing.assert_close(advantage(rewards[:, order]), expected[:, order])
    torch.testing.assert_close(advantage(rewards.flip(0)), expected.flip(0))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "max_rl"])
@property_test
@given(**sizes, offset=st.sampled_from([-1e4, -3.0, 0.5, 1e4]))
def test_offset_invariant(name, seed, prompts, group, offset):
    advantage = FUNCTIONS[name]
    rewards = random_rewards(seed, prompts, group)
    torch.testing.assert_close(
        advantage(rewards + offset), advantage(rewards), rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize(
    ("name", "degree"),
    [
        *((name, 0) for name in ("group", "batch", "max_rl", "multi_reward")),
        *((name, 1) for name in ("centered", "leave_one_out", "pass_at_k")),
    ],
)
@property_test
@given(**sizes, scale=st.sampled_from([0.5, 3.0, 1e4]))
def test_homogeneous_in_scale(name, degree, seed, prompts, group, scale):
    advantage = FUNCTIONS[name]
    rewards = 1 + random_rewards(seed, prompts, group)
    expected = scale**degree * advantage(rewards)
    torch.testing.assert_close(advantage(scale * rewards), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "pass_at_k"])
@property_test
@given(**sizes)
def test_group_sums_to_zero(name, seed, prompts, group):
    sums = FUNCTIONS[name](random_rewards(seed, prompts, group)).sum(-1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-12)


@every_advantage
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e-8, 4.0, 12345.678])
@pytest.mark.parametrize("group", [2, 3, 7, 8])
def test_equal_rewards_give_exactly_zero(name, value, group):
    equal = torch.full((1, group), value)
    assert (FUNCTIONS[name](equal) == 0).all()
    mixed = torch.cat([torch.arange(float(group))[None], equal])
    advantages = FUNCTIONS[name](mixed)
    assert (advantages[1] == 0).all() and (advantages[0] != 0).any()


@every_advantage
@pytest.mark.parametrize("value", [1e-3, 0.3, 1.0, 77.7, 1e6, 1e20])
@pytest.mark.parametrize("group", [2, 8])
def test_rounding_differences_stay_small(name, value, group):
    rewards = torch.full((2, group), value)
    rewards[:, 0] = rewards[:, 0].nextafter(torch.tensor(torch.inf))
    assert (rewards[:, 0] != rewards[:, 1]).all()
    largest = FUNCTIONS[name](rewards).abs().max()
    is_in_reward_units = name in ("centered", "leave_one_out", "length_weighted", "pass_at_k")
    assert largest <= (2**-22 * value if is_in_reward_units else 1 / 16)


@property_test
@given(**sizes, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_group_normalised_matches_mini_grpo_bitwise(seed, prompts, group, dtype):
    rewards = random_rewards(seed, prompts, group).to(dtype)
    shifted = rewards - rewards[:, :1]
    std = shifted.std(dim=-1, keepdim=True).clamp_min(1e-6)
    expected = (shifted - shifted.mean(dim=-1, keepdim=True)) / std
    assert torch.equal(grpo_kernels.group_normalised_advantage(rewards), expected)


@every_advantage
@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.float32, torch.float64])
def test_result_dtype(name, dtype):
    advantage = FUNCTIONS[name]
    result = advantage(torch.tensor([[0, 1, 1], [2, 4, 3]], dtype=dtype))
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = advantage(torch.tensor([[0.0, 1, 1], [2, 4, 3]], dtype=torch.float64))
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)


@every_advantage
def test_not_differentiable(name):
    assert not FUNCTIONS[name](torch.rand(2, 3, requires_grad=True)).requires_grad


@every_advantage
def test_compiles_fullgraph_without_device_sync(name):
    advantage, rewards = FUNCTIONS[name], torch.rand(3, 4)
    compiled = torch.compile(advantage, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(rewards), advantage(rewards))
    # Reading a value of a meta tensor raises; on a GPU it would be a sync.
    assert advantage(rewards.to("meta")).shape == rewards.shape


@pytest.mark.filterwarnings("ignore:std.*degrees of freedom")
@every_advantage
def test_zero_prompts(name):
    assert FUNCTIONS[name](torch.zeros(0, 4)).shape == (0, 4)


@every_advantage
@pytest.mark.parametrize(
    ("error", "rewards", "message"),
    [
        (TypeError, torch.ones(2, 2).bool(), "rewards must hold real numbers, got torch.bool"),
        (ValueError, torch.ones(4, 1), "at least 2 completions per prompt, got shape"),
        (ValueError, torch.tensor([[0.0, float("nan")]]), "rewards must be finite, got NaN"),
        (ValueError, torch.tensor([[0.0, float("inf")]]), "rewards must be finite, got NaN"),
    ],
)
def test_wrong_rewards_raise(name, error, rewards, message):
    with pytest.raises(error, match=message):
        FUNCTIONS[name](rewards)


@pytest.mark.parametrize("name", [*grpo_kernels.ADVANTAGES, "pass_at_k"])
def test_wrong_shape_or_type_raises(name):
    advantage = FUNCTIONS[name]
    with pytest.raises(ValueError, match=r"rewards must be \[B, G\], got shape \(4,\)"):
        advantage(torch.ones(4))
    with pytest.raises(TypeError, match="rewards must be a tensor, got list"):
        advantage([[0.0, 1.0]])


@pytest.mark.parametrize("k", [2, 3, 4])
def test_pass_at_k_estimates_gradient_of_expected_best_of_k(k):
    """Enumerate every group of 4 draws from 3 outcomes; 1/k is the only factor."""
    logits = torch.tensor([0.3, 1.0, -0.4], dtype=torch.float64, requires_grad=True)
    p, value = logits.softmax(0), torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)

    def expectation(n, value_of):
        draws = map(list, product(range(3), repeat=n))
        return sum(p[draw].prod() * value_of(draw) for draw in draws)

    (expected,) = torch.autograd.grad(expectation(k, lambda draw: value[draw].max()), logits)
    p = p.detach()
    scores = torch.eye(3, dtype=torch.float64) - p  # gradients of the log-prob of each outcome

    def estimate(draw):
        advantage = grpo_kernels.pass_at_k_advantage(value[draw][None], k)[0]
        return (advantage[:, None] * scores[draw]).mean(0)

    torch.testing.assert_close(k * expectation(4, estimate), expected)


@pytest.mark.parametrize("name", ["group", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_finite_rewards_have_the_advantages_of_small_ones(name, dtype):
    function = FUNCTIONS[name]
    small = torch.tensor([[1.0, -1.0, 0.5, 0.0], [0.25, 1.0, -0.5, 0.75]], dtype=dtype)
    huge = small * torch.finfo(dtype).max
    torch.testing.assert_close(function(huge), function(small))
