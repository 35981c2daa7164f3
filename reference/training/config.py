"""The settings of a run: one flag each, with its help text, and the checks of their combinations.

A section of --help is a dataclass here. The text below a field is the help text of its flag.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

from grpo_kernels import LossConfig
from grpo_kernels.objective.kl_estimators import SAMPLED_KL
from reference.training.errors import UserError, one_line
from reference.training.rollout.truncation import Truncation


@dataclass(frozen=True)
class ModelSettings:
    """The model to train."""

    model: str = "smollm2-135m"
    """smollm2-135m, llama-3.2-1b, scratch (75k parameters), a directory, or a model hub id."""
    random_weights: bool = False
    """Use the architecture of --model with random weights, to measure time and memory."""
    lora_rank: int | None = None
    """Train LoRA adapters of this rank instead of the whole model. The reference policy is then the
    model without them."""
    lora_alpha: float = 32.0
    """Scale of the adapters; it is divided by their rank."""
    gradient_checkpointing: bool = False
    """Recompute activations: less memory, more time."""
    autocast: Literal["auto", "bf16", "off"] = "auto"
    """Dtype of the forward pass; the weights are fp32. auto: bf16 on a GPU, off elsewhere."""


@dataclass(frozen=True)
class TaskSettings:
    """The questions and the rewards."""

    task: str = "arithmetic"
    """arithmetic, reverse, gsm8k, data (your own, with --data), capital-of-brazil, question, or
    reasoning-gym/<generator>."""
    data: str | None = None
    """For data and gsm8k: a .jsonl, .json, .csv or .parquet file; a directory with train.* and
    test.* of these types; or a data set of the hub, ORG/NAME, ORG/NAME:CONFIG or
    ORG/NAME:CONFIG:SPLIT. Without a test split a fifth of the questions, at most 128, is held
    out."""
    prompt_column: str | None = None
    """For --data: the column with the prompt, a text or a list of chat messages. None: prompt,
    question, problem or messages."""
    answer_column: str | None = None
    """For --data: the column with the ground truth. None: answer, solution, ground_truth or
    completion, if there is one; without ground truths only --reward counts."""
    task_option: tuple[str, ...] = ()
    """Settings of a reasoning-gym generator, name=value."""
    system: str | None = None
    """The system prompt. None: the task's own."""
    question: str | None = None
    """For --task question: the only question."""
    answer: str | None = None
    """For --task question: its ground truth."""
    reward: tuple[str, ...] = ()
    """Additional rewards: package.module.function or file.py:function, with =weight unless that is
    1. Installed packages can be imported, and modules of this directory under
    `python -m reference.train`."""
    reward_weight: tuple[str, ...] = ()
    """Weights of the task's own rewards, name=weight. A reward of weight 0 is only logged."""
    step_reward: str | None = None
    """Process supervision: a function like a reward that returns a list of (end of the step in
    characters, reward) for each completion."""
    overlong_buffer: int = 0
    """Lower the reward by up to 1 over this many last tokens before --max-new-tokens (DAPO)."""


