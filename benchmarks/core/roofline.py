"""The limits: rates measured on this device in this run, and the least work of a task.

A roof is a rate, that of a copy or of torch.mm. A floor is a time, that of the counted bytes or
matmuls and nothing else, clocked like an implementation.
"""

from collections.abc import Callable
from functools import cache
from itertools import cycle

import torch
from torch import Tensor

from benchmarks.core import clock
from benchmarks.core.problem import Problem
from benchmarks.core.shapes import DTYPES
from benchmarks.core.tasks import Task
from grpo_kernels.lm_head.matmul import has_bf16_units

COPY_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}  # far more than any cache
# Sizes (n, k, m) of [n, k] @ [k, m]; the fastest is the roof, as no one size is fastest everywhere.
MATMUL_SIZES = {
    "cuda": ((8192, 2048, 16_384), (8192, 8192, 8192)),
    "cpu": ((512, 2048, 4096), (512, 576, 8192), (2048, 2048, 2048)),
}
VOCAB_TILE = 4096  # rows of the weight that are upcast at a time, on a CPU
FLOOR_TOKENS = 8192  # tokens whose logits the floor holds at a time


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Measure bytes per second, counting both what is read and what is written."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / clock.median_seconds(lambda: target.copy_(source))


@cache
def matmul_rate(device: torch.device, dtype: str) -> float:
    """Measure floating-point operations per second of torch.mm.

    A CPU without units for bf16 multiplies fp32 far faster: its roof for bf16 is that of fp32.
    """
    if device.type == "cpu" and dtype == "bf16" and not has_bf16_units():
        return matmul_rate(device, "fp32")
    rates = []
    for n, k, m in MATMUL_SIZES[device.type]:
        # Random numbers: a GPU multiplies zeros faster, as they take less power.
        a, b = (torch.randn(s, device=device).to(DTYPES[dtype]) for s in ((n, k), (m, k)))
        out = torch.empty(n, m, dtype=DTYPES[dtype], device=device)
        seconds = clock.median_seconds(lambda a=a, b=b, out=out: torch.mm(a, b.T, out=out))
        rates.append(2 * n * k * m / seconds)
    return max(rates)


def measure_roofs(device: torch.device) -> dict[str, float]:
    """Return the roofs of a result file, in GB/s and TFLOP/s."""
    rates = {f"TFLOP/s, {dtype}": matmul_rate(device, dtype) / 1e12 for dtype in DTYPES}
    return {"copy GB/s": copy_bandwidth(device) / 1e9, **rates}


def plain_copy(task: Task, phase: str, problem: Problem) -> Callable[[], object]:
    """Copy as many bytes as the task needs, half of them read and half written."""
    size = task.bytes(problem, phase) // 2
    copies = clock.copies_past_cache(size)
    sources = torch.ones(copies, size, dtype=torch.uint8, device=problem.logits.device)
    # Filled, because the first touch of memory costs a page fault.
    pairs = cycle(zip(sources, torch.ones_like(sources), strict=True))

    def run() -> None:
        source, target = next(pairs)
        target.copy_(source)

    return run


def bare_matmuls(task: Task, phase: str, problem: Problem) -> Callable[[], object]:
    """Multiply the active tokens: fp32 logits, gradients in the dtype of the operands.

    If fp32 is faster than bf16 on a CPU, the operands are upcast before the clock.
    """
    matmuls = task.matmuls(problem, phase)
    num_active, num_with_gradient = problem.num_active, task.num_with_gradient(problem)
    hidden, weight = problem.hidden.detach().flatten(0, -2), problem.weight.detach()
    weight = weight[: problem.head_rows]
    if not hidden.is_cuda and not has_bf16_units():
        hidden, weight = hidden.float(), weight.float()

    # Backward multiplies logits that forward left, if it does not make them again.
    left = None
    if not matmuls.logits and not matmuls.again:
        left = fp32_logits(hidden[: min(num_with_gradient, FLOOR_TOKENS)], weight)

    def run() -> None:
        logits = left
        for chunk in hidden[:num_active].split(FLOOR_TOKENS):
            for _ in range(matmuls.logits):
                logits = None  # its memory is free before the next are made
                logits = fp32_logits(chunk, weight)
        for chunk in hidden[:num_with_gradient].split(FLOOR_TOKENS):
            for _ in range(matmuls.again):
                logits = None
                logits = fp32_logits(chunk, weight)
            if matmuls.d_hidden or matmuls.d_weight:
                d_logits = logits[: len(chunk)].to(weight.dtype)
                for _ in range(matmuls.d_hidden):
                    torch.mm(d_logits, weight)
                for _ in range(matmuls.d_weight):
                    torch.mm(d_logits.T, chunk[: len(d_logits)])

    return run


def fp32_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Compute hidden [n, H] @ weight [V, H] transposed in fp32, whatever the operands' dtype."""
    if weight.dtype == torch.float32:
        return torch.mm(hidden, weight.T)
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    # On a CPU torch.mm returns the dtype of its operands: upcast the weight tile by tile.
    logits = torch.empty(len(hidden), len(weight))
    wide, upcast = hidden.float(), torch.empty(VOCAB_TILE, weight.shape[1])
    for start in range(0, len(weight), VOCAB_TILE):
        tile = weight[start : start + VOCAB_TILE]
        part = upcast[: len(tile)].copy_(tile)
        torch.mm(wide, part.T, out=logits[:, start : start + len(tile)])
    return logits


FLOORS = {"logits": ("plain copy", plain_copy), "hidden": ("bare products", bare_matmuls)}
