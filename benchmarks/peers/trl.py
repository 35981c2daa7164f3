"""TRL's functions for log-probs, entropies and KLs."""

from functools import partial

import torch

from benchmarks.core.problem import JSD_WEIGHT, Problem
from benchmarks.peers.peer import (
    Outputs,
    Peer,
    on_copied_rows,
    policy_loss_of,
    scatter_unmasked,
    unmasked,
    with_entropy_as_value,
)


def token_stats(problem: Problem) -> Outputs:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    logprob, entropy = selective_log_softmax_and_entropy(
        problem.logits, problem.tokens, row_mask=problem.mask
    )
    return {"logprob": logprob, "entropy": entropy}


def linear_token_stats(problem: Problem) -> Outputs:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    hidden, tokens = unmasked(problem, problem.hidden), unmasked(problem, problem.tokens)
    logprob, entropy, *_ = ChunkedLogProbFunction.apply(
        hidden, problem.weight, None, tokens, 1.0, 32_768, None, 1.0, ("entropy",)
    )
    return {
        "logprob": scatter_unmasked(problem, logprob),
        "entropy": scatter_unmasked(problem, entropy),
    }


def linear_kl(problem: Problem, beta: float) -> Outputs:
    """KL of every token: 0 is the forward one, 1 the reverse, between them a JSD."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    kl, _ = ChunkedDivergenceFunction.apply(
        unmasked(problem, problem.hidden),
        problem.weight,
        None,
        unmasked(problem, problem.ref_hidden),
        problem.ref_weight,
        None,
        beta,
    )
    return {"kl": scatter_unmasked(problem, kl)}


def distillation(problem: Problem, beta: float) -> Outputs:
    from trl.experimental.gkd import GKDTrainer

    labels = None if problem.mask is None else torch.where(problem.mask, problem.tokens, -100)
    loss = GKDTrainer.generalized_jsd_loss(
        problem.logits,
        problem.ref_logits,
        labels,
        beta,
        num_items_in_batch=problem.num_active,
    )
    return {"loss": loss}


def linear_distillation(problem: Problem, beta: float) -> Outputs:
    """Average the divergence over the unmasked tokens, as its DistillationTrainer does."""
    per_token = linear_kl(problem, beta)["kl"]
    return {"loss": per_token.sum() / problem.num_active}


def grpo_loss(problem: Problem) -> Outputs:
    return policy_loss_of(problem, token_stats(problem)["logprob"])


def linear_grpo_loss(problem: Problem) -> Outputs:
    return policy_loss_of(problem, linear_token_stats(problem)["logprob"])


PEER = Peer(
    "TRL",
    {
        "token_stats": token_stats,
        "grpo_loss": grpo_loss,
        "distillation_reverse": partial(distillation, beta=1.0),
        "distillation_forward": partial(distillation, beta=0.0),
        "distillation_jsd": partial(distillation, beta=JSD_WEIGHT),
        "linear_token_stats": linear_token_stats,
        "linear_token_stats_frozen": with_entropy_as_value(linear_token_stats),
        "linear_token_stats_frozen_entropy": linear_token_stats,
        "linear_forward_kl": partial(linear_kl, beta=0.0),
        "linear_reverse_kl": partial(linear_kl, beta=1.0),
        "linear_distillation_reverse": partial(linear_distillation, beta=1.0),
        "linear_distillation_forward": partial(linear_distillation, beta=0.0),
        "linear_distillation_jsd": partial(linear_distillation, beta=JSD_WEIGHT),
        "linear_grpo_loss": linear_grpo_loss,
        "linear_grpo_loss_frozen": linear_grpo_loss,
        "linear_grpo_loss_tree": on_copied_rows(linear_grpo_loss),
    },
    "from hidden states: logits are rounded to their dtype for the log-prob; a KL takes a pass of "
    "its own, and the entropy beside it has no gradient; the objective is plain torch; a "
    "distillation has no entropy of the teacher, and from logits no metrics",
    "backward computes the logits again, which is a fourth product",
    package="trl",
)
