"""The settings of a run that are not of its loss, a class for each part of it.

A field is a flag of the command line, and the text below it is what --help says of the flag.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ModelSettings:
    """What is trained."""

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


@dataclass(frozen=True)
class TaskSettings:
    """What is asked, and what is rewarded."""

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
    overlong_buffer: int = 0
    """The reward falls by up to 1 over this many last tokens before --max-new-tokens (DAPO)."""


@dataclass(frozen=True)
class SamplingSettings:
    """How questions are answered, anew in each step."""

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


@dataclass(frozen=True)
class AdvantageSettings:
    """How much better than the others of its group an answer is."""

    advantage: (
        Literal["group", "batch", "centered", "leave_one_out", "max_rl", "pass_at_k"] | None
    ) = None
    """The reward minus its group's mean, divided by: group, the group's std; batch, the std of all
    rewards (2508.08221); centered, nothing; max_rl, that mean (2602.02710). Or leave_one_out: minus
    the others' mean (2402.14740); pass_at_k: what the completion adds to the best of k
    (2503.19595). None: centered for --loss dr_grpo, else group."""
    pass_k: int = 4
    """The k of pass_at_k, 2 to --group-size."""
    normalise_each_reward: bool = False
    """Each reward is compared within the group by itself, and then they are summed (2601.05242)."""


@dataclass(frozen=True)
class UpdateSettings:
    """How the model follows the gradient of the loss, and what follows the model."""

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
    """Questions per forward and backward pass, for less memory; the gradient is the same, but where
    a filter of the loss looks at the micro-batch. None: all at once."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: ddp, each process has the whole model; fsdp, the weights, their gradients and
    AdamW's moments are in shards (FSDP2)."""
    reference_refresh: int | None = None
    """Every so many steps the reference becomes the policy (DeepSeekMath's iterative GRPO)."""
    entropy_target: float | None = None
    """In nats per token: --entropy-coef is where the weight of the entropy bonus starts; it rises
    while the entropy is not above this, else falls and is not applied (2505.22312)."""
    entropy_coef_step: float = 0.005
    """How much it rises or falls per step."""
    entropy_coef_max: float = 1.0
    """How far it rises."""


@dataclass(frozen=True)
class EvaluationSettings:
    """Held-out questions, before, during and after; or a talk."""

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


@dataclass(frozen=True)
class RunSettings:
    """Where it runs, what it prints, what it leaves."""

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
    overwrite: bool = False
    """Replace the run that --output-dir holds."""
    checkpoint_every: int | None = 50
    """Every so many steps, and after the last, all that --resume needs is saved: of a model trained
    whole three times its weights. None: only at SIGTERM."""
    keep_checkpoints: int = 2
    """How many of them are kept, the newest; at the end of the run one."""
    resume: Path | None = None
    """The directory of a run that was stopped: it goes on from its last checkpoint, with its
    settings, of which --steps and what is printed or saved may change."""
    cache_dir: Path | None = None
    """Where a downloaded model is kept. None: $GRPO_KERNELS_CACHE, else
    $XDG_CACHE_HOME/grpo_kernels, else ~/.cache/grpo_kernels."""
