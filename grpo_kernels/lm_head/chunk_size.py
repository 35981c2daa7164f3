"""Chunk sizes: how many tokens have logits and logit gradients at a time, from sizes and rates.

Each product for the gradient of the weight reads and writes that gradient in fp32, 2·V·H·4 bytes,
so these products should be few and large. The workspace that holds a chunk's logits and gradients
bounds them. On a GPU the sizes are those of the least predicted time (roofline.py): unrounded
logits are made for few tokens at a time, and their gradients in half precision collected for many.
Elsewhere, and where the gradient overwrites the logits, both sizes are one. Chunks are equal,
because a small last one would run its matrix products at a small product's speed.

On a CPU one product in bf16 is faster than several, whose sum is in fp32, of which PyTorch makes
none from bf16 operands. Where the gradients of all tokens fit, they are collected: for 2,048 tokens
under a head of 151,936 x 896 on one core with units for bf16 that took 13.0 s against 16.1, in the
same workspace.
"""

from functools import lru_cache
from itertools import product

import torch

from ..workspace import row_stride
from .device_rates import DeviceRates
from .roofline import ChunkSizes, HeadWork, predict

WORKSPACE = 1 << 30  # bytes
MEMORY_SHARE = 16  # the workspace is at most this part of the device's memory
TILE = 128  # rows: matrix products work in tiles of this height

LARGE_WORKSPACE = 4 << 30  # where it pays, on a GPU with LARGE_MEMORY
LARGE_MEMORY = 40 * 10**9  # bytes
GAIN = 0.007  # of the time, which each GiB of workspace must save
MOST_LOGIT_CHUNKS = 8  # of a weight chunk
SMALLEST_LOGIT_CHUNK = 512  # a product with fewer rows takes as long as reading the weight
MORE_CHUNKS = 2  # than fit: the products of other sizes may fill the multiprocessors better
GRAIN = 8  # steps of a plan's N between two powers of two, so that few plans are made


def bytes_per_token(
    V: int, H: int, dtype: torch.dtype, *, kl: bool, gradient: bool, overwrite: bool = True
) -> int:
    """Count one token's bytes of workspace: unrounded logits, their gradient, hidden states.

    With kl there are logits of the reference policy too. In half precision the gradient of the
    logits has its own memory; else it overwrites them, unless they are needed again.
    """
    return sum(_bytes_per_token(V, H, dtype, kl, gradient, overwrite))


def _bytes_per_token(
    V: int, H: int, dtype: torch.dtype, kl: bool, gradient: bool, overwrite: bool
) -> tuple[int, int]:
    """Count the bytes of a token of the logit chunk, and of the weight chunk."""
    wide, narrow = max(4, dtype.itemsize), dtype.itemsize
    row = wide * row_stride(V, torch.float64 if wide == 8 else torch.float32)
    logits, gradients = row * (2 if kl else 1), 0
    if gradient and (narrow < wide or not overwrite):
        gradients = narrow * row_stride(V, dtype)
    return logits, gradients + H * (narrow + (wide if gradient else 0))


def plan_chunks(
    N: int,
    V: int,
    H: int,
    dtype: torch.dtype,
    memory: int,
    rates: DeviceRates | None = None,
    *,
    kl: bool = False,
    gradient: bool = True,
    weight_grad: bool = False,
    overwrite: bool = True,
) -> ChunkSizes:
    """Plan the chunks of N tokens.

    Args:
        dtype: of the operands of the matrix products.
        memory: of the device, in bytes.
        rates: of a GPU.
        kl: the reference policy's logits are needed beside the policy's.
        gradient: False where only statistics are wanted.
        weight_grad: the gradient of the weight is wanted.
        overwrite: False where the gradient of the logits must not overwrite them.

    Returns:
        Sizes of at least 1. Chunks are equal up to the last one, which is smaller by less than a
        tile for each of them, on a GPU by less than a tile or 1 / GRAIN of N if that is more.
    """
    logit_bytes, grad_bytes = _bytes_per_token(V, H, dtype, kl, gradient, overwrite)
    budget = workspace_bytes(memory)
    is_collected = weight_grad and overwrite and dtype.itemsize < 4
    if rates is None:
        size = _equal_chunk(N, 1, _largest(budget, logit_bytes + grad_bytes))
        if size < N and is_collected and dtype == torch.bfloat16:
            for k in range(2, MOST_LOGIT_CHUNKS + 1):
                largest = _largest(budget, logit_bytes + k * grad_bytes)
                if largest >= SMALLEST_LOGIT_CHUNK and k * largest >= N:
                    return ChunkSizes(_equal_chunk(N, k, largest), N)
        return ChunkSizes(size, size)
    grain = max(TILE, (1 << max(0, N.bit_length() - 1)) // GRAIN)
    work = HeadWork(
        max(1, N + -N % grain), V, H, dtype.itemsize, 2 if kl else 1,
        hidden_grad=gradient, weight_grad=weight_grad,
    )  # fmt: skip
    sizes = _plan_by_time(
        work,
        rates,
        (budget, LARGE_WORKSPACE) if memory >= LARGE_MEMORY else (budget,),
        (logit_bytes, grad_bytes),
        MOST_LOGIT_CHUNKS if is_collected else 1,
    )
    return ChunkSizes(*(max(1, min(N, size)) for size in sizes))


@lru_cache(maxsize=1024)
def _plan_by_time(
    work: HeadWork,
    rates: DeviceRates,
    budgets: tuple[int, ...],
    token_bytes: tuple[int, int],
    most_logit_chunks: int,
) -> ChunkSizes:
    """Find the sizes of the least predicted time, to which each GiB adds GAIN of it."""
    logit_bytes, grad_bytes = token_bytes
    plans = []
    for budget, k in product(budgets, range(1, most_logit_chunks + 1)):
        largest = _largest(budget, logit_bytes + k * grad_bytes)
        if k > 1 and largest < SMALLEST_LOGIT_CHUNK:
            continue
        fewest = -(-work.N // (k * largest))
        for num_weight_chunks in range(fewest, fewest + MORE_CHUNKS + 1):
            size = _equal_chunk(work.N, k * num_weight_chunks, largest)
            sizes = ChunkSizes(size, min(work.N, k * size))
            used = size * logit_bytes + sizes.weight_chunk * grad_bytes
            seconds = predict(work, sizes, rates).total
            plans.append((seconds * (1 + GAIN * used / WORKSPACE), sizes))
    return min(plans)[1]


def _largest(budget: int, token_bytes: int) -> int:
    """Return the largest chunk within the budget, in whole tiles if it has one."""
    largest = max(1, budget // token_bytes)
    return largest - largest % (TILE if largest >= TILE else 1)


def _equal_chunk(N: int, num_chunks: int, largest: int) -> int:
    """Split N tokens into equal chunks: at least num_chunks of them, and none above the largest."""
    num_chunks = max(num_chunks, -(-N // largest), 1)
    equal = -(-N // num_chunks)
    return max(1, min(N, equal + -equal % (TILE if largest >= TILE else 1)))


def workspace_bytes(memory: int) -> int:
    """Return the size of the workspace on a device with that many bytes of memory."""
    return min(WORKSPACE, memory // MEMORY_SHARE)
