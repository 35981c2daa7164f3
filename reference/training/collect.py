"""What a step learns from: questions, groups of sampled answers, their rewards.

Sizes: B questions, G answers to each, in rows b·G + g.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce

import torch
from torch import Tensor

from reference.training.config import TrainConfig
from reference.training.distributed import ALONE, moved
from reference.training.model.policy import Policy, SampledCompletions
from reference.training.rollout.generate import Completions, Prompts
from reference.training.rollout.samplers import Sampler
from reference.training.tasks.rewards import score
from reference.training.tasks.tasks import Question, Task


@dataclass(frozen=True)
class Experience:
    """Groups of answers, with each reward function's values, unweighted, [B·G]."""

    questions: list[Question]
    answers: SampledCompletions
    by_name: dict[str, Tensor]
    rewards: Tensor  # [B, G], the weighted sum
    has_signal: Tensor  # [B], whether there is something to learn from a group
    accuracy: dict[str, Tensor]  # [B·G], "strict" and "lenient", 0 or 1
    sampled: int  # tokens, those of discarded groups too
    seen: int  # the same with a prompt for each answer

    def at(self, groups: Sequence[int]) -> Experience:
        """Only these groups."""
        G = self.rewards.shape[1]
        rows = [b * G + g for b in groups for g in range(G)]
        done = self.answers.completions
        completions = Completions(
            *(x[rows] for x in (done.tokens, done.mask, done.logprob, done.finished))
        )
        texts = [self.answers.texts[row] for row in rows]
        return replace(
            self,
            questions=[self.questions[b] for b in groups],
            answers=SampledCompletions(self.answers.prompts[groups], completions, texts),
            by_name={name: values[rows] for name, values in self.by_name.items()},
            rewards=self.rewards[groups],
            has_signal=self.has_signal[groups],
            accuracy={name: values[rows] for name, values in self.accuracy.items()},
        )


def gather(
    policy: Policy, task: Task, sampler: Sampler, order: random.Random, config: TrainConfig
) -> Experience:
    """Sample groups for `config.prompts` questions.

    With --dynamic-sampling, groups whose rewards are all equal are asked anew with other questions
    until all have a signal or the rounds are over; the ones without one then fill up the batch, so
    that every batch has the same size.
    """
    with policy.ranks.whole(policy.model):
        return _gather(policy, task, sampler, order, config)


def _gather(
    policy: Policy, task: Task, sampler: Sampler, order: random.Random, config: TrainConfig
) -> Experience:
    asked = draw(task.train, config.prompts, order)
    found = answer(policy, task, sampler, asked, config)
    for _ in range(config.dynamic_sampling):
        kept = found.has_signal.nonzero().flatten().tolist()
        missing = config.prompts - len(kept)
        if missing == 0:
            break
        fresh = answer(policy, task, sampler, draw(task.train, missing, order), config)
        found = joined(found.at(kept), fresh, policy.tokenizer.pad_token_id)
    return found


def draw(questions: list[Question], n: int, order: random.Random) -> list[Question]:
    """n of them, none twice before each has come up: a single question makes a batch too."""
    whole, rest = divmod(n, len(questions))
    return questions * whole + order.sample(questions, rest)


def answer(
    policy: Policy, task: Task, sampler: Sampler, questions: list[Question], config: TrainConfig
) -> Experience:
    """Sample and reward `config.group_size` answers to each question.

    Each rank answers its share; where there are fewer questions than ranks, everyone answers all.
    """
    ranks = policy.ranks
    if len(questions) < ranks.size:
        alone = replace(policy, ranks=ALONE)
        found = ranks.told(_answer(alone, task, sampler, questions, config))
    else:
        own = _answer(policy, task, sampler, ranks.share(questions), config)
        join = partial(joined, pad_id=policy.tokenizer.pad_token_id)
        found = reduce(join, ranks.gathered(own))
    return replace(found, answers=moved(found.answers, policy.device))