@dataclass(frozen=True)
class SamplingSettings:
    """The completions that each step samples."""

    steps: int = 32
    """Steps of GRPO. Each one samples new completions."""
    prompts: int = 8
    """Questions per step."""
    group_size: int = 8
    """Completions sampled per question, at least 2. Advantages compare them with each other."""
    max_new_tokens: int = 12
    """Longest completion, in tokens."""
    temperature: float = 1.0
    """Temperature of the sampling and of the loss."""
    top_k: int | None = None
    """Sample among the tokens with the k largest logits. 0 or None: no limit. Like --top-p and
    --min-p, it acts wherever completions are sampled and not greedy, and the loss normalises over
    the tokens that the sampler kept."""
    top_p: float | None = None
    """Sample among the most likely tokens whose probabilities add up to this, after --top-k."""
    min_p: float | None = None
    """Sample among the tokens with at least this share of the largest probability, before --top-k
    and --top-p."""
    support: bool = True
    """With --top-k, --top-p or --min-p: normalise the loss's log-probs over the tokens that the
    sampler kept. With --no-support they are normalised over the vocabulary: the sampler then is
    another policy than the trained one."""
    sampler: str = "shared-prompt"
    """shared-prompt, generate or continuous (both of transformers), vllm (in this process), or the
    URL of a vLLM server. vLLM takes over new weights before each step. The API key of a server is
    read from $VLLM_API_KEY."""
    vllm_memory: float = 0.3
    """With --sampler vllm: its share of the GPU's memory, for weights and cache. While the policy
    trains, this memory is free. On a CPU it is the share of the memory for the cache."""
    vllm_options: tuple[str, ...] = ()
    """With --sampler vllm: arguments of vllm.LLM, name=value, such as max_num_seqs=64."""
    stale_sampler: bool = False
    """With --sampler URL: the server keeps the weights with which it was started, and may be any
    OpenAI-compatible server that returns token ids and log-probs."""
    weights_dir: Path | None = None
    """With --sampler URL: the directory through which the server gets new weights. It must have the
    same path on the server. None: in the directory of the run."""
    sampler_timeout: float = 600.0
    """With --sampler URL: seconds that the server has for the completions of a round, and for
    taking over weights."""
    async_rollout: bool = False
    """Sample the next batch while this one trains. A batch is then one step old when it trains, and
    the sampler's log-probs are the old log-probs of the loss. It takes a sampler that holds weights
    of its own, and one process."""
    max_sampler_difference: float | None = None
    """With a sampler that holds weights of its own: stop if its log-probs differ from the trainer's
    by more than this, in nats per token, the mean over the step's sampled tokens. None: 0.001 if
    both compute in fp32, else 0.1."""
    dynamic_sampling: int = 0
    """Replace groups without a learning signal by new questions, in at most this many further
    rounds of sampling (DAPO)."""
    mask_truncated: bool = False
    """Leave truncated completions out of the loss."""

    @property
    def names_server(self) -> bool:
        """True if --sampler is the URL of a server."""
        return self.sampler.startswith(("http://", "https://"))


@dataclass(frozen=True)
class DistillationSettings:
    """On-policy distillation: the loss is the divergence from a teacher on the completions of the
    student, alone or beside a loss of their rewards."""

    teacher: str | None = None
    """A model of any size to distil from. It is a directory or a model hub id with the tokenizer of
    --model. Its distribution replaces advantages in the loss; rewards are only logged, unless
    --teacher-coef is set."""
    distill: Literal["reverse", "forward", "jsd"] = "reverse"
    """The divergence over the whole vocabulary, a mean over tokens. reverse: KL(student‖teacher),
    forward: KL(teacher‖student), jsd: (1 - w) KL(student‖m) + w KL(teacher‖m) with the mixture
    m = (1 - w) student + w teacher and w = --jsd-weight."""
    jsd_weight: float = 0.5
    """The weight of the teacher in --distill jsd, between 0 and 1."""
    teacher_coef: float | None = None
    """Train on the rewards too: the loss is that of --loss plus this times the KL of --distill
    reverse or forward, both in one pass. None: the divergence alone."""


@dataclass(frozen=True)
class AdvantageSettings:
    """The advantage of a completion over the others of its group."""

    advantage: (
        Literal[
            "group", "batch", "centered", "leave_one_out", "max_rl", "pass_at_k", "opo",
            "reinforce_plus_plus", "ema",
        ]
        | None
    ) = None  # fmt: skip
    """The reward minus its group's mean, divided by: group, the group's std; batch, the std of all
    rewards (2508.08221); centered, nothing; max_rl, that mean (2602.02710). Or leave_one_out: minus
    the others' mean (2402.14740); pass_at_k: what the completion adds to the best of k
    (2503.19595); opo: minus the group's mean weighted by length (2505.23585); reinforce_plus_plus:
    normalised over all tokens of the step (2501.03262); ema: minus a moving average of the rewards
    of earlier steps. None: centered for --loss dr_grpo, else group."""
    pass_k: int = 4
    """The k of pass_at_k, 2 to --group-size."""
    ema_decay: float = 0.9
    """The weight of the earlier steps in the average of ema, at least 0 and below 1."""
    normalise_each_reward: bool = False
    """Normalise each reward within the group before the rewards are summed (2601.05242)."""


