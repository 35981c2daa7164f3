"""The rollouts of a step: sampled questions, groups of completions, and their rewards.

Sizes: B questions, G completions per question, in rows b·G + g.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial, reduce
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import TokenSupport
from reference.training.config import TrainConfig
from reference.training.distributed import SINGLE_PROCESS, to_device
from reference.training.model.policy import Policy, SampledCompletions
from reference.training.rollout.generate import Completions, Prompts, number_tokens
from reference.training.rollout.sampler import Sampler
from reference.training.tasks.questions import Question
from reference.training.tasks.rewards import score, total_reward
from reference.training.tasks.tasks import Task


@dataclass(frozen=True)
class Rollouts:
    """Groups of completions and their rewards."""

    questions: list[Question]
    samples: SampledCompletions
    rewards_by_name: dict[str, Tensor]  # [B·G], unweighted, NaN where one does not apply
    rewards: Tensor  # [B, G], the weighted sum, NaN where no reward applies
    has_signal: Tensor  # [B], True if the rewards of the group differ
    accuracy: dict[str, Tensor]  # [B·G], "strict" and "lenient": 0, 1, or NaN without an answer
    num_sampled_tokens: int  # includes completions that dynamic sampling discarded
    num_tokens: int  # the same plus a prompt for each completion

    def select_groups(self, groups: Sequence[int]) -> Rollouts:
        """Return these groups only; the token counts stay."""
        G = self.rewards.shape[1]
        rows = [b * G + g for b in groups for g in range(G)]
        samples = SampledCompletions(
            self.samples.prompts[groups],
            self.samples.completions[rows],
            [self.samples.texts[row] for row in rows],
        )
        return replace(
            self,
            questions=[self.questions[b] for b in groups],
            samples=samples,
            rewards_by_name={name: values[rows] for name, values in self.rewards_by_name.items()},
            rewards=self.rewards[groups],
            has_signal=self.has_signal[groups],
            accuracy={name: values[rows] for name, values in self.accuracy.items()},
        )


def collect_rollouts(
    policy: Policy, task: Task, sampler: Sampler, order: random.Random, config: TrainConfig
) -> Rollouts:
    """Sample and reward groups of completions for `config.prompts` questions."""
    with policy.ranks.unsharded(policy.model):
        sampler.sync(policy)
        questions = sample_questions(task.train, config.prompts, order)
        rollouts = sample_completions(policy, task, sampler, questions, config)
        return replace_groups_without_signal(rollouts, policy, task, sampler, order, config)


def replace_groups_without_signal(
    rollouts: Rollouts,
    policy: Policy,
    task: Task,
    sampler: Sampler,
    order: random.Random,
    config: TrainConfig,
) -> Rollouts:
    """With --dynamic-sampling, replace groups without a signal by groups for new questions.

    This ends when all have a signal or the rounds are used up. The last groups then fill the batch:
    its size is always the same.
    """
    for _ in range(config.dynamic_sampling):
        with_signal = rollouts.has_signal.nonzero().flatten().tolist()
        missing = config.prompts - len(with_signal)
        if missing == 0:
            break
        questions = sample_questions(task.train, missing, order)
        new = sample_completions(policy, task, sampler, questions, config)
        pad_id = policy.tokenizer.pad_token_id
        rollouts = concat(rollouts.select_groups(with_signal), new, pad_id)
    return rollouts


def sample_questions(questions: list[Question], n: int, order: random.Random) -> list[Question]:
    """Draw n questions; none comes twice before each has come once."""
    repeats, rest = divmod(n, len(questions))
    return questions * repeats + order.sample(questions, rest)


def sample_completions(
    policy: Policy, task: Task, sampler: Sampler, questions: list[Question], config: TrainConfig
) -> Rollouts:
    """Sample and reward `config.group_size` completions per question.

    Each rank samples for its shard of the questions. With fewer questions than ranks, every rank
    samples for all of them and rank 0's completions are used.
    """
    ranks = policy.ranks
    if len(questions) < ranks.size:
        alone = replace(policy, ranks=SINGLE_PROCESS)
        rollouts = ranks.broadcast(_sample_on_rank(alone, task, sampler, questions, config))
    else:
        own = _sample_on_rank(policy, task, sampler, ranks.shard(questions), config)
        pad_id = policy.tokenizer.pad_token_id
        rollouts = reduce(partial(concat, pad_id=pad_id), ranks.all_gather(own))
    return replace(rollouts, samples=to_device(rollouts.samples, policy.device))


def _sample_on_rank(
    policy: Policy, task: Task, sampler: Sampler, questions: Sequence[Question], config: TrainConfig
) -> Rollouts:
    G = config.group_size
    samples = policy.sample(questions, G, config.temperature, sampler)
    completions = samples.completions

    # The rewards: a weighted sum, and the penalty on long completions.
    repeated = [question for question in questions for _ in range(G)]
    rewards_by_name = score(task.rewards, repeated, samples.texts)
    total = total_reward(task.rewards, rewards_by_name)
    if total.isnan().any():
        _warn_of_missing_rewards()
    if config.overlong_buffer:
        rewards_by_name["overlong"] = overlong_penalty(completions.mask, config)
        total = total + rewards_by_name["overlong"]
    rewards = total.view(-1, G)

    # A group has a learning signal if its rewards differ and one of its completions counts.
    compared = replace_missing(rewards)
    has_signal = compared.ne(compared[:, :1]).any(dim=-1)
    if config.mask_truncated:
        has_signal &= completions.finished.view(-1, G).any(dim=-1).cpu()
    num_sampled = int(completions.mask.sum())
    num_tokens = num_sampled + int(samples.prompts.mask.sum()) * G
    return Rollouts(
        list(questions),
        samples,
        rewards_by_name,
        rewards,
        has_signal,
        task.accuracy(repeated, samples.texts),
        num_sampled,
        num_tokens,
    )


@cache
def _warn_of_missing_rewards() -> None:
    print(
        "no reward applies to some completions, since each returned None: they have no advantage",
        file=sys.stderr,
    )


def overlong_penalty(mask: Tensor, config: TrainConfig) -> Tensor:
    """Return [B·G], from 0 down to -1 over the last tokens before the limit (arXiv:2503.14476)."""
    free = config.max_new_tokens - config.overlong_buffer
    excess = mask.sum(-1).cpu() - free
    return -(excess / config.overlong_buffer).clamp(0.0, 1.0)


def replace_missing(rewards: Tensor) -> Tensor:
    """Replace NaN in rewards [..., G] by the mean of the group's others, or 0 if all are NaN.

    The mean is taken of differences to the lowest reward: equal rewards stay exactly equal.
    """
    missing = rewards.isnan()
    lowest = torch.where(missing, torch.inf, rewards).amin(dim=-1, keepdim=True)
    mean = lowest + (rewards - lowest).nanmean(dim=-1, keepdim=True)
    mean = torch.where(missing.all(dim=-1, keepdim=True), 0.0, mean)
    return torch.where(missing, mean, rewards)


def concat(first: Rollouts, second: Rollouts, pad_id: int) -> Rollouts:
    """Concatenate groups; prompts are padded on the left, completions on the right."""
    both = (first.samples, second.samples)
    prompts = [samples.prompts for samples in both]
    completions = [samples.completions for samples in both]
    supports = [x.support for x in completions if x.support is not None]
    if supports:
        a, b = (number_tokens(x.tokens) for x in completions)
        number = _pad_and_concat([a, b + a.numel()], -1)
        supports = [TokenSupport.cat(supports).select(number)]
    samples = SampledCompletions(
        Prompts(
            _pad_and_concat([x.ids for x in prompts], pad_id, left=True),
            _pad_and_concat([x.mask for x in prompts], False, left=True),
        ),
        Completions(
            _pad_and_concat([x.tokens for x in completions], pad_id),
            _pad_and_concat([x.mask for x in completions], False),
            _pad_and_concat([x.logprob for x in completions], 0.0),
            torch.cat([x.finished for x in completions]),
            *supports,
        ),
        first.samples.texts + second.samples.texts,
    )
    by_name, accuracy = (
        {name: torch.cat([values, b[name]]) for name, values in a.items()}
        for a, b in (
            (first.rewards_by_name, second.rewards_by_name),
            (first.accuracy, second.accuracy),
        )
    )
    return Rollouts(
        first.questions + second.questions,
        samples,
        by_name,
        torch.cat([first.rewards, second.rewards]),
        torch.cat([first.has_signal, second.has_signal]),
        accuracy,
        first.num_sampled_tokens + second.num_sampled_tokens,
        first.num_tokens + second.num_tokens,
    )


def _pad_and_concat(tensors: list[Tensor], value: float, *, left: bool = False) -> Tensor:
    width = max(x.shape[1] for x in tensors)
    rows = []
    for x in tensors:
        missing = width - x.shape[1]
        sides = (missing, 0) if left else (0, missing)
        rows.append(torch.nn.functional.pad(x, sides, value=value))
    return torch.cat(rows)


def rollout_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Return the metrics of sampled completions, under the names that TRL uses."""
    completions, by_name = rollouts.samples.completions, rollouts.rewards_by_name
    rewards = replace_missing(rollouts.rewards)
    spread = {}
    if rewards.shape[1] > 1:  # one completion has none
        spread = {
            "reward_std": rewards.std(dim=-1).mean().item(),
            "frac_reward_zero_std": rewards.eq(rewards[:, :1]).all(-1).float().mean().item(),
        }
    return {
        "reward": rollouts.rewards.nanmean().item(),
        **spread,
        **{f"rewards/{name}/mean": x.nanmean().item() for name, x in by_name.items()},
        **{f"accuracy/{name}": x.nanmean().item() for name, x in rollouts.accuracy.items()},
        "completions/mean_length": completions.mask.sum(-1).float().mean().item(),
        "completions/clipped_ratio": 1.0 - completions.finished.float().mean().item(),
    }


def examples(rollouts: Rollouts, advantages: Tensor, groups: int = 1) -> list[dict[str, Any]]:
    """Return the completions of the first groups as text, with rewards and mean advantages."""
    G = rollouts.rewards.shape[1]
    if advantages.dim() == 2:
        mask = rollouts.samples.completions.mask.cpu()
        advantages = torch.where(mask, advantages, 0.0).sum(-1) / mask.sum(-1)
    return [
        {
            "question": rollouts.questions[row // G].text,
            "answer": rollouts.questions[row // G].answer,
            "completion": rollouts.samples.texts[row],
            "reward": rollouts.rewards.flatten()[row].item(),
            "rewards": {
                name: None if x[row].isnan() else x[row].item()
                for name, x in rollouts.rewards_by_name.items()
            },
            "advantage": advantages[row].item(),
        }
        for row in range(min(groups, len(rollouts.questions)) * G)
    ]
