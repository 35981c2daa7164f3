"""The measured sizes: the LM heads of three models, and variations around one base shape.

A full grid of tokens, dtypes, masks and models would have thousands of cases. Instead, one base
shape is measured in every phase by every peer, and one axis at a time is varied from there.
"""

from dataclasses import dataclass, replace

import torch

from grpo_kernels.lm_head.chunk_loop import memory_of

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Head:
    """Sizes of the output layer of a language model."""

    V: int  # vocabulary
    H: int  # hidden size


HEADS = {
    "Llama 3.2 1B": Head(128_256, 2048),
    "Qwen3 0.6B": Head(151_936, 1024),
    "Qwen2.5 0.5B": Head(151_936, 896),
    "SmolLM2 135M": Head(49_152, 576),
    # A row of an odd number of tokens does not begin at a multiple of 16 bytes.
    "Llama 3.2 1B + 1": Head(128_257, 2048),
    "GPT-2": Head(50_257, 768),
    "Llama 2 + 1": Head(32_001, 4096),
    "tiny + 1": Head(67, 16),
    "tiny": Head(512, 32),  # no model's: for runs that take milliseconds
}


@dataclass(frozen=True)
class Shape:
    """N tokens under the LM head of a model."""

    model: str
    N: int
    dtype: str = "bf16"
    masked: float = 0.0  # share of masked tokens, at the end of each sequence
    inert: float = 0.0  # share of sequences with advantage 0, such as groups of equal rewards

    @property
    def head(self) -> Head:
        return HEADS[self.model]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def __str__(self) -> str:
        text = f"{self.model}, {self.N:,} tokens, {self.dtype}"
        text += f", {self.masked:.0%} masked" if self.masked else ""
        return text + (f", {self.inert:.0%} inert" if self.inert else "")


@dataclass(frozen=True)
class Plan:
    """The shapes for one kind of machine; those that do not fit its memory are left out."""

    base: Shape
    other_dtype: Shape
    tokens: tuple[int, ...]  # the other N
    others: tuple[Shape, ...]  # further heads

    def shapes(self, memory: int) -> list[Shape]:
        """Return the base shape and its variations that fit `memory` bytes."""
        variations = [
            *(replace(self.base, N=N) for N in self.tokens),
            self.other_dtype,
            replace(self.base, masked=0.5),
            replace(self.base, inert=0.4),
            *self.others,
        ]
        # The logits and their gradient take at most half, as there are tensors beside them.
        fitting = (
            shape
            for shape in variations
            if 2 * shape.N * shape.head.V * shape.torch_dtype.itemsize <= memory // 2
        )
        return [self.base, *fitting]


PLANS = {
    "cuda": Plan(
        base=Shape("Llama 3.2 1B", 8192),
        other_dtype=Shape("Llama 3.2 1B", 8192, "fp32"),
        tokens=(1, 64, 1024, 4096, 16_384, 65_536),
        others=(Shape("Qwen3 0.6B", 8192), Shape("SmolLM2 135M", 8192)),
    ),
    # Two cores multiply fp32 at 130 GFLOP/s, and bf16 at 1 without units for it: all cases have to
    # take less than ten minutes there. Models are trained in fp32 on a CPU.
    "cpu": Plan(
        base=Shape("SmolLM2 135M", 64, "fp32"),
        other_dtype=Shape("SmolLM2 135M", 64, "bf16"),
        tokens=(1, 256),
        others=(Shape("Llama 3.2 1B", 32, "fp32"),),
    ),
}


def shapes(device: torch.device, *, quick: bool) -> list[Shape]:
    """Return the shapes of a device, the base first.

    quick: the same variations at a size that takes milliseconds.
    """
    planned = PLANS[device.type].shapes(memory_of(device))
    if not quick:
        return planned
    tiny = (replace(shape, model="tiny", N=min(shape.N, 64)) for shape in planned)
    return list(dict.fromkeys(tiny))
