"""The settings of a run, and what they may be."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from reference.training.errors import UserError, one_line
from reference.training.loss_settings import LossSettings, in_flags
from reference.training.settings import (
    AdvantageSettings,
    EvaluationSettings,
    ModelSettings,
    RunSettings,
    SamplingSettings,
    TaskSettings,
    UpdateSettings,
)

SECTIONS = {
    "model": ModelSettings,
    "task": TaskSettings,
    "sampling": SamplingSettings,
    "advantage": AdvantageSettings,
    "loss": LossSettings,
    "update": UpdateSettings,
    "evaluation": EvaluationSettings,
    "run": RunSettings,
}


@dataclass(frozen=True)
class TrainConfig(  # whose fields are those of the last base first
    RunSettings,
    EvaluationSettings,
    UpdateSettings,
    LossSettings,
    AdvantageSettings,
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
        for name, minimum in _LEAST.items():
            value = getattr(self, name)
            self._require(name, value is None or value >= minimum, f"at least {minimum}")
        for name in _POSITIVE:
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value > 0, "a positive number")
        for name in ("beta", "entropy_coef", "entropy_target"):
            value = getattr(self, name)
            self._require(name, value is None or 0 <= value < math.inf, "at least 0")
        self._require(
            "overlong_buffer", self.overlong_buffer < self.max_new_tokens, "below --max-new-tokens"
        )
        self._require("minibatches", self.minibatches <= self.prompts, "at most --prompts")
        if self.advantage == "pass_at_k":
            self._require("pass_k", self.pass_k <= self.group_size, "at most --group-size")
        if self.entropy_target is not None:
            start = self.loss_fields().get("entropy_coef", 0.0)
            self._require(
                "entropy_coef_max", self.entropy_coef_max >= start, f"at least the start, {start}"
            )
        for wrong, message in self._contradictions():
            if wrong:
                raise UserError(message)

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} must be {expected}; got {getattr(self, name)}")

    def _contradictions(self) -> list[tuple[bool, str]]:
        """Of settings that each for itself would do."""
        scratch, lora = self.model == "scratch", self.lora_rank is not None
        refresh = self.reference_refresh is not None
        each_reward = self.normalise_each_reward
        return [
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
                "--dynamic-sampling looks at whole answers: not with --step-reward",
            ),
            (
                self.dynamic_sampling > 0 and each_reward,
                "--dynamic-sampling looks at sums of rewards: not with --normalise-each-reward",
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
                self.kl_estimator != "k3" and self.beta == 0,
                "--kl-estimator estimates a KL that counts nothing: set --beta above 0",
            ),
            (
                scratch and self.task != "reverse",
                "--model scratch learns --task reverse only: it can spell no other",
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

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON has them, paths as texts, and as if the run were begun and ended in
        one go."""
        settings = asdict(self) | {"resume": None, "overwrite": False}
        return json.loads(json.dumps(settings, default=str))

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

    def loss_fields(self) -> dict[str, Any]:
        """The keyword arguments of LossConfig."""
        found = super().loss_fields()
        if found.get("aggregation") == "fixed_length":
            found.setdefault("max_completion_length", self.max_new_tokens)
        return found

    def check_loss(self, loss_config: Callable[..., Any]) -> None:
        """Raise a UserError where a LossConfig that checks its arguments does not take these."""
        fields = self.loss_fields()
        try:
            loss_config(**fields)
        except (TypeError, ValueError) as error:
            raise UserError(f"--loss {self.loss}: {in_flags(one_line(error))}") from error
        if fields.get("kl_cov") is not None and self.inner_iterations * self.minibatches == 1:
            raise UserError(
                f"--loss {self.loss}: --kl-cov acts from a batch's second optimiser step on: set "
                "--inner-iterations or --minibatches above 1"
            )


_POSITIVE = (
    "temperature",
    "learning_rate",
    "max_grad_norm",
    "lora_alpha",
    "entropy_coef_step",
    "entropy_coef_max",
)
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
