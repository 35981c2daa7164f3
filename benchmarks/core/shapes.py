"""Which sizes are measured: the heads of three models, and variations around one base shape.

A full grid of tokens, dtypes, masks and models would be thousands of cases. One base shape is
measured in every phase by every peer, and each axis is varied from there, the others held.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from grpo_kernels.lm_head.chunk_loop import memory_of

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Head:
    """The output layer of a language model."""

    V: int  # entries of the vocabulary
    H: int  # hidden size


HEADS = {
    "Llama 3.2 1B": Head(128_256, 2048),
    "Qwen3 0.6B": Head(151_936, 1024),
    "SmolLM2 135M": Head(49_152, 576),
}


@dataclass(frozen=True)
class Shape:
    """N tokens under the head of a model.

    masked: the share of tokens that do not count, the end of each sequence.
    inert: the share of sequences whose advantage is 0, such as groups of equal rewards.
    """

    model: str
    N: int
    dtype: str = "bf16"
    masked: float = 0.0
    inert: float = 0.0

    @property
    def head(self) -> Head:
        return HEADS[self.model]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def __str__(self) -> str:
        marks = [f"{self.model}, {self.N:,} tokens, {self.dtype}"]
        marks += [f"{self.masked:.0%} masked"] if self.masked else []
        marks += [f"{self.inert:.0%} inert"] if self.inert else []
        return ", ".join(marks)


@dataclass(frozen=True)
class Plan:
    """What a kind of machine measures. Memory decides on top of it which shapes are left out."""

    base: Shape
    other_dtype: Shape
    tokens: tuple[int, ...]  # the other N
    others: tuple[Shape, ...]  # further heads

    def shapes(self, memory: int) -> list[Shape]:
        """The base first, then its variations, as far as they fit `memory` bytes."""
        return [self.base, *(each for each in self._variations() if fits(each, memory))]

    def _variations(self) -> Iterator[Shape]:
        base = self.base
        yield from (replace(base, N=N) for N in self.tokens)
        yield self.other_dtype
        yield replace(base, masked=0.5)
        yield replace(base, inert=0.4)
        yield from self.others


PLANS = {
    "cuda": Plan(
        base=Shape("Llama 3.2 1B", 8192),
        other_dtype=Shape("Llama 3.2 1B", 8192, "fp32"),
        tokens=(1, 64, 1024, 4096, 16_384, 65_536),
        others=(Shape("Qwen3 0.6B", 8192), Shape("SmolLM2 135M", 8192)),
    ),
    # Two cores multiply fp32 at 130 GFLOP/s, and bf16 at 1 where they have no units for it: the
    # whole has to take less than ten minutes there. Models are trained in fp32 on a CPU.
    "cpu": Plan(
        base=Shape("SmolLM2 135M", 64, "fp32"),
        other_dtype=Shape("SmolLM2 135M", 64, "bf16"),
        tokens=(1, 256),
        others=(Shape("Llama 3.2 1B", 32, "fp32"),),
    ),
}


def fits(shape: Shape, memory: int) -> bool:
    """Whether the logits, their gradient and what lies beside them fit half of the memory."""
    return 2 * shape.N * shape.head.V * shape.torch_dtype.itemsize <= memory // 2


def tiny(shape: Shape) -> Shape:
    """The same case at a size that takes milliseconds; its head is that of no model."""
    return replace(shape, model="tiny", N=min(shape.N, 64))


HEADS["tiny"] = Head(512, 32)


def shapes(device: torch.device, *, quick: bool) -> list[Shape]:
    """Those of a device, without repetition; `quick`: the same variations, tiny."""
    found = PLANS[device.type].shapes(memory_of(device))
    return list(dict.fromkeys(map(tiny, found))) if quick else found
