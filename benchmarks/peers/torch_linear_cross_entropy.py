"""torch.nn.functional.linear_cross_entropy."""

import torch.nn.functional as F

from benchmarks.core.problem import Problem
from benchmarks.peers.peer import Outputs, Peer, policy_loss_of, scatter_unmasked, unmasked


def linear_cross_entropy(problem: Problem) -> Outputs:
    hidden, tokens = unmasked(problem, problem.hidden), unmasked(problem, problem.tokens)
    return {"surrogate": F.linear_cross_entropy(hidden, problem.weight, tokens)}


def linear_grpo_loss(problem: Problem) -> Outputs:
    hidden, tokens = unmasked(problem, problem.hidden), unmasked(problem, problem.tokens)
    nll = F.linear_cross_entropy(hidden, problem.weight, tokens, reduction="none")
    return policy_loss_of(problem, scatter_unmasked(problem, -nll))


PEER = Peer(
    "torch linear_cross_entropy",
    {
        "linear_cross_entropy": linear_cross_entropy,
        "linear_grpo_loss": linear_grpo_loss,
        "linear_grpo_loss_frozen": linear_grpo_loss,
    },
    "no entropy; from bf16, logits and log-probs are bf16; every logit is in memory",
    "every logit, its log-prob and its gradient are written",
)
