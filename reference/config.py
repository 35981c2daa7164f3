"""The settings of a run: a frozen dataclass, presets for its defaults, a command line over both."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reference.errors import UserError
from reference.tasks import TASKS

# What each named loss sets in LossConfig; everything else keeps its default there.
LOSSES = {
    "grpo": {},
    "bnpo": {"aggregation": "token_mean"},
    "dr_grpo": {"aggregation": "fixed_length"},
    "dapo": {"aggregation": "token_mean", "epsilon_high": 0.28},
}


@dataclass(frozen=True)
class TrainConfig:
    """Train a language model with GRPO on a task whose answers can be checked.

    --preset chooses the defaults shown below: smollm2-135m (SmolLM2-135M-Instruct learns to add, 7
    minutes on two CPU cores) or tiny (75k parameters from scratch learn to reverse digits, under a
    minute). Every other flag overrides the preset.
    """

    preset: Literal["smollm2-135m", "tiny"] = "smollm2-135m"
    """The set of defaults to start from."""
    model: str = "smollm2-135m"
    """What to train: smollm2-135m, scratch (75k parameters), a directory, or a model hub id."""
    task: Literal[tuple(TASKS)] = "arithmetic"  # type: ignore[valid-type]
    """What to learn."""
    steps: int = 32
    """Steps of GRPO: each samples fresh completions."""
    prompts: int = 8
    """Questions per step."""
    group_size: int = 8
    """Completions sampled per question; advantages compare them with each other. At least 2."""
    max_new_tokens: int = 12
    """Longest completion, in tokens."""
    temperature: float = 1.0
    """Temperature of the sampling, and of the log-probabilities in the loss."""
    loss: Literal[tuple(LOSSES)] = "grpo"  # type: ignore[valid-type]
    """grpo: mean of sequence means. bnpo: token mean. dapo: token mean, wider upper clip. dr_grpo:
    sum over batch size times --max-new-tokens, advantages not divided by their standard
    deviation."""
    epsilon_low: float | None = None
    """Lower clip of the ratio is 1 - this. None: the loss's own."""
    epsilon_high: float | None = None
    """Upper clip of the ratio is 1 + this. None: the loss's own."""
    beta: float = 0.0
    """Weight of the KL to the model before training; above 0 a frozen copy of it is kept."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW, reached after --warmup-steps and then constant."""
    warmup_steps: int = 3
    """Steps over which the learning rate rises linearly."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm where it is longer."""
    inner_iterations: int = 1
    """Optimiser steps on each batch of completions; from the second on the ratio leaves 1 and
    clipping acts."""
    micro_batch: int | None = None
    """Questions per forward and backward pass, for less memory; the gradient is the same. None: all
    at once."""
    seed: int = 0
    """Seed of the question split, the order of questions and the sampling."""
    print_every: int = 8
    """A question with a sampled answer and its reward is printed every so many steps."""
    loss_impl: Literal["fused", "reference"] = "fused"
    """The losses of grpo_kernels, or their plain PyTorch twins."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda if there is one, then mps, then cpu."""
    threads: int | None = None
    """CPU threads of PyTorch. None: PyTorch's choice."""
    output_dir: Path | None = None
    """Where the metrics, the curves and the model go: a new or empty directory. None: a fresh one
    in runs/."""
    cache_dir: Path | None = None
    """Where a downloaded model is kept. None: $GRPO_KERNELS_CACHE, else
    $XDG_CACHE_HOME/grpo_kernels, else ~/.cache/grpo_kernels."""

    def __post_init__(self) -> None:
        least = {
            "steps": 1,
            "prompts": 1,
            "group_size": 2,  # a group of one has no spread: its advantages are all 0
            "max_new_tokens": 1,
            "inner_iterations": 1,
            "warmup_steps": 0,
            "print_every": 1,
        }
        for name, minimum in least.items():
            self._require(name, getattr(self, name) >= minimum, f"at least {minimum}")
        for name in ("micro_batch", "threads"):
            self._require(
                name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1"
            )
        for name in ("temperature", "learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value > 0, "a positive number")
        for name in ("beta", "entropy_coef", "epsilon_low", "epsilon_high"):
            value = getattr(self, name)
            self._require(name, value is None or 0 <= value < math.inf, "at least 0")

        if self.model == "scratch" and self.task != "reverse":
            raise UserError("--model scratch learns --task reverse only: it can spell no other")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} must be {expected}; got {getattr(self, name)}")

    def loss_fields(self) -> dict:
        """The keyword arguments of LossConfig."""
        fields = {**LOSSES[self.loss], "beta": self.beta, "entropy_coef": self.entropy_coef}
        if self.loss == "dr_grpo":
            fields["max_completion_length"] = self.max_new_tokens
        for name in ("epsilon_low", "epsilon_high"):
            if getattr(self, name) is not None:
                fields[name] = getattr(self, name)
        return fields


PRESETS = {
    "smollm2-135m": TrainConfig(),
    "tiny": TrainConfig(
        preset="tiny",
        model="scratch",
        task="reverse",
        steps=400,
        prompts=16,
        max_new_tokens=7,  # six digits and the end
        learning_rate=3e-4,
        warmup_steps=0,
        print_every=50,
        threads=1,  # matrices this small lose up to 20 times when shared between threads
    ),
}


def parse_command_line(arguments: list[str] | None = None) -> TrainConfig:
    """The preset named in the arguments, overridden by the other flags."""
    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="smollm2-135m")
    preset = first.parse_known_args(arguments)[0].preset
    return tyro.cli(TrainConfig, args=arguments, default=PRESETS[preset])