def _answer(
    policy: Policy, task: Task, sampler: Sampler, questions: list[Question], config: TrainConfig
) -> Experience:
    G = config.group_size
    answers = policy.sample(questions, G, config.temperature, sampler)
    repeated = [question for question in questions for _ in range(G)]
    batch = ([q.text for q in repeated], answers.texts, [q.answer for q in repeated])
    by_name = score(task.rewards, *batch)
    total = sum(each.weight * by_name[name] for name, each in task.rewards.items())
    completions = answers.completions
    if config.overlong_buffer:
        by_name["overlong"] = overlong_penalty(completions.mask, config)
        total = total + by_name["overlong"]
    accuracy = {
        "strict": torch.tensor(task.strict(*batch)),
        "lenient": torch.tensor(task.lenient(*batch)),
    }
    rewards = total.view(-1, G)
    has_signal = rewards.ne(rewards[:, :1]).any(dim=-1)
    if config.mask_truncated:  # an answer that was cut off teaches nothing
        has_signal &= completions.finished.view(-1, G).any(dim=-1).cpu()
    sampled = int(completions.mask.sum())
    seen = sampled + int(answers.prompts.mask.sum()) * G
    return Experience(questions, answers, by_name, rewards, has_signal, accuracy, sampled, seen)


def overlong_penalty(mask: Tensor, config: TrainConfig) -> Tensor:
    """[B·G], from 0 down to -1 over the last tokens before the limit (arXiv:2503.14476)."""
    free = config.max_new_tokens - config.overlong_buffer
    excess = mask.sum(-1).cpu() - free
    return -(excess / config.overlong_buffer).clamp(0.0, 1.0)


def joined(first: Experience, second: Experience, pad_id: int) -> Experience:
    """The groups of both; prompts are padded on the left, completions on the right."""
    answers = (first.answers, second.answers)
    prompts = [each.prompts for each in answers]
    completions = [each.completions for each in answers]
    return Experience(
        first.questions + second.questions,
        SampledCompletions(
            Prompts(
                _padded([each.ids for each in prompts], pad_id, left=True),
                _padded([each.mask for each in prompts], False, left=True),
            ),
            Completions(
                _padded([each.tokens for each in completions], pad_id),
                _padded([each.mask for each in completions], False),
                _padded([each.logprob for each in completions], 0.0),
                torch.cat([each.finished for each in completions]),
            ),
            first.answers.texts + second.answers.texts,
        ),
        {n: torch.cat([first.by_name[n], second.by_name[n]]) for n in first.by_name},
        torch.cat([first.rewards, second.rewards]),
        torch.cat([first.has_signal, second.has_signal]),
        {n: torch.cat([first.accuracy[n], second.accuracy[n]]) for n in first.accuracy},
        first.sampled + second.sampled,
        first.seen + second.seen,
    )


def _padded(parts: list[Tensor], value: float, *, left: bool = False) -> Tensor:
    width = max(each.shape[1] for each in parts)
    rows = []
    for each in parts:
        missing = width - each.shape[1]
        sides = (missing, 0) if left else (0, missing)
        rows.append(torch.nn.functional.pad(each, sides, value=value))
    return torch.cat(rows)


def describe(found: Experience) -> dict[str, float]:
    """What the answers were like, under the names that TRL uses."""
    completions, rewards = found.answers.completions, found.rewards
    return {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(dim=-1).mean().item(),
        "frac_reward_zero_std": rewards.eq(rewards[:, :1]).all(-1).float().mean().item(),
        **{f"rewards/{name}/mean": x.mean().item() for name, x in found.by_name.items()},
        **{f"accuracy/{name}": x.float().mean().item() for name, x in found.accuracy.items()},
        "completions/mean_length": completions.mask.sum(-1).float().mean().item(),
        "completions/clipped_ratio": 1.0 - completions.finished.float().mean().item(),
    }


def samples(found: Experience, advantages: Tensor, groups: int = 1) -> list[dict]:
    """The answers of the first groups in words, for a person to read."""
    G, per_answer = found.rewards.shape[1], advantages
    if advantages.dim() == 2:
        mask = found.answers.completions.mask.cpu()
        per_answer = torch.where(mask, advantages, 0.0).sum(-1) / mask.sum(-1)
    return [
        {
            "question": found.questions[row // G].text,
            "answer": found.questions[row // G].answer,
            "completion": found.answers.texts[row],
            "reward": found.rewards.flatten()[row].item(),
            "rewards": {name: values[row].item() for name, values in found.by_name.items()},
            "advantage": per_answer[row].item(),
        }
        for row in range(min(groups, len(found.questions)) * G)
    ]
