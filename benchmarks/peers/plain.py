"""Plain PyTorch: the lines that a user would write, and the reference implementation."""

from collections.abc import Callable

import torch

from benchmarks.core.problem import Problem
from benchmarks.peers.ours import all_tasks
from benchmarks.peers.peer import Outputs, Peer
from reference import losses


def linear_grpo_loss(problem: Problem) -> Outputs:
    """The loss of LossConfig(), with logits in the dtype of the model."""
    logits = problem.hidden @ problem.weight.T
    logprob = logits.log_softmax(-1).gather(-1, problem.tokens[..., None]).squeeze(-1).float()
    old_logprob = logprob.detach() if problem.old_logprob is None else problem.old_logprob
    ratio = (logprob - old_logprob).exp()
    clipped, advantages = ratio.clamp(0.8, 1.2), problem.advantages[:, None]
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    mask = torch.ones_like(per_token) if problem.mask is None else problem.mask.to(per_token.dtype)
    lengths = mask.sum(-1).clamp(min=1)
    return {"loss": ((per_token * mask).sum(-1) / lengths).mean()}


class CompiledLosses:
    """The functions of the reference implementation through torch.compile, lengths dynamic."""

    def __getattr__(self, name: str) -> Callable:
        compiled = torch.compile(getattr(losses, name), dynamic=True)
        setattr(self, name, compiled)
        return compiled


PLAIN = "plain PyTorch"
REFERENCE = "reference"
COMPILED_TASKS = all_tasks(CompiledLosses())
PEERS = (
    Peer(
        PLAIN,
        {"linear_grpo_loss": linear_grpo_loss},
        "no entropy; from bf16, logits and log-probs are bf16; every logit is in memory, often",
        "log_softmax writes every log-prob and its gradient reads and writes them again",
    ),
    Peer(
        REFERENCE,
        all_tasks(losses),
        "nothing; every logit is in memory, in fp32",
        "log-probs, probabilities and their gradients are written for every logit",
    ),
    Peer(
        f"{REFERENCE}, compiled",
        {
            name: COMPILED_TASKS[name]
            for name in (
                "token_stats",
                "reverse_kl",
                "grpo_loss",
                "distillation_jsd",
                "linear_token_stats",
                "linear_grpo_loss",
                "linear_distillation_reverse",
                "linear_distillation_jsd",
            )
        },
        "nothing; torch.compile decides what is in memory",
        "every logit is still written and read again",
        every_shape=False,
        every_phase=False,
    ),
)
