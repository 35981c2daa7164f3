"""Chunk size: the number of tokens whose logits exist at a time, a pure function of sizes.

Each chunk reads and writes the whole fp32 gradient of the weight, 2·V·H·4 bytes, so chunks should
be few and large. The workspace that holds a chunk's logits bounds them. Chunks are equal, because a
small last one would run its matrix products at a small product's speed.
"""

import torch

from ..workspace import row_stride

WORKSPACE = 1 << 30  # bytes
MEMORY_SHARE = 16  # the workspace is at most this part of the device's memory
TILE = 128  # rows: matrix products work in tiles of this height


def bytes_per_token(
    V: int, H: int, dtype: torch.dtype, *, kl: bool, gradient: bool, overwrite: bool = True
) -> int:
    """Count one token's bytes of workspace: unrounded logits, their gradient, hidden states.

    With kl there are logits of the reference policy too. In half precision the gradient of the
    logits has its own memory; else it overwrites them, unless they are needed again.
    """
    wide, narrow = max(4, dtype.itemsize), dtype.itemsize
    row = wide * row_stride(V, torch.float64 if wide == 8 else torch.float32)
    logits = row * (2 if kl else 1)
    if gradient and (narrow < wide or not overwrite):
        logits += narrow * row_stride(V, dtype)
    return logits + H * (narrow + (wide if gradient else 0))


def plan_chunk(
    N: int,
    V: int,
    H: int,
    dtype: torch.dtype,
    memory: int,
    *,
    kl: bool = False,
    gradient: bool = True,
    overwrite: bool = True,
) -> int:
    """Plan tokens per chunk, so that N tokens make few, large, equal chunks.

    Args:
        dtype: of the operands of the matrix products.
        memory: of the device, in bytes.
        kl: the reference policy's logits are needed beside the policy's.
        gradient: False where only statistics are wanted.
        overwrite: False where the gradient of the logits must not overwrite them.

    Returns:
        At least 1. Chunks are equal up to the last one, which is smaller by less than a tile for
        each of them.
    """
    token_bytes = bytes_per_token(V, H, dtype, kl=kl, gradient=gradient, overwrite=overwrite)
    largest = max(1, workspace_bytes(memory) // token_bytes)
    tile = TILE if largest >= TILE else 1
    largest -= largest % tile
    num_chunks = max(1, -(-N // largest))
    equal = -(-N // num_chunks)
    return max(1, min(N, equal + -equal % tile))


def workspace_bytes(memory: int) -> int:
    """Return the size of the workspace on a device with that many bytes of memory."""
    return min(WORKSPACE, memory // MEMORY_SHARE)
