"""Advantages of completions, and of tokens with process supervision."""

from dataclasses import replace

import pytest
import torch

import grpo_kernels
from reference.training.advantages import compute_advantages
from reference.training.collect import Rollouts
from reference.training.config import TrainConfig
from reference.training.errors import UserError
from reference.training.model.policy import SampledCompletions
from reference.training.rollout.generate import Completions, Prompts
from reference.training.tasks.questions import Question
from reference.training.tasks.rewards import WeightedReward

WORDS = {1: "a", 2: "bb", 3: " c", 4: "d"}


def decode(ids):
    return "".join(WORDS[i] for i in ids)


def make_rollouts(rewards, rows):
    """One question per row of rewards; `rows` are the token ids of the completions."""
    T = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (T - len(row)) for row in rows])
    mask = tokens != 0
    done = Completions(tokens, mask, torch.zeros(mask.shape), torch.ones(len(rows)).bool())
    questions = [Question("?", "!")] * len(rewards)
    empty = torch.zeros(len(rewards), 1).long()
    answers = SampledCompletions(Prompts(empty, empty == 0), done, [decode(row) for row in rows])
    rewards = torch.tensor(rewards)
    has_signal = rewards.ne(rewards[:, :1]).any(-1)
    return Rollouts(questions, answers, {}, rewards, has_signal, {}, int(mask.sum()), 0)


def advantages(rollouts, step_reward=None, rewards=None, baseline=None, **settings):
    config = TrainConfig(**settings)
    baseline = baseline or grpo_kernels.EMABaseline()
    return compute_advantages(rollouts, config, rewards or {}, step_reward, decode, baseline)


def test_default_advantage_is_group_normalised_and_centered_for_dr_grpo():
    found = make_rollouts([[1.0, 0.0], [2.0, 2.0]], [[1], [2], [3], [4]])
    assert torch.allclose(advantages(found), torch.tensor([0.5**0.5, -(0.5**0.5), 0, 0]))
    assert advantages(found, loss="dr_grpo").tolist() == [0.5, -0.5, 0.0, 0.0]


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo"])
@pytest.mark.parametrize("advantage", sorted(grpo_kernels.ADVANTAGES))
def test_advantage_flag_overrides_the_default(loss, advantage):
    found = make_rollouts([[1.0, 0.0, 4.0], [2.0, 2.0, 2.5]], [[1]] * 6)
    expected = grpo_kernels.ADVANTAGES[advantage](found.rewards).flatten()
    assert torch.allclose(advantages(found, loss=loss, advantage=advantage), expected)


def test_pass_at_k_uses_pass_k():
    found = make_rollouts([[1.0, 0.0, 4.0]], [[1]] * 3)
    assert advantages(found, advantage="pass_at_k", pass_k=3).tolist() == [0.0, 0.0, 3.0]
    assert advantages(found, advantage="pass_at_k", pass_k=2).tolist() == [0.5, 0.0, 3.5]


def test_advantages_by_length():
    found = make_rollouts([[1.0, 0.0], [4.0, 0.0]], [[1], [1, 2, 3], [1, 2, 3], [2]])
    assert advantages(found, advantage="opo").tolist() == [0.75, -0.25, 1.0, -3.0]
    ours = advantages(found, advantage="reinforce_plus_plus")
    tokens = torch.tensor([1.0, 0, 0, 0, 4, 4, 4, 0])
    expected = (found.rewards.flatten() - tokens.mean()) / tokens.std()
    torch.testing.assert_close(ours, expected)


def test_ema_subtracts_the_average_of_earlier_steps():
    baseline = grpo_kernels.EMABaseline(decay=0.5)
    keywords = {"advantage": "ema", "baseline": baseline}
    assert advantages(make_rollouts([[1.0, 3.0]], [[1]] * 2), **keywords).tolist() == [-1, 1]
    assert advantages(make_rollouts([[4.0, 4.0]], [[1]] * 2), **keywords).tolist() == [2, 2]
    assert baseline.state_dict() == {"policy": 3.0}


def test_max_rl_with_a_negative_reward_is_a_user_error():
    found = make_rollouts([[1.0, -0.25]], [[1], [2]])
    with pytest.raises(UserError, match=r"max_rl needs rewards of at least 0; got -0\.25"):
        advantages(found, advantage="max_rl")


