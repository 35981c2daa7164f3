"""A whole training step of a language model with random weights, under each loss head.

    pytest benchmarks/test_step.py             clocked
    pytest benchmarks/test_step.py -k lora     LoRA only
    pytest benchmarks/test_step.py --quick     a tiny model, once

A step is

    hidden = the model's last hidden states
    loss   = an implementation of linear_grpo_loss
    backward through both, AdamW

training_step       every weight is trained
lora_step           LoRA on the linear layers, with checkpointed activations; the head is frozen
lora_stats_step     the same, the loss from log-probs, as trainers compute it

The model, tokens and optimiser are the same for all. "no head" is the floor: its loss is the mean
of the hidden states.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from benchmarks.core import clock
from benchmarks.core.problem import RANK, Problem
from benchmarks.core.results import Record
from benchmarks.core.shapes import DTYPES
from benchmarks.peers import OURS, PEERS, Adapter
from benchmarks.peers.peer import policy_loss_of
from reference.training.model.load import ARCHITECTURES

NO_HEAD = "no head"
WARM_UP = 12  # steps


class Step(NamedTuple):
    head: str  # the task of the head: a loss, or log-probs for one
    lora: bool


STEPS = {
    "training_step": Step("linear_grpo_loss", lora=False),
    "lora_step": Step("linear_grpo_loss_frozen", lora=True),
    "lora_stats_step": Step("linear_token_stats_frozen", lora=True),
}


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


class LoRALinear(nn.Module):
    """A frozen linear layer and a trained low-rank matrix beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        new = base.weight.new_zeros
        self.a = nn.Parameter(nn.init.kaiming_uniform_(new(RANK, base.in_features)))
        self.b = nn.Parameter(new(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.a.T) @ self.b.T


class TrainingStep:
    """A model, its optimiser and a batch; calling it takes one step with the given head."""

    def __init__(self, setup: Setup, device: torch.device, *, lora: bool) -> None:
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
        if lora:
            self.model.requires_grad_(False)
            layers = self.model.model.layers
            for name, module in list(layers.named_modules()):
                if isinstance(module, nn.Linear):
                    layers.set_submodule(name, LoRALinear(module))
            self.model.train().gradient_checkpointing_enable({"use_reentrant": False})
        trained = [x for x in self.model.parameters() if x.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def __call__(self, head: Adapter | None) -> Tensor:
        hidden = self.model.model(self.ids, use_cache=False).last_hidden_state[:, :-1]
        if head is None:
            loss = hidden.float().mean()
        else:
            weight, tokens = self.model.lm_head.weight, self.ids[:, 1:]
            problem = Problem(tokens, None, self.advantages, hidden=hidden, weight=weight)
            outputs = head(problem)
            if "loss" not in outputs:
                outputs = policy_loss_of(problem, outputs["logprob"])
            loss = outputs["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


@pytest.fixture(scope="module")
def setup(harness):
    return SETUPS["tiny" if harness.quick else harness.device.type]


@pytest.fixture(scope="module")
def make_step(harness, setup):
    @lru_cache(maxsize=1)
    def make(lora: bool) -> TrainingStep:
        step = TrainingStep(setup, harness.device, lora=lora)
        for _ in range(1 if harness.quick else WARM_UP):
            step(None)
        return step

    return make


CASES = [
    pytest.param(task, name, id=f"{task}, {name}")
    for task, step in STEPS.items()
    for name in (NO_HEAD, *PEERS)
    if (task != "lora_stats_step" if name == NO_HEAD else step.head in PEERS[name].tasks)
]


@pytest.mark.parametrize(("task", "name"), CASES)
@pytest.mark.benchmark(timer=clock.now)
def test_step(task, name, setup, make_step, harness, request):
    peer = PEERS.get(name)
    if peer and (reason := peer.missing()):
        pytest.skip(reason)
    head, lora = STEPS[task]
    call = partial(make_step(lora), peer.tasks[head] if peer else None)
    N = setup.B * setup.T
    harness.attempt(
        Record(task, "both", setup.model, N, setup.dtype, 0.0, 0.0, name),
        lambda record: harness.run(call, record, request, task),
        must_work=name in (OURS, NO_HEAD),
    )
