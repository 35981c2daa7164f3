"""The settings of a run, and what they may be."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reference.errors import UserError

# What each named loss sets in LossConfig; everything else keeps its default there.
LOSSES = {
    "grpo": {},
    "bnpo": {"aggregation": "token_mean"},
    "dr_grpo": {"aggregation": "fixed_length"},
    "dapo": {"aggregation": "token_mean", "epsilon_high": 0.28},
    "gspo": {"ratio_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
}


@dataclass(frozen=True)
class TrainConfig:
    """Train a language model with GRPO on a task whose answers can be checked.

    --preset chooses the defaults shown below: smollm2-135m (SmolLM2-135M-Instruct learns to add),
    tiny (75k parameters from scratch learn to reverse digits, under a minute on a CPU) or
    llama-3.2-1b (Llama-3.2-1B-Instruct on GSM8K, for a GPU). Every other flag overrides the preset.
    """

    preset: Literal["smollm2-135m", "tiny", "llama-3.2-1b"] = "smollm2-135m"
    """The set of defaults to start from."""

    model: str = "smollm2-135m"
    """smollm2-135m, llama-3.2-1b, scratch (75k parameters), a directory, or a model hub id."""
    random_weights: bool = False
    """The architecture of --model without its weights, to measure time and memory."""
    lora_rank: int | None = None
    """Train adapters of this rank instead of the whole model; the reference is the model without
    them."""
    lora_alpha: float = 32.0
    """Scale of the adapters, divided by their rank."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    autocast: Literal["auto", "bf16", "off"] = "auto"
    """The dtype of the forward pass over fp32 weights. auto: bf16 on a GPU, off elsewhere."""

    task: str = "arithmetic"
    """What to learn: arithmetic, reverse, gsm8k, jsonl, capital-of-brazil, question, or
    reasoning-gym/<generator>."""
    data: Path | None = None
    """For gsm8k and jsonl: a local file, or a directory with train.jsonl and test.jsonl."""
    task_option: tuple[str, ...] = ()
    """Settings of a reasoning-gym generator, name=value."""
    system: str | None = None
    """The system prompt, in place of the task's own."""
    question: str | None = None
    """For --task question: the only question."""
    answer: str | None = None
    """For --task question: its answer."""
    reward: tuple[str, ...] = ()
    """More rewards: package.module.function or file.py:function, =weight behind it if it is not 1.
    Installed packages can be imported; so can modules of this directory under `python -m
    reference.train`."""
    reward_weight: tuple[str, ...] = ()
    """Weights of the task's own rewards, name=weight; 0 leaves one out of the sum, not of the
    log."""
    step_reward: str | None = None
    """Process supervision: a function like a reward whose values are lists of (end of the step in
    characters, reward)."""

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
    sampler: str = "shared-prompt"
    """shared-prompt, generate or continuous (transformers' own), or the URL of an OpenAI-compatible
    server such as vLLM."""
    dynamic_sampling: int = 0
    """Groups without a signal are replaced by fresh questions, in at most this many further rounds
    of sampling (DAPO)."""
    mask_truncated: bool = False
    """Leave completions that were cut off out of the loss."""
    overlong_buffer: int = 0
    """The reward falls by up to 1 over this many last tokens before --max-new-tokens (DAPO)."""

    loss: Literal[tuple(LOSSES)] = "grpo"  # type: ignore[valid-type]
    """grpo: mean of sequence means. bnpo: token mean. dapo: token mean, wider upper clip. dr_grpo:
    sum over batch size times --max-new-tokens, advantages not divided by their standard deviation.
    gspo: ratios of whole sequences."""
    epsilon_low: float | None = None
    """Lower clip of the ratio is 1 - this. None: the loss's own."""
    epsilon_high: float | None = None
    """Upper clip of the ratio is 1 + this. None: the loss's own."""
    beta: float = 0.0
    """Weight of the KL to the reference, a frozen model that is kept where this is above 0."""
    kl_estimator: Literal["k1", "k2", "k3", "k3+", "k3_corrected", "abs"] = "k3"
    """Which estimate of that KL; choosing one is choosing a gradient, see the README."""
    reference_refresh: int | None = None
    """Every so many steps the reference becomes the policy (DeepSeekMath's iterative GRPO)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    importance_cap: float = 2.0
    """Bound of the weight exp(trainer - sampler) that corrects for a sampler of other numbers."""

    learning_rate: float = 1e-5
    """Peak learning rate of AdamW, reached after --warmup-steps and then constant."""
    warmup_steps: int = 3
    """Steps over which the learning rate rises linearly."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm where it is longer."""
    inner_iterations: int = 1
    """Passes over each batch of completions; from the second optimiser step on the ratio leaves 1
    and clipping acts."""
    minibatches: int = 1
    """Optimiser steps per pass, each on its share of the questions."""
    micro_batch: int | None = None
    """Questions per forward and backward pass, for less memory; the gradient is the same. None: all
    at once."""

    eval_every: int | None = None
    """Held-out questions are asked every so many steps too, not only before and after."""
    eval_questions: int = 128
    """At most so many held-out questions."""
    pass_at: int | None = None
    """Also estimate pass@k from this many samples of each held-out question."""
    eval_only: bool = False
    """Ask the held-out questions and stop. Which are held out depends on --seed."""
    chat: bool = False
    """Talk to the model and stop: --model runs/.../model for one that was trained."""

    seed: int = 0
    """Seed of the question split, the order of questions and the sampling."""
    print_every: int = 8
    """A question with a sampled answer and its reward is printed every so many steps."""
    dashboard_every: int = 10
    """curves.png is drawn anew every so many steps."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: bool = False
    """Log to Weights & Biases."""
    loss_impl: Literal["fused", "reference"] = "fused"
    """The losses of grpo_kernels, or their plain PyTorch twins."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda if there is one, then mps, then cpu."""
    threads: int | None = None
    """CPU threads of PyTorch. None: PyTorch's choice."""
    output_dir: Path | None = None
    """Where everything of the run goes: a new or empty directory. None: a fresh one in runs/."""
    cache_dir: Path | None = None
    """Where a downloaded model is kept. None: $GRPO_KERNELS_CACHE, else
    $XDG_CACHE_HOME/grpo_kernels, else ~/.cache/grpo_kernels."""

    def __post_init__(self) -> None:
        for name, minimum in _LEAST.items():
            value = getattr(self, name)
            self._require(name, value is None or value >= minimum, f"at least {minimum}")
        for name in _POSITIVE:
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value > 0, "a positive number")
        for name in ("beta", "entropy_coef", "epsilon_low", "epsilon_high"):
            value = getattr(self, name)
            self._require(name, value is None or 0 <= value < math.inf, "at least 0")
        self._require(
            "overlong_buffer", self.overlong_buffer < self.max_new_tokens, "below --max-new-tokens"
        )
        self._require("minibatches", self.minibatches <= self.prompts, "at most --prompts")
        if self.chat and self.eval_only:
            raise UserError("--chat and --eval-only: choose one")
        if self.dynamic_sampling and self.step_reward is not None:
            raise UserError("--dynamic-sampling looks at whole answers: not with --step-reward")
        if self.model == "scratch" and self.task != "reverse":
            raise UserError("--model scratch learns --task reverse only: it can spell no other")
        if self.model == "scratch" and self.lora_rank is not None:
            raise UserError("--lora-rank adapts a trained model, and --model scratch is none")
        if self.reference_refresh is not None and self.beta == 0:
            raise UserError("--reference-refresh needs a reference: set --beta above 0")
        if self.reference_refresh is not None and self.lora_rank is not None:
            raise UserError("--reference-refresh: with --lora-rank the reference is the base model")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} must be {expected}; got {getattr(self, name)}")

    def task_settings(self) -> dict[str, Any]:
        """The task options by name; what is not JSON is text."""
        found = {}
        for option in self.task_option:
            name, equals, value = option.partition("=")
            if not name or not equals:
                raise UserError(f"--task-option must be name=value; got {option}")
            try:
                found[name] = json.loads(value)
            except json.JSONDecodeError:
                found[name] = value
        return found

    def loss_fields(self) -> dict:
        """The keyword arguments of LossConfig."""
        names = ("beta", "kl_estimator", "entropy_coef", "importance_cap")
        fields = {**LOSSES[self.loss], **{name: getattr(self, name) for name in names}}
        if self.loss == "dr_grpo":
            fields["max_completion_length"] = self.max_new_tokens
        for name in ("epsilon_low", "epsilon_high"):
            if getattr(self, name) is not None:
                fields[name] = getattr(self, name)
        return fields


_POSITIVE = ("temperature", "learning_rate", "max_grad_norm", "importance_cap", "lora_alpha")
_LEAST = {
    "steps": 1,
    "prompts": 1,
    "group_size": 2,  # a group of one has no spread: its advantages are all 0
    "max_new_tokens": 1,
    "inner_iterations": 1,
    "minibatches": 1,
    "warmup_steps": 0,
    "dynamic_sampling": 0,
    "overlong_buffer": 0,
    "print_every": 1,
    "dashboard_every": 1,
    "eval_questions": 1,
    "eval_every": 1,
    "pass_at": 1,
    "reference_refresh": 1,
    "micro_batch": 1,
    "threads": 1,
    "lora_rank": 1,
}
