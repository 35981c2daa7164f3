"""Apple's cut-cross-entropy."""

from torch import Tensor

from benchmarks.core.problem import Problem
from benchmarks.peers.peer import Outputs, Peer, policy_loss_of, scatter_unmasked, unmasked


def negative_logprob(problem: Problem, reduction: str) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(
        unmasked(problem, problem.hidden),
        problem.weight,
        unmasked(problem, problem.tokens),
        reduction=reduction,
        filter_eps=None,
        impl="cce" if problem.hidden.is_cuda else "torch_compile",
    )


def linear_cross_entropy(problem: Problem) -> Outputs:
    return {"surrogate": negative_logprob(problem, "mean")}


def linear_grpo_loss(problem: Problem) -> Outputs:
    nll = negative_logprob(problem, "none")
    return policy_loss_of(problem, scatter_unmasked(problem, -nll))


PEER = Peer(
    "cut-cross-entropy",
    {
        "linear_cross_entropy": linear_cross_entropy,
        "linear_grpo_loss": linear_grpo_loss,
        "linear_grpo_loss_frozen": linear_grpo_loss,
    },
    "no entropy; its kernels need a GPU, on a CPU it is compiled by torch; its gradient filter is "
    "off",
    "on a CPU torch.compile keeps every logit",
    package="cut_cross_entropy",
    every_shape=False,
)
