"""quack's cross-entropies."""

from benchmarks.core.problem import Problem
from benchmarks.peers.peer import Outputs, Peer, policy_loss_of, unmasked


def linear_cross_entropy(problem: Problem) -> Outputs:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    loss = chunked_linear_cross_entropy(
        unmasked(problem, problem.hidden), problem.weight, unmasked(problem, problem.tokens)
    )
    return {"surrogate": loss}


def grpo_loss(problem: Problem) -> Outputs:
    from quack.cross_entropy import cross_entropy

    logits, tokens = problem.logits.flatten(0, 1), problem.tokens.flatten()
    return policy_loss_of(problem, -cross_entropy(logits, tokens, reduction="none"))


PEER = Peer(
    "quack",
    {"linear_cross_entropy": linear_cross_entropy, "grpo_loss": grpo_loss},
    "no entropy; the objective is plain torch; it needs a Hopper or Blackwell GPU",
    package="quack-kernels",
)
