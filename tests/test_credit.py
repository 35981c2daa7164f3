"""Advantages: of answers, and of tokens under process supervision."""

import pytest
import torch

import reference
from reference.config import TrainConfig
from reference.credit import advantages_of, process_advantage
from reference.errors import UserError
from reference.experience import Experience
from reference.policy import Answers
from reference.rollout import Completions, Prompts
from reference.tasks import Question

WORDS = {1: "a", 2: "bb", 3: " c", 4: "d"}


def decode(ids):
    return "".join(WORDS[i] for i in ids)


def experience(rewards, rows):
    """One question per row of rewards; an answer is a list of token ids."""
    T = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (T - len(row)) for row in rows])
    mask = tokens != 0
    done = Completions(tokens, mask, torch.zeros(mask.shape), torch.ones(len(rows)).bool())
    questions = [Question("?", "!")] * len(rewards)
    empty = torch.zeros(len(rewards), 1).long()
    answers = Answers(Prompts(empty, empty == 0), done, [decode(row) for row in rows])
    rewards = torch.tensor(rewards)
    has_signal = rewards.ne(rewards[:, :1]).any(-1)
    return Experience(questions, answers, {}, rewards, has_signal, {}, int(mask.sum()), 0)


def test_outcome_advantages_are_the_group_s_and_dr_grpo_keeps_the_scale():
    found = experience([[1.0, 0.0], [2.0, 2.0]], [[1], [2], [3], [4]])
    ours = advantages_of(found, TrainConfig(), reference, None, decode)
    assert torch.allclose(ours, torch.tensor([0.5**0.5, -(0.5**0.5), 0, 0]))
    ours = advantages_of(found, TrainConfig(loss="dr_grpo"), reference, None, decode)
    assert ours.tolist() == [0.5, -0.5, 0.0, 0.0]


def test_equal_rewards_have_no_advantage_whatever_their_rounding():
    found = experience([[1.2] * 8], [[1]] * 8)
    for loss in ("grpo", "dr_grpo"):
        ours = advantages_of(found, TrainConfig(loss=loss), reference, None, decode)
        assert (ours == 0).all()


def test_a_step_s_reward_reaches_its_tokens_and_those_before_it():
    """Rewards 0, 1, 2 of a group: normalised -1, 0, 1."""
    mask = torch.tensor([[True, True, True], [True, True, False]])
    found = process_advantage([[(0, 0.0), (2, 2.0)], [(1, 1.0)]], mask, group_size=2)
    assert torch.allclose(found, torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]), atol=1e-6)


def test_equal_or_missing_steps_have_no_advantage():
    mask = torch.ones(4, 2, dtype=torch.bool)
    assert (process_advantage([[(0, 1.0)], [(1, 1.0)], [], [(0, 5.0)]], mask, 2) == 0).all()


def test_steps_in_characters_end_in_the_token_that_holds_the_character():
    def rewards(prompts, completions, answers):
        assert completions == ["abb c", "d"] and answers == ["!", "!"]
        return [[(2, 0.0), (5, 2.0)], [(1, 1.0)]]

    found = experience([[1.0, 1.0]], [[1, 2, 3], [4]])
    ours = advantages_of(found, TrainConfig(), reference, rewards, decode)
    # Character 2 lies in "bb", the second token.
    assert torch.allclose(ours, torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), atol=1e-6)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([[(9, 1.0)], []], r"the step \(9, 1.0\) for 'abb'"),
        ([[(0, 1.0)], []], "must end in 1 to 3"),
        ([[(1, float("nan"))], []], "finite reward"),
        ([[]], "1 lists of steps for 2 completions"),
        ([None, []], "raised TypeError, or gave no lists"),
        ([[3.0], []], "raised TypeError, or gave no lists"),
    ],
)
def test_a_wrong_step_is_named(steps, said):
    found = experience([[1.0, 1.0]], [[1, 2], [4]])
    with pytest.raises(UserError, match=said):
        advantages_of(found, TrainConfig(), reference, lambda *_: steps, decode)
