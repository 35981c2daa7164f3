"""A learner on a random model, completions to learn from, and their advantages."""

import torch

import grpo_kernels
from reference.training.config import TrainConfig
from reference.training.model.policy import Policy
from reference.training.model.scorers import PlainScorer
from reference.training.tasks.tasks import make_task
from reference.training.update.learner import Learner

PLAIN = PlainScorer()
QUESTIONS = make_task("reverse", 0).train[:4]


def make_learner(scorer=PLAIN, **changes):
    """Make a learner on a random model in fp64, and four completions of each of four questions."""
    config = TrainConfig(model="scratch", task="reverse", group_size=4, max_new_tokens=6, **changes)
    torch.manual_seed(0)
    device, truncation = torch.device("cpu"), config.truncation
    policy = Policy.load(config, device, config.max_new_tokens, truncation=truncation)
    policy.model.double()
    loss_config = config.loss_config()
    samples = policy.sample(QUESTIONS, 4, config.temperature)
    return Learner(policy, scorer, loss_config, config), samples


def gradient(learner, samples, rewards):
    learner.step(samples, advantages(rewards, learner.config.loss))
    return torch.cat([p.grad.flatten() for p in learner.policy.model.parameters()])


def advantages(rewards, loss="grpo"):
    if loss == "dr_grpo":
        return (rewards - rewards.mean(-1, keepdim=True)).flatten()
    return grpo_kernels.group_normalised_advantage(rewards).flatten()


REWARDS = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1.2], [1, 1, 1, 1]])
ADVANTAGES = advantages(REWARDS)
