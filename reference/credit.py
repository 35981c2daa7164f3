"""From rewards to the advantage of each answer, or of each of its tokens.

Sizes: B questions, G answers to each, T tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reference.config import TrainConfig
from reference.errors import UserError
from reference.experience import Experience

MIN_STD = 1e-6
# Like a reward, but each value is a list of (end of the step in characters, reward of the step).
StepReward = Callable[[list[str], list[str], list[str]], list[list[tuple[int, float]]]]


def advantages_of(
    found: Experience, config: TrainConfig, losses, step_reward: StepReward | None, decode: Callable
) -> Tensor:
    """[B·G], or [B·G, T] under process supervision; in fp32.

    Dr. GRPO leaves the standard deviation out. With process supervision the outcome's advantages
    and those of the steps add up.
    """
    if config.loss == "dr_grpo":
        rewards = found.rewards - found.rewards[:, :1]  # so that equal rewards have advantage 0
        outcome = rewards - rewards.mean(dim=-1, keepdim=True)
    else:
        outcome = losses.group_normalised_advantage(found.rewards)
    outcome = outcome.flatten()
    if step_reward is None:
        return outcome
    mask = found.answers.completions.mask.cpu()
    steps = _steps_in_tokens(found, step_reward, decode)
    return outcome[:, None] + process_advantage(steps, mask, found.rewards.shape[1])


def process_advantage(
    steps: list[list[tuple[int, float]]], mask: Tensor, group_size: int
) -> Tensor:
    """DeepSeekMath's process supervision: [B·G, T].

    Every step's reward is normalised over all steps of its group; the advantage of a token is the
    sum over the steps that end at it or after it (arXiv:2402.03300, 4.1.3).

    Args:
        steps: of each answer, (index of the step's last token, reward).
        mask: [B·G, T], True on tokens of the answer.
    """
    advantage = torch.zeros(mask.shape)
    for start in range(0, len(steps), group_size):
        group = range(start, start + group_size)
        rewards = torch.tensor([reward for row in group for _, reward in steps[row]])
        if len(rewards) < 2 or bool((rewards == rewards[0]).all()):
            continue
        mean, std = rewards.mean(), rewards.std().clamp(min=MIN_STD)
        for row in group:
            for last, reward in steps[row]:
                advantage[row, : last + 1] += (reward - mean) / std
    return torch.where(mask, advantage, 0.0)


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
            if not (0 < end <= len(texts[row]) and reward == reward and abs(reward) != torch.inf):
                raise UserError(
                    f"--step-reward gave the step {(end, reward)} for {texts[row]!r}: it must end "
                    f"in 1 to {len(texts[row])} and have a finite reward"
                )
        converted.append(
            [(next(n for n, has in enumerate(ends) if has >= end), r) for end, r in steps]
        )
    return converted
