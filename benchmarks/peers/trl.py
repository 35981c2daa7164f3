"""TRL's functions for log-probs, entropies and KLs."""

from functools import partial

from benchmarks.core.problem import Problem
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


def grpo_loss(problem: Problem) -> Outputs:
    return policy_loss_of(problem, token_stats(problem)["logprob"])


def linear_grpo_loss(problem: Problem) -> Outputs:
    return policy_loss_of(problem, linear_token_stats(problem)["logprob"])


PEER = Peer(
    "TRL",
    {
        "token_stats": token_stats,
        "grpo_loss": grpo_loss,
        "linear_token_stats": linear_token_stats,
        "linear_token_stats_frozen": with_entropy_as_value(linear_token_stats),
        "linear_token_stats_frozen_entropy": linear_token_stats,
        "linear_forward_kl": partial(linear_kl, beta=0.0),
        "linear_reverse_kl": partial(linear_kl, beta=1.0),
        "linear_grpo_loss": linear_grpo_loss,
        "linear_grpo_loss_frozen": linear_grpo_loss,
        "linear_grpo_loss_tree": on_copied_rows(linear_grpo_loss),
    },
    "from hidden states: logits are rounded to their dtype for the log-prob; a KL takes a pass of "
    "its own, and the entropy beside it has no gradient; the objective is plain torch",
    package="trl",
)
