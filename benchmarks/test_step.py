"""A whole training step of a language model with random weights, under each loss head.

    pytest benchmarks/test_step.py             clocked
    pytest benchmarks/test_step.py --quick     a tiny model, once

A step is

    hidden = the model's last hidden states
    loss   = an implementation of linear_grpo_loss
    backward through both, AdamW

The model, tokens and optimiser are the same for all. "no head" is the floor: its loss is the mean
of the hidden states.
"""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.core import clock
from benchmarks.core.problem import Problem
from benchmarks.core.results import Record
from benchmarks.core.shapes import DTYPES
from benchmarks.peers import OURS, PEERS, Adapter
from reference.training.model.load import ARCHITECTURES

TASK = "linear_grpo_loss"
NO_HEAD = "no head"
WARM_UP = 12  # steps


@dataclass(frozen=True)
class Setup:
    """A Llama with random weights, and the size of its batch."""

    model: str
    dtype: str
    B: int  # completions
    T: int  # predicted tokens per completion
    architecture: dict


SETUPS = {
    "cuda": Setup("Llama 3.2 1B", "bf16", 32, 256, ARCHITECTURES["llama-3.2-1b"]),
    "cpu": Setup("SmolLM2 135M", "fp32", 4, 16, ARCHITECTURES["smollm2-135m"]),
    "tiny": Setup(
        *("tiny", "fp32", 4, 8),
        {
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
    ),
}


class TrainingStep:
    """A model, its optimiser and a batch; calling it takes one step with the given head."""

    def __init__(self, setup: Setup, device: torch.device) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

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
        hidden = self.model.model(self.ids, use_cache=False).last_hidden_state[:, :-1]
        if head is None:
            loss = hidden.float().mean()
        else:
            weight, tokens = self.model.lm_head.weight, self.ids[:, 1:]
            problem = Problem(tokens, None, self.advantages, hidden=hidden, weight=weight)
            loss = head(problem)["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


@pytest.fixture(scope="module")
def setup(harness):
    return SETUPS["tiny" if harness.quick else harness.device.type]


@pytest.fixture(scope="module")
def step(harness, setup):
    step = TrainingStep(setup, harness.device)
    for _ in range(1 if harness.quick else WARM_UP):
        step(None)
    return step


@pytest.mark.parametrize("name", [NO_HEAD, *(name for name in PEERS if TASK in PEERS[name].tasks)])
@pytest.mark.benchmark(timer=clock.now)
def test_step(name, setup, step, harness, request):
    peer = PEERS.get(name)
    if peer and (reason := peer.missing()):
        pytest.skip(reason)
    call = partial(step, peer.tasks[TASK] if peer else None)
    N = setup.B * setup.T
    harness.attempt(
        Record("training_step", "both", setup.model, N, setup.dtype, 0.0, 0.0, name),
        lambda record: harness.run(call, record, request, "training step"),
        must_work=name in (OURS, NO_HEAD),
    )