@dataclass(frozen=True)
class UpdateSettings:
    """The optimiser steps on a batch of completions."""

    learning_rate: float = 1e-5
    """Learning rate of AdamW, constant after the warmup."""
    warmup_steps: int = 3
    """Steps over which the learning rate rises linearly."""
    max_grad_norm: float = 1.0
    """A gradient with a larger norm is scaled down to this norm."""
    inner_iterations: int = 1
    """Passes over each batch of completions. From the second optimiser step on, the ratio differs
    from 1 and clipping acts."""
    minibatches: int = 1
    """Optimiser steps per pass, each on its share of the questions."""
    micro_batch: int | None = None
    """Questions per forward and backward pass. Fewer need less memory and give the same gradient,
    except with --top-entropy, --clip-cov, --kl-cov and --second-moment, which compare the tokens of
    a micro-batch. None: all at once."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun. ddp: each process has the whole model; fsdp: weights, gradients and AdamW's
    moments are sharded (FSDP2)."""
    reference_refresh: int | None = None
    """Copy the policy into the reference policy every so many steps (DeepSeekMath's iterative
    GRPO)."""
    entropy_target: float | None = None
    """Target entropy in nats per token. The weight of the entropy bonus starts at --entropy-coef.
    It rises while the entropy is not above the target; otherwise it falls and is not applied
    (2505.22312)."""
    entropy_coef_step: float = 0.005
    """Change of that weight per step."""
    entropy_coef_max: float = 1.0
    """Upper bound of that weight."""


@dataclass(frozen=True)
class EvaluationSettings:
    """Evaluation on held-out questions, or a chat."""

    eval_every: int | None = None
    """Evaluate every so many steps as well, and not only before and after the training."""
    eval_questions: int = 128
    """Largest number of held-out questions."""
    pass_at: int | None = None
    """Also estimate pass@k from this many samples of each held-out question."""
    eval_only: bool = False
    """Evaluate and stop. --seed decides which questions are held out."""
    chat: bool = False
    """Chat with a model, such as --model runs/.../model. A trained one starts from the system
    prompt and worked examples of its run. --temperature is then 0.7 by default."""


@dataclass(frozen=True)
class RunSettings:
    """Hardware, output and checkpoints."""

    seed: int = 0
    """Seed of question split, question order and sampling."""
    print_every: int = 8
    """Print a question with a sampled completion and its reward every so many steps."""
    dashboard_every: int = 10
    """Redraw curves.png every so many steps."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: bool = False
    """Log to Weights & Biases."""
    loss_impl: Literal["fused", "reference"] = "fused"
    """The fused losses of grpo_kernels, or their reference implementation in plain PyTorch."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda if available, then mps, then cpu."""
    threads: int | None = None
    """CPU threads of PyTorch. None: PyTorch's choice."""
    output_dir: Path | None = None
    """New or empty directory for all output of the run. None: a new one in runs/."""
    overwrite: bool = False
    """Replace the run in --output-dir."""
    checkpoint_every: int | Literal["auto"] | None = "auto"
    """Save a checkpoint for --resume every so many steps and after the last. It takes three times
    the size of the trained weights. auto: about every two minutes, and less often where saving
    takes more than a tenth of the time. None: only when the run is interrupted."""
    keep_checkpoints: int = 2
    """Number of checkpoints to keep, the newest ones. The end of the run keeps one."""
    resume: Path | None = None
    """Directory of a run that was stopped. It continues from its last checkpoint with its settings;
    --steps and settings of output may change."""
    accept_changes: bool = False
    """Resume even if the data or the file of a reward has changed since the run was started."""
    cache_dir: Path | None = None
    """Directory for downloaded models. None: $GRPO_KERNELS_CACHE, else
    $XDG_CACHE_HOME/grpo_kernels, else ~/.cache/grpo_kernels."""


