"""Supervised training of a model from scratch, until GRPO has something to reward.

With random weights no completion is ever right, so that no group has a learning signal.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from reference.training.errors import UserError
from reference.training.evaluate import mean_values
from reference.training.model.policy import Policy
from reference.training.model.scorers import Scorer
from reference.training.rollout.generate import encode
from reference.training.tasks.tasks import Question, Task
from reference.training.update.micro_batches import MicroBatch

BATCH = 128
LEARNING_RATE = 3e-3
# Sampled accuracy at which GRPO takes over. A fixed number of steps overshoots, or fails for one
# seed in four. The check is frequent because the accuracy rises by about 2 points a step.
TARGET = 0.45
CHECK_EVERY = 4
MAX_STEPS = 3000


def warm_start(policy: Policy, scorer: Scorer, task: Task, order: random.Random) -> int:
    """Train on ground truths until `TARGET` of the completions are right; return the steps."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=LEARNING_RATE)
    for step in range(1, MAX_STEPS + 1):
        optimizer.zero_grad()
        cross_entropy(policy, scorer, order.sample(task.train, BATCH)).backward()
        optimizer.step()
        if step % CHECK_EVERY == 0:
            questions = order.sample(task.train, 256)
            if mean_values(policy, questions, 1, 1.0, task.accuracy)["lenient"] >= TARGET:
                return step
    raise UserError(f"the warm start did not reach {TARGET:.0%} in {MAX_STEPS} supervised steps")


def cross_entropy(policy: Policy, scorer: Scorer, questions: list[Question]) -> Tensor:
    """Mean cross-entropy of the ground truths and their end tokens; all have the same length."""
    prompts = encode(policy.tokenizer, [question.prompt for question in questions], policy.device)
    end = policy.tokenizer.eos_token
    rows = [policy.tokenizer.encode(f"{question.answer}{end}") for question in questions]
    answers = torch.tensor(rows, device=policy.device)
    mask = torch.ones_like(answers, dtype=torch.bool)
    return -scorer.token_stats(policy, MicroBatch(prompts, answers, mask, mask)).logprob.mean()
