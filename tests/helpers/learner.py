"""A learner on a random model, completions to learn from, and their advantages."""

import copy
from dataclasses import replace

import torch

import grpo_kernels
from reference.training.config import TrainConfig
from reference.training.model.policy import Policy
from reference.training.model.scorers import PlainScorer
from reference.training.tasks.tasks import make_task
from reference.training.update.learner import Learner

PLAIN = PlainScorer()
QUESTIONS = make_task("reverse", 0).train[:4]


def make_learner(scorer=PLAIN, *, sizes=None, own_weights=None, **changes):
    """Make a learner on a random model in fp64, and four completions of each of four questions.

    Args:
        sizes: what differs from the model from scratch in a student and in its teacher.
        own_weights: a sampler that holds weights of its own.
    """
    if sizes is not None:
        changes["teacher"] = "a random model"
    settings = {"model": "scratch", "task": "reverse", "group_size": 4, "max_new_tokens": 6}
    config = TrainConfig(**settings | changes)
    torch.manual_seed(0)
    device, truncation = torch.device("cpu"), config.truncation
    policy = Policy.load(config, device, config.max_new_tokens, truncation=truncation)
    teacher = None
    if sizes is not None:
        policy, teacher = (replace(policy, model=_resized(policy.model, size)) for size in sizes)
        teacher = teacher.frozen_copy()
    policy.model.double()
    loss_config = config.loss_config()
    samples = policy.sample(QUESTIONS, 4, config.temperature)
    return Learner(policy, scorer, loss_config, config, teacher, own_weights), samples


def _resized(model, sizes):
    """Make a random model in fp64 with weights so large that predictions differ."""
    config = copy.deepcopy(model.config)
    config.update(sizes)
    resized = type(model)(config).double().eval()
    for param in resized.parameters():
        if param.dim() > 1:
            torch.nn.init.normal_(param, std=0.2)
    return resized


def gradient(learner, samples, rewards):
    learner.step(samples, advantages(rewards, learner.config.loss))
    return torch.cat([p.grad.flatten() for p in learner.policy.model.parameters()])


def advantages(rewards, loss="grpo"):
    if loss == "dr_grpo":
        return (rewards - rewards.mean(-1, keepdim=True)).flatten()
    return grpo_kernels.group_normalised_advantage(rewards).flatten()


REWARDS = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1.2], [1, 1, 1, 1]])
ADVANTAGES = advantages(REWARDS)
