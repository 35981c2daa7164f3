"""A language model with what it takes to ask it questions: tokenizer, device, end tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from reference.training.distributed import ALONE, Ranks
from reference.training.errors import UserError
from reference.training.guards import enough_memory
from reference.training.model import load as models
from reference.training.model import lora
from reference.training.model import plain_scorer as causal_lm
from reference.training.model.activation_checkpointing import (
    checkpointable_layers,
    recompute_activations,
)
from reference.training.rollout.generate import (
    Completions,
    Prompts,
    completion_states,
    encode,
    encode_messages,
)
from reference.training.rollout.samplers import Sampler, shared_prompt
from reference.training.tasks.tasks import Question

Precision = Literal["auto", "bf16", "off"]


@dataclass(frozen=True)
class SampledCompletions:
    """Completions of prompts, in tokens and in words."""

    prompts: Prompts
    completions: Completions
    texts: list[str]


@dataclass(frozen=True)
class Policy:
    """A model and how it is asked."""

    model: Any
    tokenizer: Any
    device: torch.device
    eos_ids: list[int]
    max_new_tokens: int
    forward: Callable = causal_lm.forward  # runs the model but for its head
    system: str | None = None  # the system prompt
    precision: Precision = "auto"  # of `autocast`
    gradient_checkpointing: bool = False
    sampler: Sampler = shared_prompt  # who answers where nobody else is named
    ranks: Ranks = ALONE  # who ask at the same time, each its share

    @classmethod
    def load(
        cls,
        model: str | Path,
        device: torch.device,
        max_new_tokens: int,
        forward: Callable = causal_lm.forward,
        *,
        cache_dir: Path | None = None,
        random_weights: bool = False,
        lora_rank: int | None = None,
        lora_alpha: float = 32.0,
        gradient_checkpointing: bool = False,
        autocast: Precision = "auto",
        system: str | None = None,
        sampler: Sampler = shared_prompt,
    ) -> Policy:
        """The policy of a model, with fp32 weights and without dropout.

        Args:
            model: as `models.locate` takes it.
            random_weights: its architecture alone; nothing is located.
            lora_rank, lora_alpha: of the adapters that train; without a rank the whole model does.
            gradient_checkpointing: recompute activations in the backward pass.
            autocast: of the forward pass; "auto" is bf16 on a CUDA device and off elsewhere.
            system: the system prompt of every question.
            sampler: who answers where `ask` names nobody.

        Raises:
            UserError: of the models or the adapters; there are no layers to recompute.
        """
        if lora_rank is not None:
            lora.load_peft()
        if random_weights:
            net, tokenizer = models.random_weights(str(model), device)
        else:
            net, tokenizer = models.load(models.locate(str(model), cache_dir))
        if gradient_checkpointing and not checkpointable_layers(net):
            raise UserError(
                f"--gradient-checkpointing: {type(net).__name__} has no layers to recompute"
            )
        eos_ids = models.end_of_sequence_ids(net, tokenizer)
        if lora_rank is not None:
            net = lora.add_lora(net, lora_rank, lora_alpha)
        # Dropout, where a model has it, would make sampler and trainer two different policies.
        net.to(device).eval()
        settings = (forward, system, autocast, gradient_checkpointing, sampler)
        return cls(net, tokenizer, device, eos_ids, max_new_tokens, *settings)

    def sample(
        self,
        questions: Sequence[Question],
        group_size: int,
        temperature: float,
        sampler: Sampler | None = None,
    ) -> SampledCompletions:
        """Sample `group_size` answers to each question; temperature 0 is greedy."""
        texts = [question.text for question in questions]
        prompts = encode(self.tokenizer, texts, self.device, system=self.system)
        remedy = "lower --prompts, --group-size or --max-new-tokens"
        with enough_memory("answers were sampled", remedy):
            completions = (sampler or self.sampler)(self, prompts, group_size, temperature)
        return SampledCompletions(prompts, completions, self._texts(completions))

    def chat_reply(
        self, messages: list[dict[str, str]], temperature: float, max_new_tokens: int
    ) -> str:
        """What the model says next in a conversation.

        Args:
            messages: {"role": ..., "content": ...}, in turn; the system prompt goes before them
                where they bring none.
        """
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        prompts = encode_messages(self.tokenizer, [messages], self.device)
        longer = replace(self, max_new_tokens=max_new_tokens)
        return self._texts(self.sampler(longer, prompts, 1, temperature))[0]

    def hidden_states(self, prompts: Prompts, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        """The states [B·G, T, ...] from which the tokens were drawn, with gradient, and the head
        that scores tokens by them: hidden states or, of the plain twin, logits."""
        recompute = recompute_activations if self.gradient_checkpointing else nullcontext
        with self.autocast(), recompute(self.model):
            return completion_states(self.forward, self.model, prompts, tokens, mask)

    def frozen_copy(self) -> Policy | WithoutAdapter:
        """What the KL is measured against, frozen: with LoRA the model before its adapter, which
        costs nothing; else a copy of the policy as it is now.

        Under autocast the copy has the weights of linear layers in bf16, to which each pass rounds
        them anyway: the numbers are the policy's, in little more than half the memory. Embeddings,
        a head tied to them, and norms stay fp32.
        """
        if lora.has_adapter(self.model):
            return WithoutAdapter(self)
        frozen = lora.frozen_copy(self.model, torch.bfloat16 if self._uses_bf16 else None)
        return replace(self, model=frozen)

    def model_to_save(self):
        """The model, with its adapter, if it has one, added into its weights."""
        return lora.merged(self.model)

    def autocast(self) -> AbstractContextManager:
        """bf16 with fp32 weights, or nothing, as `precision` says."""
        if self._uses_bf16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    @property
    def _uses_bf16(self) -> bool:
        return self.precision == "bf16" or (self.precision == "auto" and self.device.type == "cuda")

    def _texts(self, completions: Completions) -> list[str]:
        rows = zip(completions.tokens, completions.mask, strict=True)
        return [self.tokenizer.decode(row[mask], skip_special_tokens=True) for row, mask in rows]


@dataclass(frozen=True)
class WithoutAdapter:
    """The model that a LoRA policy started from."""

    policy: Policy

    def hidden_states(self, prompts: Prompts, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        """As `Policy.hidden_states`; without gradient, which would reach nothing."""
        with torch.no_grad(), lora.without_adapter(self.policy.model):
            return self.policy.hidden_states(prompts, tokens, mask)

    def autocast(self) -> AbstractContextManager:
        """As `Policy.autocast`."""
        return self.policy.autocast()


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is cuda where there is one, then mps, then cpu."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device {name}: PyTorch finds no such device here")
    return torch.device(name)
