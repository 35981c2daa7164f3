"""A language model with what is needed to sample from it: tokenizer, device, end tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from grpo_kernels.integrations.transformers import unwrap
from reference.training.config import ModelSettings, TrainConfig
from reference.training.distributed import SINGLE_PROCESS, Ranks
from reference.training.errors import UserError
from reference.training.guards import out_of_memory_error
from reference.training.model import load as models
from reference.training.model import lora
from reference.training.model.activation_checkpointing import (
    checkpointable_layers,
    recompute_activations,
)
from reference.training.model.check import check_questions, choose_sampler, learned_positions
from reference.training.rollout.chat_template import Messages, common_opening
from reference.training.rollout.generate import Completions, Prompts, encode
from reference.training.rollout.sampler import Sampler
from reference.training.rollout.samplers import SharedPrompt
from reference.training.rollout.truncation import Truncation
from reference.training.tasks.tasks import Question


@dataclass(frozen=True)
class SampledCompletions:
    """Completions of prompts, as tokens and as texts."""

    prompts: Prompts
    completions: Completions
    texts: list[str]


@dataclass(frozen=True)
class Policy:
    """A model and the settings with which it samples and is trained.

    Attributes:
        system: the system prompt of every question.
        opening: the turns with which all questions begin, and a chat too.
        precision: the precision of `autocast`.
        sampler: the default of `sample`, and the sampler of `chat_reply`.
        truncation: top-k, top-p and min-p of every sampler, except where it is greedy.
        ranks: the ranks that sample at the same time, each its shard.
        without_adapter: run the base model of a LoRA model.
        max_positions: the length of the model's table of positions, if it has one.
        longest_prompt: tokens of the longest question of the task with its opening, 0 without one.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    eos_ids: list[int]
    max_new_tokens: int
    system: str | None = None
    opening: Sequence[dict[str, str]] = ()
    precision: Literal["auto", "bf16", "off"] = "auto"
    gradient_checkpointing: bool = False
    sampler: Sampler = field(default_factory=SharedPrompt)
    truncation: Truncation | None = None
    ranks: Ranks = SINGLE_PROCESS
    without_adapter: bool = False
    max_positions: int | None = None
    longest_prompt: int = 0

    @classmethod
    def load(
        cls,
        settings: ModelSettings,
        device: torch.device,
        max_new_tokens: int,
        *,
        cache_dir: Path | None = None,
        check: models.Check | None = None,
        **options: Any,
    ) -> Policy:
        """Load a model with fp32 weights and without dropout; the options are other attributes.

        Args:
            check: called with the tokenizer and the config before weights are read.
        """
        if settings.lora_rank is not None:
            lora.load_peft()
        model: Any  # transformers decorates `to` with a type that takes no device
        if settings.random_weights:
            model, tokenizer = models.random_weights(settings.model, device)
            if check is not None:
                check(tokenizer, model.config)
        else:
            model, tokenizer = models.load(models.locate(settings.model, cache_dir), check)
        if settings.gradient_checkpointing and not checkpointable_layers(model):
            raise UserError(
                f"--gradient-checkpointing: {type(model).__name__} has no layers to recompute"
            )
        eos_ids = models.end_of_sequence_ids(model, tokenizer)
        max_positions = learned_positions(model)
        if settings.lora_rank is not None:
            model = lora.add_lora(model, settings.lora_rank, settings.lora_alpha)
        # Dropout would make sampler and trainer two different policies.
        model.to(device).eval()
        return cls(
            model,
            tokenizer,
            device,
            eos_ids,
            max_new_tokens,
            precision=settings.autocast,
            gradient_checkpointing=settings.gradient_checkpointing,
            max_positions=max_positions,
            **options,
        )

    def encode(self, prompts: Sequence[str | Messages]) -> Prompts:
        """Encode prompts after the system prompt; their completions must fit the positions."""
        encoded = encode(self.tokenizer, prompts, self.device, system=self.system)
        longest = int(encoded.mask.sum(-1).max())
        # The last token of a completion is no input.
        if self.max_positions and longest + self.max_new_tokens - 1 > self.max_positions:
            name = type(unwrap(self.model)).__name__
            raise UserError(
                f"{name} has {self.max_positions} positions: expected a prompt and "
                f"--max-new-tokens within them; got a prompt of {longest} tokens and "
                f"--max-new-tokens {self.max_new_tokens}"
            )
        return encoded

    def sample(
        self,
        questions: Sequence[Question],
        group_size: int,
        temperature: float,
        sampler: Sampler | None = None,
    ) -> SampledCompletions:
        """Sample `group_size` completions of each question; temperature 0 is greedy."""
        prompts = self.encode([question.prompt for question in questions])
        remedy = "lower --prompts, --group-size or --max-new-tokens"
        with out_of_memory_error("answers were sampled", remedy):
            completions = (sampler or self.sampler).sample(self, prompts, group_size, temperature)
        return SampledCompletions(prompts, completions, self._texts(completions))

    def chat_reply(
        self, messages: list[dict[str, str]], temperature: float, max_new_tokens: int
    ) -> str:
        """Sample the next message; the system prompt comes first if the messages have none."""
        policy = replace(self, max_new_tokens=max_new_tokens)
        prompts = policy.encode([messages])
        return self._texts(self.sampler.sample(policy, prompts, 1, temperature))[0]

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Context of a forward pass to train on: autocast, and recomputed activations if asked."""
        recompute = recompute_activations if self.gradient_checkpointing else nullcontext
        adapter = self.model.disable_adapter() if self.without_adapter else nullcontext()
        with self.autocast(), adapter, recompute(self.model):
            yield

    def frozen_copy(self) -> Policy:
        """Return a reference policy: a copy of this policy, or with LoRA its base model.

        Under autocast the copy has the weights of linear layers in bf16. Each pass rounds them to
        bf16 anyway, so the numbers are the same in little more than half the memory. Embeddings, an
        LM head tied to them, and norms stay fp32.
        """
        if lora.has_adapter(self.model):
            return replace(self, without_adapter=True)
        frozen = lora.frozen_copy(self.model, torch.bfloat16 if self.uses_bf16 else None)
        return replace(self, model=frozen)

    def autocast(self) -> AbstractContextManager:
        """Return the autocast context of `precision`: bf16, or none."""
        if self.uses_bf16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    @property
    def uses_bf16(self) -> bool:
        """True if `autocast` is bf16."""
        return self.precision == "bf16" or (self.precision == "auto" and self.device.type == "cuda")

    def _texts(self, completions: Completions) -> list[str]:
        rows = zip(completions.tokens, completions.mask, strict=True)
        return [self.tokenizer.decode(row[mask], skip_special_tokens=True) for row, mask in rows]


def load_policy(
    config: TrainConfig,
    device: torch.device,
    sampler: Sampler,
    system: str | None,
    questions: Sequence[Question] = (),
    ranks: Ranks = SINGLE_PROCESS,
    check: models.Check | None = None,
) -> Policy:
    """Seed PyTorch, load the model of the settings and check it with some of the questions."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    if sampler.has_own_weights:  # evaluations sample from the model itself
        sampler = SharedPrompt()
    opening = common_opening([question.messages for question in questions])
    if config.chat:
        system, opening = models.load_opening(Path(config.model), system)
    policy = Policy.load(
        config,
        device,
        config.max_new_tokens,
        cache_dir=config.cache_dir,
        check=check,
        system=system,
        opening=opening,
        sampler=sampler,
        truncation=config.truncation,
        ranks=ranks,
    )
    longest_prompt = check_questions(policy, questions)
    return replace(policy, sampler=choose_sampler(policy), longest_prompt=longest_prompt)


def pick_device(name: str) -> torch.device:
    """Choose the device of a name; "auto" is cuda if available, else mps, else cpu."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, is_there in available.items() if is_there)
    if not available[name]:
        raise UserError(f"--device {name}: PyTorch finds no such device here")
    return torch.device(name)
