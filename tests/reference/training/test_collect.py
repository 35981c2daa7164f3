"""Rollouts: signal, dynamic sampling, the overlong penalty, metrics."""

import random
from dataclasses import replace

import pytest
import torch

from grpo_kernels import TokenSupport
from reference.training import collect
from reference.training.config import TrainConfig
from reference.training.distributed import SINGLE_PROCESS
from reference.training.model.policy import SampledCompletions
from reference.training.rollout.generate import Completions, Prompts
from reference.training.rollout.samplers import SharedPrompt
from reference.training.tasks.questions import Question
from reference.training.tasks.rewards import WeightedReward
from reference.training.tasks.tasks import Task

G = 2


class ScriptedPolicy:
    """A policy whose completions of question k are k and, if k is odd, 0; their widths vary."""

    model, ranks, device = None, SINGLE_PROCESS, torch.device("cpu")

    class tokenizer:
        pad_token_id = 99

    def __init__(self):
        self.rounds = []

    def sample(self, questions, group_size, temperature, sampler):
        self.rounds.append([question.text for question in questions])
        width = 1 + len(self.rounds)
        numbers = [int(q.text) if g == 0 or int(q.text) % 2 == 0 else 0
                   for q in questions for g in range(group_size)]  # fmt: skip
        mask = torch.zeros(len(numbers), width, dtype=torch.bool)
        mask[:, :width] = True
        done = Completions(
            torch.tensor(numbers)[:, None].expand(-1, width),
            mask,
            torch.full(mask.shape, -0.5),
            torch.ones(len(numbers), dtype=torch.bool),
            # The first token of completion n was drawn among n ids, the others among all.
            TokenSupport.from_lists(
                [range(n) if t == 0 else [] for n in numbers for t in range(width)]
            ),
        )
        ids = torch.tensor([int(q.text) for q in questions])[:, None].expand(-1, width)
        return SampledCompletions(
            Prompts(ids, torch.ones_like(ids) > 0), done, [str(n) for n in numbers]
        )


def equal(prompts, completions, answers):
    return [float(c == a) for c, a in zip(completions, answers, strict=True)]


def task(numbers, function=equal):
    questions = [Question(str(n), str(n)) for n in numbers]
    rewards = {"equal": WeightedReward(function, 2.0)}
    return Task(questions, questions, rewards, equal, equal)


def collect_from(numbers, function=equal, **changes):
    config = TrainConfig(group_size=G, **{"prompts": 4, **changes})
    policy, made = ScriptedPolicy(), task(numbers, function)
    return policy, collect.collect_rollouts(policy, made, SharedPrompt(), random.Random(0), config)


def test_rewards_are_weighted_and_logged_by_name():
    _, found = collect_from([1, 2, 3, 4])
    assert found.rewards.shape == (4, G)
    assert torch.equal(found.rewards.flatten(), 2 * found.rewards_by_name["equal"])
    odd = torch.tensor([int(q.text) % 2 == 1 for q in found.questions])
    assert torch.equal(found.has_signal, odd)
    row = collect.rollout_metrics(found)
    assert row["frac_reward_zero_std"] == 0.5 and row["rewards/equal/mean"] == 0.75
    assert row["reward"] == 1.5 and row["accuracy/lenient"] == 0.75


def test_reward_that_applies_to_no_completion_is_missing():
    def only_zero(prompts, completions):
        """Apply to the second completion of odd questions."""
        return [float(p) if c == "0" else None for p, c in zip(prompts, completions, strict=True)]

    _, found = collect_from([1, 2, 3, 4], only_zero)
    odd = torch.tensor([[int(q.text) % 2 == 1] for q in found.questions])
    assert torch.equal(found.rewards.isnan(), ~(odd & torch.tensor([False, True])))
    assert not found.has_signal.any()
    row = collect.rollout_metrics(found)
    assert row["rewards/equal/mean"] == 2.0 and row["reward"] == 4.0 and row["reward_std"] == 0.0
    advantages = torch.zeros(8)
    rewards = [x["rewards"]["equal"] for x in collect.examples(found, advantages, groups=4)]
    assert sorted(rewards, key=str) == [1.0, 3.0, *[None] * 6]


def test_completions_without_any_reward_are_reported_once(capsys):
    collect._warn_of_missing_rewards.cache_clear()
    for _ in range(2):
        collect_from([1, 2, 3, 4], lambda completions: [None] * len(completions))
    assert capsys.readouterr().err.count("no reward applies to some completions") == 1


