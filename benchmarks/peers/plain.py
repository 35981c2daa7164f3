"""The reference implementation in plain PyTorch, as it is and through torch.compile."""

from collections.abc import Callable

import torch

from benchmarks.peers.ours import all_tasks
from benchmarks.peers.peer import Peer
from reference import losses


class CompiledLosses:
    """The functions of the reference implementation through torch.compile, lengths dynamic."""

    def __getattr__(self, name: str) -> Callable:
        compiled = torch.compile(getattr(losses, name), dynamic=True)
        setattr(self, name, compiled)
        return compiled


REFERENCE = "reference"
COMPILED_TASKS = all_tasks(CompiledLosses())
PEERS = (
    Peer(REFERENCE, all_tasks(losses), "nothing; every logit is in memory, in fp32"),
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
        every_shape=False,
        every_phase=False,
    ),
)
