"""Advantages of completions from their rewards, or of tokens with process supervision.

Sizes: B questions, G completions per question, T tokens and S steps per completion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import grpo_kernels
from grpo_kernels import EMABaseline
from reference.training.collect import Rollouts, replace_missing
from reference.training.config import TrainConfig
from reference.training.errors import UserError
from reference.training.tasks.questions import Question
from reference.training.tasks.rewards import WeightedReward, call, load_function
from reference.training.tasks.tasks import Task, example

Steps = list[list[tuple[int, float]]]  # per completion: (end of the step, reward of the step)
# Called like a reward; the ends of the steps that it returns are numbers of characters.
StepReward = Callable[..., Steps]

# The advantages that read the lengths of the completions.
BY_LENGTH = {
    "opo": grpo_kernels.length_weighted_advantage,
    "reinforce_plus_plus": grpo_kernels.reinforce_plus_plus_advantage,
}
LARGEST = torch.finfo(torch.float32).max


def compute_advantages(
    rollouts: Rollouts,
    config: TrainConfig,
    rewards: Mapping[str, WeightedReward],
    step_reward: StepReward | None,
    decode: Callable[[list[int]], str],
    baseline: EMABaseline,
) -> Tensor:
    """Return the advantages in fp32: [B·G], or [B·G, T] with process supervision.

    They are 0 where the loss is the divergence from a teacher alone.

    A completion to which no reward applies has an advantage of 0. The others are compared as if its
    reward were their mean, which leaves the mean of the group as it is. Process supervision adds
    the advantages of steps to that of the completion. The call updates the baseline, which is that
    of --advantage ema.
    """
    if config.distils_only:
        return torch.zeros(rollouts.rewards.numel())
    group_rewards = replace_missing(rollouts.rewards)
    name = config.advantage or ("centered" if config.loss == "dr_grpo" else "group")
    if config.normalise_each_reward:
        by_name = rollouts.rewards_by_name
        each = torch.stack([values.view_as(group_rewards) for values in by_name.values()])
        weights = [rewards[name].weight for name in by_name]
        outcome = grpo_kernels.multi_reward_advantage(replace_missing(each), weights)
    elif name == "pass_at_k":
        outcome = grpo_kernels.pass_at_k_advantage(group_rewards, config.pass_k)
    elif name in BY_LENGTH:
        lengths = rollouts.samples.completions.mask.sum(dim=-1).view_as(group_rewards)
        outcome = BY_LENGTH[name](group_rewards, lengths)
    elif name == "ema":
        outcome = baseline.advantage(group_rewards)
    elif name == "max_rl" and (group_rewards < 0).any():
        raise UserError(
            f"--advantage max_rl needs rewards of at least 0; got {group_rewards.min():g}"
        )
    else:
        outcome = grpo_kernels.ADVANTAGES[name](group_rewards)
    outcome = torch.where(rollouts.rewards.isnan(), 0.0, outcome)
    if step_reward is None:
        return outcome.flatten()
    return outcome.flatten()[:, None] + process_advantages(rollouts, step_reward, decode)


def process_advantages(
    rollouts: Rollouts, step_reward: StepReward, decode: Callable[[list[int]], str]
) -> Tensor:
    """Return the advantages [B·G, T] of the tokens, from rewards of their steps."""
    completions, G = rollouts.samples.completions, rollouts.rewards.shape[1]
    steps = []
    questions = [question for question in rollouts.questions for _ in range(G)]
    found = call_step_reward(step_reward, questions, rollouts.samples.texts)
    for row, row_steps in enumerate(found):
        # A step ends in the first token whose text, with that before it, reaches its character.
        ids = completions.tokens[row][completions.mask[row]].tolist()
        lengths = [len(decode(ids[: n + 1])) for n in range(len(ids))]
        steps.append(
            [(next(n for n, x in enumerate(lengths) if x >= end), r) for end, r in row_steps]
        )

    # An end of -1 marks a step that does not exist.
    rewards = [torch.tensor([reward for _, reward in row]) for row in steps]
    ends = [torch.tensor([end for end, _ in row]).long() for row in steps]
    padded_rewards = pad_sequence(rewards, batch_first=True)
    padded_ends = pad_sequence(ends, batch_first=True, padding_value=-1)
    mask, shape = completions.mask.cpu(), rollouts.rewards.shape
    advantages = grpo_kernels.process_advantage(
        padded_rewards.unflatten(0, shape), padded_ends.unflatten(0, shape), mask.shape[1]
    )
    return torch.where(mask, advantages.flatten(0, 1), 0.0)


def load_step_reward(config: TrainConfig, task: Task) -> StepReward | None:
    """Load --step-reward, and call it once to find mistakes."""
    if config.step_reward is None:
        return None
    step_reward = load_function(config.step_reward)
    call_step_reward(step_reward, *example(task, config.group_size))
    return step_reward


def call_step_reward(
    step_reward: StepReward, questions: Sequence[Question], texts: Sequence[str]
) -> Steps:
    """Call --step-reward and check its result; the ends of steps are in characters."""
    try:
        returned = call(step_reward, "--step-reward", questions, texts)
        steps = [[(int(end), float(reward)) for end, reward in row] for row in returned]
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"--step-reward raised {type(error).__name__}, or gave no lists of (end, reward): "
            f"{error}"
        ) from error
    if len(steps) != len(texts):
        raise UserError(
            f"--step-reward gave {len(steps)} lists of steps for {len(texts)} completions"
        )
    for text, row in zip(texts, steps, strict=True):
        for end, reward in row:
            if not (0 < end <= len(text) and abs(reward) <= LARGEST):
                raise UserError(
                    f"--step-reward gave the step {(end, reward)} for {text!r}: it must end "
                    f"in 1 to {len(text)} and have a finite reward"
                )
    return steps
