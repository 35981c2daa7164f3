"""The warm start of a model from scratch: supervised steps until GRPO has something to reward.

From random weights a sparse reward never starts: no answer is ever right, so no group has a signal.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from reference.training.errors import UserError
from reference.training.evaluate import accuracy
from reference.training.model.policy import Policy
from reference.training.rollout.generate import encode
from reference.training.tasks.tasks import Question, Task

BATCH = 128
LEARNING_RATE = 3e-3
TARGET = 0.45  # sampled accuracy; a fixed number of steps overshoots or fails for one seed in four
CHECK_EVERY = 20
MOST_STEPS = 3000


def warm_start(policy: Policy, task: Task, order: random.Random) -> int:
    """Teach right answers until `TARGET` of the sampled ones are right; returns the steps taken."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=LEARNING_RATE)
    for step in range(1, MOST_STEPS + 1):
        optimizer.zero_grad()
        answer_loss(policy, order.sample(task.train, BATCH)).backward()
        optimizer.step()
        if step % CHECK_EVERY == 0:
            questions = order.sample(task.train, 256)
            if accuracy(policy, task, questions, temperature=1.0)["lenient"] >= TARGET:
                return step
    raise UserError(f"the warm start did not reach {TARGET:.0%} in {MOST_STEPS} supervised steps")


def answer_loss(policy: Policy, questions: list[Question]) -> Tensor:
    """Cross-entropy of the right answers, each with its end; the answers are of one length."""
    prompts = encode(policy.tokenizer, [question.text for question in questions], policy.device)
    end = policy.tokenizer.eos_token
    rows = [policy.tokenizer.encode(question.answer + end) for question in questions]
    answers = torch.tensor(rows, device=policy.device)
    states, head = policy.hidden_states(
        prompts, answers, torch.ones_like(answers, dtype=torch.bool)
    )
    with policy.autocast():
        return -head.token_stats(states, answers, entropy=False).logprob.mean()
