"""A whole training step of a language model with random weights, under each head of the GRPO loss.

    hidden = the model's last hidden states
    loss   = an implementation of linear_grpo_loss
    backward through both, AdamW

All implementations meet the same model, tokens and optimiser; "no head" takes the sum of the hidden
states for the loss, which is what a head that costs nothing would leave.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.core.problem import Problem
from benchmarks.core.results import Record
from benchmarks.peers import PEERS, Adapter
from reference.training.model.load import ARCHITECTURES

TASK = "linear_grpo_loss"
NO_HEAD = "no head"
PEERS_WITH_A_HEAD = [name for name, peer in PEERS.items() if TASK in peer.tasks]


@dataclass(frozen=True)
class Setup:
    """A Llama with random weights, and what it is trained on."""

    model: str
    dtype: str
    B: int  # completions
    T: int  # tokens of each that are predicted
    architecture: dict


_TINY = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SETUPS = {
    "cuda": Setup("Llama 3.2 1B", "bf16", 32, 256, ARCHITECTURES["llama-3.2-1b"]),
    "cpu": Setup("SmolLM2 135M", "fp32", 4, 16, ARCHITECTURES["smollm2-135m"]),
    "tiny": Setup("tiny", "fp32", 4, 8, _TINY),
}


class Step:
    """The model, its optimiser, and a batch; a call is one step under the given head."""

    def __init__(self, setup: Setup, device: torch.device) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        from benchmarks.core.shapes import DTYPES

        torch.manual_seed(0)
        config = LlamaConfig(
            **setup.architecture, tie_word_embeddings=True, attn_implementation="sdpa"
        )
        with device:
            self.model = LlamaForCausalLM(config).to(DTYPES[setup.dtype])
            size = (setup.B, setup.T + 1)
            self.ids = torch.randint(0, setup.architecture["vocab_size"], size)
            self.advantages = torch.randn(setup.B)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)

    def __call__(self, head: Adapter | None) -> Tensor:
        """The loss; None: no head."""
        hidden = self.model.model(self.ids, use_cache=False).last_hidden_state[:, :-1]
        if head is None:
            loss = hidden.float().mean()
        else:
            weight = self.model.lm_head.weight
            tokens = self.ids[:, 1:]
            loss = head(Problem(tokens, None, self.advantages, hidden=hidden, weight=weight))[
                "loss"
            ]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def call_of(step: Step, peer: str) -> Callable[[], Tensor]:
    head = None if peer == NO_HEAD else PEERS[peer].tasks[TASK]
    return lambda: step(head)


def record_of(setup: Setup, peer: str) -> Record:
    N = setup.B * setup.T
    return Record("training_step", "both", setup.model, N, setup.dtype, 0.0, 0.0, peer)
