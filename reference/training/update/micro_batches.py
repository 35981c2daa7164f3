"""Minibatches for one optimiser step each, split into micro-batches that fit into memory.

Sizes: B questions, G completions per question, T tokens per completion.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from grpo_kernels import LossConfig, TokenSupport
from reference.training.errors import UserError
from reference.training.guards import is_out_of_memory
from reference.training.rollout.generate import Prompts, number_tokens

T = TypeVar("T")


@dataclass
class MicroBatch:
    """Completions for one forward and backward pass."""

    prompts: Prompts
    tokens: Tensor  # [B·G, T]
    mask: Tensor  # [B·G, T], True on the tokens of a completion
    loss_mask: Tensor  # [B·G, T], True on those of them that are in the loss
    advantages: Tensor | None = None  # [B·G] or [B·G, T]
    sampling_logprob: Tensor | None = None  # [B·G, T]
    support: TokenSupport | None = None  # the tokens that a truncated distribution kept
    old_logprob: Tensor | None = None  # [B·G, T], with more than one optimiser step per batch
    nll_weight: Tensor | None = None  # [B·G, T], 1.0 on the tokens of correct completions
    ref_logprob: Tensor | None = None  # [B·G, T], with a KL to the reference policy
    is_idle: bool = False  # repeats a group, so that each rank makes as many passes; counts nothing
    teacher: Any = None  # the scorer's predictions of a teacher, if they are kept

    @property
    def num_questions(self) -> int:
        return len(self.prompts.ids)

    def select_groups(self, groups: Tensor) -> MicroBatch:
        """Return the completions of these questions, cut to the longest of them."""
        G = len(self.tokens) // self.num_questions
        rows = (groups[:, None] * G + torch.arange(G, device=groups.device)).flatten()
        longest = int(self.mask[rows].sum(-1).max())
        selected = {
            name: value[rows] if value.dim() == 1 else value[rows, :longest]
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        support = self.support
        if support is not None:
            support = support.select(number_tokens(self.tokens)[rows, :longest])
        selected |= {"prompts": self.prompts[groups], "support": support, "teacher": None}
        return replace(self, **selected)

    def split(self, size: int) -> list[MicroBatch]:
        """Split into micro-batches of at most `size` questions."""
        if self.num_questions <= size:
            return [self]
        groups = torch.arange(self.num_questions, device=self.tokens.device)
        return [self.select_groups(some) for some in groups.split(size)]


@dataclass(frozen=True)
class Minibatch:
    """Micro-batches of one optimiser step, with the denominators of their common loss.

    Groups without a learning signal may be left out of the micro-batches, but are counted in the
    denominators. They are in the `unused` micro-batches.
    """

    micro_batches: list[MicroBatch]
    denominators: dict[str, int]
    unused: list[MicroBatch] = field(default_factory=list)


def compares_tokens(loss: LossConfig) -> bool:
    """Return True if the loss compares the tokens of a micro-batch with each other."""
    return not (loss.top_entropy is loss.clip_cov is loss.kl_cov is loss.second_moment is None)


class MicroBatchSplitter:
    """Limits the number of questions per pass, and halves it once when memory runs out.

    Args:
        size: the number of questions; None: a whole minibatch.
        may_halve: False if the number of passes or their tokens must not change.
    """

    def __init__(self, size: int | None, *, may_halve: bool = True) -> None:
        self.size, self.may_halve, self.halved = size, may_halve, False

    def run(self, minibatch: Minibatch, work: Callable[[Minibatch], T], when: str) -> T:
        """Call `work` on the minibatch in micro-batches of this size; restart with half the size.

        The gradient is a sum over micro-batches, each divided by the denominators of the whole:
        halving does not change it. `work` starts from scratch in each call.
        """
        while True:
            if self.size is not None:
                pieces = [
                    piece for batch in minibatch.micro_batches for piece in batch.split(self.size)
                ]
                minibatch.micro_batches[:] = pieces
            try:
                return work(minibatch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside of the handler: the traceback holds the activations.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            largest = max(batch.num_questions for batch in minibatch.micro_batches)
            problem = f"out of memory in {when} with micro-batches of {largest} questions"
            if self.halved or largest == 1 or not self.may_halve:
                raise UserError(
                    f"{problem}: lower --micro-batch, --max-new-tokens or --group-size, or set "
                    "--gradient-checkpointing"
                )
            self.size, self.halved = largest // 2, True
            print(f"{problem}: from here on {self.size}; the gradient is the same", file=sys.stderr)

    def state_dict(self) -> dict[str, int | None]:
        return {"halved_to": self.size if self.halved else None}

    def load_state_dict(self, state: Mapping[str, int | None]) -> None:
        """Restore the halved size, unless the current size is smaller."""
        size = state["halved_to"]
        if size is None:
            return
        if self.size is None or self.size > size:
            self.size = size
            print(f"micro-batches of {size} questions, since memory did not suffice for more")
        self.halved = True