LOSS_SETTINGS = tuple(setting.name for setting in fields(LossConfig))


def make_loss_settings() -> type:
    """Make the class of --loss and of a flag for each field of LossConfig.

    The flags are None unless given, which keeps the objective's value. No objective sets beta and
    kl_estimator: they have LossConfig's defaults.
    """
    types = get_type_hints(LossConfig)
    types["kl_estimator"] = Literal[tuple(SAMPLED_KL)]  # others need the reference policy's logits
    objectives = LossConfig.objectives()
    flags: list[tuple[str, Any, Any]] = [("loss", Literal[tuple(objectives)], "grpo")]
    for setting in fields(LossConfig):
        if setting.name in ("beta", "kl_estimator"):
            flags.append((setting.name, types[setting.name], setting.default))
        else:
            flags.append((setting.name, types[setting.name] | None, None))
    lines = [f"  {name}: {str(make.__doc__).splitlines()[0]}" for name, make in objectives.items()]
    doc = "The loss.\n\nA setting that is not None replaces that of the objective --loss:\n"
    namespace = {"__doc__": doc + "\n".join(lines)}
    return make_dataclass("LossSettings", flags, frozen=True, namespace=namespace)


LossSettings: Any = make_loss_settings()


def parse_options(flag: str, options: Sequence[str]) -> dict[str, Any]:
    """Return the values of name=value options by name; values that are not JSON are text."""
    found = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not name or not equals:
            raise UserError(f"{flag} must be name=value; got {option}")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def in_flags(text: str) -> str:
    """Write the names of LossConfig's fields in a text as flags."""

    def flag(match: re.Match) -> str:
        return "--" + match[1].replace("_", "-") + " " * bool(match[2])

    return re.sub(rf"\b({'|'.join(LOSS_SETTINGS)})\b(=?)", flag, text)


SECTIONS = {
    "model": ModelSettings,
    "task": TaskSettings,
    "sampling": SamplingSettings,
    "distillation": DistillationSettings,
    "advantage": AdvantageSettings,
    "loss": LossSettings,
    "update": UpdateSettings,
    "evaluation": EvaluationSettings,
    "run": RunSettings,
}


# What a loss of completions reads and a divergence does not.
UNUSED_WITH_TEACHER = (
    *("support", "dynamic_sampling", "overlong_buffer", "step_reward"),
    *(setting.name for setting in fields(AdvantageSettings)),
    *(setting.name for setting in fields(LossSettings)),
    *("reference_refresh", "entropy_target", "entropy_coef_step", "entropy_coef_max"),
)

# What concerns the KL to the reference policy, whose place a teacher takes.
OF_REFERENCE_KL = ("beta", "kl_estimator", "reference_refresh")

POSITIVE = (
    "temperature",
    "learning_rate",
    "max_grad_norm",
    "lora_alpha",
    "sampler_timeout",
    "entropy_coef_step",
    "entropy_coef_max",
    "max_sampler_difference",
)
MINIMA = {
    "steps": 1,
    "prompts": 1,
    "group_size": 2,  # a group of one has no spread: its advantages are all 0
    "max_new_tokens": 1,
    "inner_iterations": 1,
    "minibatches": 1,
    "warmup_steps": 0,
    "top_k": 0,
    "dynamic_sampling": 0,
    "overlong_buffer": 0,
    "pass_k": 2,  # the best of one is its own reward
    "print_every": 1,
    "dashboard_every": 1,
    "eval_questions": 1,
    "eval_every": 1,
    "pass_at": 1,
    "reference_refresh": 1,
    "micro_batch": 1,
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
    "threads": 1,
    "lora_rank": 1,
}


