"""What no implementation can undercut: the bytes moved or the products multiplied, and no more."""

from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor

from benchmarks.core import clock
from benchmarks.core.problem import Problem
from benchmarks.core.tasks import Products, Task
from grpo_kernels.lm_head.matmul import has_bf16_units

TILE = 4096  # entries of the vocabulary whose weight is upcast at a time, on a CPU


def plain_copy(task: Task, phase: str, problem: Problem) -> Callable[[], object]:
    """As many bytes as the task needs, half of them read and half written."""
    wanted = task.bytes(problem, phase) // 2
    copies = clock.copies(wanted)
    sources = torch.ones(copies, wanted, dtype=torch.uint8, device=problem.logits.device)
    # Filled, as memory that was never touched costs a page fault.
    pairs = cycle(zip(sources, torch.ones_like(sources), strict=True))

    def run() -> None:
        source, target = next(pairs)
        target.copy_(source)

    return run


def bare_products(task: Task, phase: str, problem: Problem) -> Callable[[], object]:
    """The products of the counted tokens: logits unrounded, gradients in the operands' dtype.

    The whole of the logits has to be somewhere: at most 8,192 tokens at a time. Where fp32 is
    faster than bf16, the operands are upcast before the clock.
    """
    count, attach_gradient = problem.counted, problem.counted
    if task.skips_inert:
        attach_gradient = problem.live
    cost: Products = task.cost[phase]
    weight = problem.weight.detach()
    hidden = problem.flat(problem.hidden).detach()
    if not hidden.is_cuda and not has_bf16_units():
        hidden, weight = hidden.float(), weight.float()

    def run() -> None:
        for part in hidden[:count].split(8192):
            logits = None
            for _ in range(cost.logits):
                logits = unrounded_logits(part, weight)
        if cost.gradients:
            for part in hidden[:attach_gradient].split(8192):
                d_logits = logits[: len(part)].to(weight.dtype)
                torch.mm(d_logits, weight)
                torch.mm(d_logits.T, part[: len(d_logits)])

    return run


def unrounded_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """[n, H] times [V, H], in fp32 whatever the operands."""
    if weight.dtype == torch.float32:
        return torch.mm(hidden, weight.T)
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    # A product of a CPU has its operands' dtype: the weight is upcast by tiles.
    logits = torch.empty(len(hidden), len(weight))
    wide, upcast = hidden.float(), torch.empty(TILE, weight.shape[1])
    for start in range(0, len(weight), TILE):
        tile = weight[start : start + TILE]
        part = upcast[: len(tile)].copy_(tile)
        torch.mm(wide, part.T, out=logits[:, start : start + len(tile)])
    return logits


FLOORS = {"logits": ("plain copy", plain_copy), "hidden": ("bare products", bare_products)}
