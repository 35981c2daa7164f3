"""From rewards to the advantage of each answer, or of each of its tokens.

Sizes: B questions, G answers to each, T tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import grpo_kernels
from reference.training.collect import Experience
from reference.training.config import TrainConfig
from reference.training.errors import UserError
from reference.training.tasks.rewards import WeightedReward

# Like a reward, but each value is a list of (end of the step in characters, reward of the step).
StepReward = Callable[[list[str], list[str], list[str]], list[list[tuple[int, float]]]]

LARGEST = torch.finfo(torch.float32).max


def advantages_of(
    found: Experience,
    config: TrainConfig,
    rewards: Mapping[str, WeightedReward],
    step_reward: StepReward | None,
    decode: Callable,
) -> Tensor:
    """[B·G], or [B·G, T] under process supervision; in fp32.

    With process supervision the outcome's advantages and those of the steps add up.

    Args:
        rewards: the task's, for their weights.
        decode: turns a list of token ids into text.
    """
    outcome = _outcome_advantage(found, config, rewards).flatten()
    if step_reward is None:
        return outcome
    mask = found.answers.completions.mask.cpu()
    steps = _steps_in_tokens(found, step_reward, decode)
    of_steps = grpo_kernels.process_advantage(
        *_as_tensors(steps, found.rewards.shape), mask.shape[1]
    )
    return outcome[:, None] + torch.where(mask, of_steps.flatten(0, 1), 0.0)


def _outcome_advantage(
    found: Experience, config: TrainConfig, rewards: Mapping[str, WeightedReward]
) -> Tensor:
    """[B, G], the advantage that the rewards of whole answers give."""
    if config.normalise_each_reward:
        each = torch.stack([values.view_as(found.rewards) for values in found.by_name.values()])
        weights = [rewards[name].weight for name in found.by_name]
        return grpo_kernels.multi_reward_advantage(each, weights)
    name = config.advantage or ("centered" if config.loss == "dr_grpo" else "group")
    if name == "pass_at_k":
        return grpo_kernels.pass_at_k_advantage(found.rewards, config.pass_k)
    if name == "max_rl" and (found.rewards < 0).any():
        raise UserError(
            f"--advantage max_rl needs rewards of at least 0; got {found.rewards.min():g}"
        )
    return grpo_kernels.ADVANTAGES[name](found.rewards)


def _as_tensors(
    steps: list[list[tuple[int, float]]], groups: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Rewards and last tokens [B, G, S] of the steps of B·G answers; -1 where there is no step."""
    S = max(map(len, steps))
    rewards = [[reward for _, reward in row] + [0.0] * (S - len(row)) for row in steps]
    ends = [[end for end, _ in row] + [-1] * (S - len(row)) for row in steps]
    shape = (*groups, S)
    return torch.tensor(rewards).reshape(shape), torch.tensor(ends).long().reshape(shape)


def _steps_in_tokens(
    found: Experience, step_reward: StepReward, decode: Callable
) -> list[list[tuple[int, float]]]:
    """The function's steps, with characters turned into the token that they end in."""
    G = found.rewards.shape[1]
    texts, completions = found.answers.texts, found.answers.completions
    questions = [question for question in found.questions for _ in range(G)]
    inputs = ([q.text for q in questions], texts, [q.answer for q in questions])
    try:
        found_steps = [
            [(int(end), float(reward)) for end, reward in steps] for steps in step_reward(*inputs)
        ]
    except Exception as error:
        raise UserError(
            f"--step-reward raised {type(error).__name__}, or gave no lists of (end, reward): "
            f"{error}"
        ) from error
    if len(found_steps) != len(texts):
        raise UserError(
            f"--step-reward gave {len(found_steps)} lists of steps for {len(texts)} completions"
        )
    converted = []
    for row, steps in enumerate(found_steps):
        ids = completions.tokens[row][completions.mask[row]].tolist()
        ends = [len(decode(ids[: n + 1])) for n in range(len(ids))]
        for end, reward in steps:
            if not (0 < end <= len(texts[row]) and abs(reward) <= LARGEST):
                raise UserError(
                    f"--step-reward gave the step {(end, reward)} for {texts[row]!r}: it must end "
                    f"in 1 to {len(texts[row])} and have a finite reward"
                )
        converted.append(
            [(next(n for n, has in enumerate(ends) if has >= end), r) for end, r in steps]
        )
    return converted