@dataclass(frozen=True)
class TrainConfig(  # a dataclass lists the fields of its last base first
    RunSettings,
    EvaluationSettings,
    UpdateSettings,
    LossSettings,
    AdvantageSettings,
    DistillationSettings,
    SamplingSettings,
    TaskSettings,
    ModelSettings,
):
    """Train a language model with GRPO on a task whose answers can be checked.

    --preset chooses the defaults shown below: smollm2-135m (SmolLM2-135M-Instruct learns to add),
    tiny (75k parameters from scratch learn to reverse digits, under a minute on a CPU) or
    llama-3.2-1b (Llama-3.2-1B-Instruct on GSM8K, for a GPU). Every other flag overrides the preset.
    """

    preset: Literal["smollm2-135m", "tiny", "llama-3.2-1b"] = "smollm2-135m"
    """The set of defaults to start from."""

    def __post_init__(self) -> None:
        for name, minimum in MINIMA.items():
            value = getattr(self, name)
            if name == "group_size" and self.distils_only:
                minimum = 1  # nothing is compared
            holds = value is None or value == "auto" or value >= minimum
            self._require(name, holds, f"at least {minimum}")
        for name in POSITIVE:
            value = getattr(self, name)
            holds = value is None or (math.isfinite(value) and value > 0)
            self._require(name, holds, "a positive number")
        for name in ("beta", "entropy_coef", "entropy_target"):
            value = getattr(self, name)
            self._require(name, value is None or 0 <= value < math.inf, "at least 0")
        self._require("vllm_memory", 0 < self.vllm_memory < 1, "above 0 and below 1")
        self._require("jsd_weight", 1e-6 <= self.jsd_weight <= 1 - 1e-6, "1e-6 to 1 - 1e-6")
        coef = self.teacher_coef
        self._require("teacher_coef", coef is None or 0 < coef < math.inf, "a positive number")
        top_p, min_p = self.top_p, self.min_p
        self._require("top_p", top_p is None or 0 < top_p <= 1, "above 0 and at most 1")
        self._require("min_p", min_p is None or 0 <= min_p <= 1, "0 to 1")
        self._require(
            "overlong_buffer", self.overlong_buffer < self.max_new_tokens, "below --max-new-tokens"
        )
        self._require("seed", -(2**63) <= self.seed < 2**64, "a number of 64 bits")
        self._require("minibatches", self.minibatches <= self.prompts, "at most --prompts")
        self._require("ema_decay", 0 <= self.ema_decay < 1, "at least 0 and below 1")
        if self.advantage == "pass_at_k":
            self._require("pass_k", self.pass_k <= self.group_size, "at most --group-size")
        for wrong, message in self._contradictions():
            if wrong:
                raise UserError(message)
        if self.entropy_target is not None:
            start = self.loss_config().entropy_coef
            self._require(
                "entropy_coef_max", self.entropy_coef_max >= start, f"at least the start, {start}"
            )

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} must be {expected}; got {getattr(self, name)}")

    def _contradictions(self) -> list[tuple[bool, str]]:
        """Return pairs (whether it applies, message) of settings that exclude each other."""
        scratch, lora = self.model == "scratch", self.lora_rank is not None
        refresh = self.reference_refresh is not None
        fixed_length = self.loss == "dr_grpo" or self.aggregation == "fixed_length"
        per_prompt = self.completions_per_prompt
        each_reward = self.normalise_each_reward
        truncates = self.truncation is not None
        continuous = self.sampler == "continuous"
        defaults = {setting.name: setting.default for setting in fields(self)}
        has_coef = self.teacher_coef is not None
        names = OF_REFERENCE_KL if has_coef else UNUSED_WITH_TEACHER
        unused = [name for name in names if getattr(self, name) != defaults[name]]
        flags = [("--no-" if x == "support" else "--") + x.replace("_", "-") for x in unused]
        return [
            (
                self.distils_only and bool(unused),
                "--teacher: the loss is the divergence from the teacher, without rewards: not with "
                f"{', '.join(flags)}; --teacher-coef adds it to a loss of the rewards",
            ),
            (
                self.teacher is None and has_coef,
                "--teacher-coef is the weight of the KL to a --teacher: name one",
            ),
            (
                has_coef and bool(unused),
                "--teacher-coef: the KL in the loss is that to the teacher, and not to a reference "
                f"policy: not with {', '.join(flags)}",
            ),
            (
                has_coef and self.distill == "jsd",
                "--teacher-coef adds a KL to the loss of the rewards: set --distill reverse or "
                "forward; jsd is a loss by itself",
            ),
            (
                self.distill != "jsd" and self.jsd_weight != defaults["jsd_weight"],
                "--jsd-weight is the weight of the teacher in --distill jsd: set that",
            ),
            (
                self.teacher is None and self.distill != defaults["distill"],
                "--distill chooses the divergence from a --teacher: name one",
            ),
            (
                self.teacher == "scratch",
                "--teacher scratch has learnt nothing: name a directory or a model of the hub",
            ),
            (
                not self.support and not truncates,
                "--no-support concerns --top-k, --top-p and --min-p: set one of them",
            ),
            (
                (self.top_k == 1 or self.min_p == 1)
                and self.support
                and not (self.eval_only or self.chat),
                "--top-k 1 and --min-p 1 keep one token, whose log-prob is always 0: nothing would "
                "be learned",
            ),
            (
                (
                    self.stale_sampler
                    or self.weights_dir is not None
                    or self.sampler_timeout != defaults["sampler_timeout"]
                )
                and not self.names_server,
                "--stale-sampler, --weights-dir and --sampler-timeout concern a server: name it "
                "with --sampler URL",
            ),
            (
                self.stale_sampler and self.weights_dir is not None,
                "--weights-dir passes on new weights, and --stale-sampler does without: choose one",
            ),
            (
                (self.vllm_memory != defaults["vllm_memory"] or bool(self.vllm_options))
                and self.sampler != "vllm",
                "--vllm-memory and --vllm-options concern the engine of --sampler vllm: set that",
            ),
            (
                continuous and bool(self.min_p),
                "--min-p: the continuous batching of transformers has none: take --sampler "
                "shared-prompt or generate",
            ),
            (
                continuous and truncates and self.support and not self.distils_only,
                "--sampler continuous does not return the tokens that --top-k and --top-p keep: "
                "take shared-prompt or generate, or train without them with --no-support",
            ),
            (
                self.async_rollout and not self.support,
                "--async-rollout: the sampler's log-probs are the old ones of the loss, which have "
                "to be normalised over the same tokens: not with --no-support",
            ),
            (
                self.async_rollout and self.stale_sampler,
                "--async-rollout trains on completions that are one step old, and --stale-sampler "
                "on those of a fixed model: choose one",
            ),
            (
                self.max_sampler_difference is not None and self.stale_sampler,
                "--max-sampler-difference stops a run whose sampler is not in step, and "
                "--stale-sampler means that it is not: choose one",
            ),
            (self.chat and self.eval_only, "--chat and --eval-only: choose one"),
            (
                self.resume is not None and (self.chat or self.eval_only),
                "--resume goes on with training: for --chat and --eval-only name --model",
            ),
            (
                self.resume is not None and self.overwrite,
                "--resume goes on with a run, and --overwrite removes it: choose one",
            ),
            (
                self.overwrite and self.output_dir is None,
                "--overwrite replaces the run in --output-dir: name one",
            ),
            (
                self.dynamic_sampling > 0 and self.step_reward is not None,
                "--dynamic-sampling compares whole completions: not with --step-reward",
            ),
            (
                self.dynamic_sampling > 0 and each_reward,
                "--dynamic-sampling looks at sums of rewards: not with --normalise-each-reward",
            ),
            (
                self.dynamic_sampling > 0 and self.advantage in ("reinforce_plus_plus", "ema"),
                "--dynamic-sampling replaces groups of equal rewards, from which --advantage "
                f"{self.advantage} learns",
            ),
            (
                self.advantage is not None and each_reward,
                "--normalise-each-reward is an advantage of its own: not with --advantage",
            ),
            (
                self.advantage == "max_rl" and self.overlong_buffer > 0,
                "--advantage max_rl needs rewards of at least 0: not with --overlong-buffer",
            ),
            (
                self.overlong_buffer > 0 and each_reward,
                "--normalise-each-reward would make a full reward of the small penalty: not with "
                "--overlong-buffer",
            ),
            (
                self.loss == "dr_grpo" and each_reward,
                "--loss dr_grpo divides by no standard deviation: not with --normalise-each-reward",
            ),
            (
                self.max_completion_length is not None and not fixed_length,
                "--max-completion-length is the denominator of --aggregation fixed_length; the "
                "longest completion is --max-new-tokens",
            ),
            (
                per_prompt is not None and per_prompt != self.group_size,
                "--completions-per-prompt is --group-size in this script: leave it out",
            ),
            (
                self.kl_estimator != "k3" and self.beta == 0,
                "--kl-estimator estimates a KL that counts nothing: set --beta above 0",
            ),
            (
                scratch and self.task != "reverse",
                "--model scratch learns --task reverse only: its tokenizer has no other characters",
            ),
            (scratch and lora, "--lora-rank adapts a trained model, and --model scratch is none"),
            (
                refresh and self.beta == 0,
                "--reference-refresh needs a reference: set --beta above 0",
            ),
            (
                self.parallel == "fsdp" and lora,
                "--lora-rank trains too little for shards: not with --parallel fsdp",
            ),
            (
                self.parallel == "fsdp" and refresh,
                "--reference-refresh copies the whole model: not with --parallel fsdp",
            ),
            (
                refresh and lora,
                "--reference-refresh: with --lora-rank the reference is the base model",
            ),
        ]

    @property
    def truncation(self) -> Truncation | None:
        """The truncation of --top-k, --top-p and --min-p; None if they drop no tokens."""
        rules = {"top_k": self.top_k or 0, "top_p": self.top_p or 1.0, "min_p": self.min_p or 0.0}
        if rules == {"top_k": 0, "top_p": 1.0, "min_p": 0.0}:
            return None
        return Truncation(**rules, return_support=self.support and not self.distils_only)

    @property
    def distils_only(self) -> bool:
        """The loss is the divergence from a teacher, without rewards."""
        return self.teacher is not None and self.teacher_coef is None

    def as_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON, without --resume, --accept-changes and --overwrite.

        A resumed run then has the same settings as one that ran without a stop.
        """
        settings = asdict(self) | {"resume": None, "accept_changes": False, "overwrite": False}
        return json.loads(json.dumps(settings, default=str))

    def task_settings(self) -> dict[str, Any]:
        """Return --task-option by name; values that are not JSON are text."""
        return parse_options("--task-option", self.task_option)

    def loss_config(self) -> LossConfig:
        """Return the objective --loss with the settings that the flags replace.

        Raises:
            UserError: the settings contradict each other.
        """
        given = {name: getattr(self, name) for name in LOSS_SETTINGS}
        given = {name: value for name, value in given.items() if value is not None}
        if self.teacher_coef is not None:
            given |= {"beta": self.teacher_coef, "kl_estimator": self.distill}
        aggregation = self.aggregation or ("fixed_length" if self.loss == "dr_grpo" else None)
        if aggregation == "fixed_length":
            given.setdefault("max_completion_length", self.max_new_tokens)
        elif aggregation == "prompt_mean":
            given.setdefault("completions_per_prompt", self.group_size)
        if aggregation != "fixed_length" and self.loss == "dr_grpo":
            given.setdefault("max_completion_length", None)  # an argument that it requires
        try:
            return LossConfig.objectives()[self.loss](**given)
        except (TypeError, ValueError) as error:
            raise UserError(f"--loss {self.loss}: {in_flags(one_line(error))}") from error

    def check_loss(self) -> None:
        """Raise a UserError if the settings of the loss contradict each other or the update's."""
        loss = self.loss_config()
        if loss.kl_cov is not None and self.inner_iterations * self.minibatches == 1:
            raise UserError(
                f"--loss {self.loss}: --kl-cov acts from a batch's second optimiser step on: set "
                "--inner-iterations or --minibatches above 1"
            )
