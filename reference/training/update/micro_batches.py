"""What the update works through: parts that fit into memory, and minibatches made of them.

Sizes: B questions, G answers to each, T tokens of an answer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from reference.training.errors import UserError
from reference.training.guards import is_out_of_memory
from reference.training.rollout.generate import Prompts

T = TypeVar("T")


@dataclass
class Part:
    """What one forward and backward pass works on: B questions and B·G answers."""

    prompts: Prompts
    tokens: Tensor  # [B·G, T]
    mask: Tensor  # [B·G, T], the tokens that the model was fed
    counted: Tensor  # [B·G, T], those of them that are in the loss
    advantages: Tensor  # [B·G] or [B·G, T]
    sampling_logprob: Tensor  # [B·G, T]
    old_logprob: Tensor | None = None  # [B·G, T], where there is more than one optimiser step
    ref_logprob: Tensor | None = None  # [B·G, T], where beta asks for a KL

    @property
    def questions(self) -> int:
        return len(self.prompts.ids)

    def split(self, size: int) -> list[Part]:
        """Parts of at most `size` questions, each cut to its longest answer."""
        if self.questions <= size:
            return [self]
        G = len(self.tokens) // self.questions
        return [self._at(start, size, G) for start in range(0, self.questions, size)]

    def _at(self, start: int, size: int, G: int) -> Part:
        rows = slice(start * G, (start + size) * G)
        longest = int(self.mask[rows].sum(-1).max())
        found = {"prompts": self.prompts[slice(start, start + size)]}
        for name in (each.name for each in fields(self) if each.name != "prompts"):
            value = getattr(self, name)
            if value is not None:
                value = value[rows] if value.dim() == 1 else value[rows, :longest]
            found[name] = value
        return Part(**found)


@dataclass(frozen=True)
class Minibatch:
    """What one optimiser step works on; left-out groups are in the denominators."""

    parts: list[Part]
    denominators: dict[str, int]

    def split(self, size: int) -> None:
        """Make its parts no larger than this many questions; the denominators stay."""
        self.parts[:] = [piece for part in self.parts for piece in part.split(size)]


class MicroBatch:
    """How many questions go through a pass together; halved where memory does not suffice.

    Args:
        size: None is a whole minibatch.
    """

    def __init__(self, size: int | None) -> None:
        self.size, self.halved = size, False

    def run(
        self, minibatch: Minibatch, work: Callable[[Minibatch], T], when: str, *, may_halve: bool
    ) -> T:
        """Do the work on parts of this size; once in a run it begins again with half of it.

        The gradient is a sum over parts, each divided by the denominators of the whole: it stays.

        Args:
            work: begins anew each time that it is called.
            may_halve: False where tokens are compared within a part.

        Raises:
            UserError: memory does not suffice for half of it either.
        """
        while True:
            if self.size is not None:
                minibatch.split(self.size)
            try:
                return work(minibatch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Behind the handler, since its traceback holds the activations.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._halve(max(part.questions for part in minibatch.parts), when, may_halve)

    def _halve(self, largest: int, when: str, may_halve: bool) -> None:
        trouble = f"out of memory in {when} with micro-batches of {largest} questions"
        if self.halved or largest == 1 or not may_halve:
            raise UserError(
                f"{trouble}: lower --micro-batch, --max-new-tokens or --group-size, or set "
                "--gradient-checkpointing"
            )
        self.size, self.halved = largest // 2, True
        print(f"{trouble}: from here on {self.size}; the gradient is the same", file=sys.stderr)

    def state_dict(self) -> dict[str, int | None]:
        return {"halved_to": self.size if self.halved else None}

    def load_state_dict(self, state: Mapping[str, int | None]) -> None:
        """A size below the one it was halved to stays; a line where another does not."""
        size = state["halved_to"]
        if size is None:
            return
        if self.size is None or self.size > size:
            self.size = size
            print(f"micro-batches of {size} questions, since memory did not suffice for more")
        self.halved = True