def test_normalised_rewards_are_weighted():
    found = make_rollouts([[0.0, 0.0], [0.0, 0.0]], [[1]] * 4)
    by_name = {
        "right": torch.tensor([8.0, 0.0, 1.0, 1.0]),
        "short": torch.tensor([0.0, 0.1, 0.2, 0.1]),
        "brief": torch.tensor([0.0, 0.0, -1.0, 0.0]),
    }
    weights = {"right": 3.0, "short": 2.0, "brief": 1.0}
    rewards = {name: WeightedReward(None, weight) for name, weight in weights.items()}
    ours = advantages(
        replace(found, rewards_by_name=by_name), rewards=rewards, normalise_each_reward=True
    )
    # In each group the two answers are ±√½ apart: 3 - 2, then 2 - 1. Over the batch, std √(4/3)·√½.
    expected = torch.tensor([1.0, -1.0, 1.0, -1.0]) / (4 / 3) ** 0.5
    assert torch.allclose(ours, expected)


def test_equal_rewards_have_zero_advantage():
    found = make_rollouts([[1.2] * 8], [[1]] * 8)
    for loss in ("grpo", "dr_grpo"):
        assert (advantages(found, loss=loss) == 0).all()


@pytest.mark.parametrize("advantage", [*sorted(grpo_kernels.ADVANTAGES), "pass_at_k"])
def test_completion_without_a_reward_has_zero_advantage(advantage):
    nan = torch.nan
    found = make_rollouts(
        [[1.0, nan, 4.0, nan], [nan, nan, nan, nan], [2.0, 0.0, 1.0, 1.0]], [[1]] * 12
    )
    ours = advantages(found, advantage=advantage, group_size=4, pass_k=2).view(3, 4)
    assert (ours[0, [1, 3]] == 0).all() and (ours[1] == 0).all()
    assert ours[0, 2] > max(ours[0, 0], 0) and (advantage == "pass_at_k" or ours[0].sum() == 0)


def test_rewards_that_do_not_apply_are_not_normalised():
    nan = torch.nan
    by_name = {
        "everywhere": torch.tensor([1.0, 0.0, 0.0, 1.0]),
        "first": torch.tensor([1.0, 0.0, nan, nan]),
    }
    found = replace(make_rollouts([[0.0, 0.0]] * 2, [[1]] * 4), rewards_by_name=by_name)
    rewards = {name: WeightedReward(None) for name in by_name}
    ours = advantages(found, rewards=rewards, normalise_each_reward=True)
    assert torch.allclose(ours, torch.tensor([2.0, -2.0, -1.0, 1.0]) / (10 / 3) ** 0.5)


def test_step_reward_is_called_like_a_reward():
    def asks(completions, level):
        return [[] for _ in completions]

    found = make_rollouts([[1.0, 1.0]], [[1], [4]])
    with pytest.raises(UserError, match="--step-reward has the parameter 'level'"):
        advantages(found, asks)
    assert (advantages(found, lambda prompts, answer: [[] for _ in answer]) == 0).all()


def test_step_reward_that_exits_is_an_error():
    found = make_rollouts([[1.0, 1.0]], [[1], [4]])
    with pytest.raises(UserError, match="--step-reward raised SystemExit"):
        advantages(found, lambda completions: exit(3))


def test_step_advantages_are_added_to_the_outcome():
    found = make_rollouts([[1.0, 0.0, 0.0]], [[1, 2], [1, 2, 3], [4]])
    steps = [[(1, 1.0)], [(1, 0.0), (5, 2.0)], []]
    outcome, ours = advantages(found), advantages(found, lambda **_: steps)
    expected = outcome[:, None] + torch.tensor([[0.0, 0, 0], [0.0, 1, 1], [0.0, 0, 0]])
    assert torch.allclose(ours, expected, atol=1e-6)
    none = advantages(found, lambda **_: [[], [], []])
    assert torch.allclose(none, outcome[:, None].expand(3, 3))


def test_step_ends_in_the_token_of_its_character():
    def rewards(prompts, completions, answers):
        assert completions == ["abb c", "d"] and answers == ["!", "!"]
        return [[(2, 0.0), (5, 2.0)], [(1, 1.0)]]

    found = make_rollouts([[1.0, 1.0]], [[1, 2, 3], [4]])
    ours = advantages(found, rewards)
    # Character 2 lies in "bb", the second token.
    assert torch.allclose(ours, torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), atol=1e-6)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([[(9, 1.0)], []], r"the step \(9, 1.0\) for 'abb'"),
        ([[(0, 1.0)], []], "must end in 1 to 3"),
        ([[(1, float("nan"))], []], "finite reward"),
        ([[(1, 1e39)], []], "finite reward"),
        ([[]], "1 lists of steps for 2 completions"),
        ([None, []], "raised TypeError, or gave no lists"),
        ([[3.0], []], "raised TypeError, or gave no lists"),
    ],
)
def test_invalid_steps_are_named(steps, said):
    found = make_rollouts([[1.0, 1.0]], [[1, 2], [4]])
    with pytest.raises(UserError, match=said):
        advantages(found, lambda **_: steps)
