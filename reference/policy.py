"""A language model with what it takes to ask it questions: tokenizer, device, end tokens."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reference import causal_lm, models
from reference.errors import UserError
from reference.rollout import Completions, Prompts, completion_states, encode, generate
from reference.tasks import Question, Task

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Answers:
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

    @classmethod
    def load(
        cls,
        directory,
        device: torch.device,
        max_new_tokens: int,
        forward: Callable = causal_lm.forward,
    ) -> Policy:
        model, tokenizer = models.load(directory)
        # Dropout, where a model has it, would make sampler and trainer two different policies.
        model.to(device).eval()
        eos_ids = models.end_of_sequence_ids(model, tokenizer)
        return cls(model, tokenizer, device, eos_ids, max_new_tokens, forward)

    def frozen_copy(self) -> Policy:
        return replace(self, model=copy.deepcopy(self.model).requires_grad_(False))

    def ask(self, questions: Sequence[Question], group_size: int, temperature: float) -> Answers:
        """Sample `group_size` answers to each question; temperature 0 is greedy."""
        prompts = encode(self.tokenizer, [question.text for question in questions], self.device)
        with self.autocast():
            completions = generate(
                self.model,
                prompts,
                group_size=group_size,
                max_new_tokens=self.max_new_tokens,
                eos_ids=self.eos_ids,
                pad_id=self.tokenizer.pad_token_id,
                temperature=temperature,
            )
        rows = zip(completions.tokens, completions.mask, strict=True)
        texts = [self.tokenizer.decode(row[mask], skip_special_tokens=True) for row, mask in rows]
        return Answers(prompts, completions, texts)

    def states(self, prompts: Prompts, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        """The states [B·G, T, ...] from which the tokens were drawn, with gradient, and the head
        that scores tokens by them: hidden states or, of the plain twin, logits."""
        with self.autocast():
            return completion_states(self.forward, self.model, prompts, tokens, mask)

    def accuracy(
        self, task: Task, questions: Sequence[Question], temperature: float = 0.0
    ) -> float:
        """The share of questions answered right, with one answer each."""
        right = 0
        for start in range(0, len(questions), EVALUATION_BATCH):
            batch = questions[start : start + EVALUATION_BATCH]
            texts = self.ask(batch, 1, temperature).texts
            right += sum(task.correct(text, q.answer) for text, q in zip(texts, batch, strict=True))
        return right / len(questions)

    def autocast(self):
        """bf16 on a CUDA device, with fp32 weights; nothing elsewhere."""
        if self.device.type == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()


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