def test_missing_rewards_become_the_mean_of_their_group():
    nan = torch.nan
    rewards = torch.tensor([[0.1, nan, 0.1, 0.1], [1.0, nan, 4.0, nan], [nan, nan, nan, nan]])
    expected = torch.tensor([[0.1] * 4, [1.0, 2.5, 4.0, 2.5], [0.0] * 4])
    assert torch.equal(collect.replace_missing(rewards), expected)


def test_without_dynamic_sampling_there_is_one_round():
    policy, found = collect_from([2, 4, 6, 8])
    assert len(policy.rounds) == 1 and not found.has_signal.any()


def test_dynamic_sampling_replaces_groups_without_signal():
    policy, found = collect_from([*range(2, 40, 2), 1, 3, 5, 7], dynamic_sampling=500)
    assert found.has_signal.all() and len(found.questions) == 4
    sizes = [len(asked) for asked in policy.rounds]
    assert sizes[0] == 4 and sizes == sorted(sizes, reverse=True)
    # Completions stay with their question after padding.
    done = found.samples.completions
    for b, question in enumerate(found.questions):
        row = b * G
        assert found.samples.texts[row] == question.text
        assert set(done.tokens[row][done.mask[row]].tolist()) == {int(question.text)}
        prompts = found.samples.prompts
        assert set(prompts.ids[b][prompts.mask[b]].tolist()) == {int(question.text)}
        assert prompts.mask[b, -1] and done.mask[row, 0]
    lengths = done.support.lengths.view(done.tokens.shape)
    assert torch.equal(lengths[:, 0], done.tokens[:, 0]) and not lengths[:, 1:].any()
    assert done.support.token_ids.tolist() == [i for n in done.tokens[:, 0] for i in range(n)]
    assert found.num_sampled_tokens > done.mask.sum(), "discarded tokens are counted"


def test_dynamic_sampling_rounds_are_bounded():
    policy, found = collect_from([2, 4, 6, 8], dynamic_sampling=3)
    assert len(policy.rounds) == 4 and len(found.questions) == 4


def test_overlong_penalty_is_linear():
    config = TrainConfig(max_new_tokens=8, overlong_buffer=4)
    mask = torch.arange(8)[None] < torch.tensor([1, 4, 5, 6, 8])[:, None]
    penalty = collect.overlong_penalty(mask, config)
    assert penalty.tolist() == [0.0, 0.0, -0.25, -0.5, -1.0]


def test_overlong_penalty_is_part_of_the_reward():
    _, found = collect_from([1, 2, 3, 4], max_new_tokens=2, overlong_buffer=1)
    assert (found.rewards_by_name["overlong"] == -1).all()
    assert collect.rollout_metrics(found)["reward"] == 0.5


def test_examples_are_the_first_group_as_text():
    _, found = collect_from([1, 3, 5, 7])
    first, second = collect.examples(found, torch.arange(8.0))
    assert first["completion"] == first["question"] == first["answer"]
    assert second["completion"] == "0" and second["rewards"] == {"equal": 0.0}
    assert (first["advantage"], second["advantage"]) == (0.0, 1.0)
    (_, of_tokens) = collect.examples(found, torch.arange(16.0).view(8, 2))
    assert of_tokens["advantage"] == pytest.approx(2.5)
    assert (first["reward"], second["reward"]) == (2.0, 0.0)


def test_example_advantage_is_a_mean_over_unmasked_tokens():
    _, found = collect_from([1, 3, 5, 7])
    done = found.samples.completions
    mask = done.mask.clone()
    mask[:, 1] = False
    found = replace(found, samples=replace(found.samples, completions=replace(done, mask=mask)))
    (first, _) = collect.examples(found, torch.tensor([[1.5, 9.0]] * 8))
    assert first["advantage"] == 1.5


def test_group_of_truncated_completions_has_no_signal(monkeypatch):
    _, found = collect_from([1, 3, 5, 7], mask_truncated=True)
    assert found.has_signal.all()
    sample = ScriptedPolicy.sample

    def cut_off(self, *arguments):
        answers = sample(self, *arguments)
        finished = torch.zeros_like(answers.completions.finished)
        return replace(answers, completions=replace(answers.completions, finished=finished))

    monkeypatch.setattr(ScriptedPolicy, "sample", cut_off)
    _, found = collect_from([1, 3, 5, 7], mask_truncated=True)
    assert not found.has_signal.any()


def test_questions_repeat_only_after_all_were_drawn():
    one, two, three = (Question(str(n), str(n)) for n in range(3))
    assert collect.sample_questions([one], 4, random.Random(0)) == [one] * 4
    drawn = collect.sample_questions([one, two, three], 5, random.Random(0))
    assert {drawn.count(question) for question in (one, two, three)} == {1, 2}
