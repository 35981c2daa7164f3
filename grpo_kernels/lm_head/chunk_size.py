"""How many tokens of hidden states become logits at a time: a pure function of sizes.

Each chunk reads and writes the whole fp32 gradient of the weight, 2·V·H·4 bytes, so chunks are few
and large; the workspace that holds a chunk's logits bounds them; and they are equal, because a
small last one would run its matrix products at a small one's speed.
"""

import torch

WORKSPACE = 1 << 30  # bytes
MEMORY_SHARE = 16  # of a device's memory, where that is less than WORKSPACE
TILE = 128  # rows: matrix products work in tiles of this height


def bytes_per_token(V: int, H: int, dtype: torch.dtype, *, kl: bool, gradient: bool) -> int:
    """The workspace of one token: unrounded logits, the reference's, their gradient, the hidden.

    In half precision the gradient of the logits has a buffer of its own; else it replaces them.
    """
    wide, narrow = max(4, dtype.itemsize), dtype.itemsize
    logits = V * wide * (2 if kl else 1)
    if gradient and narrow < wide:
        logits += V * narrow
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
) -> int:
    """Tokens per chunk, so that N tokens make few, large, equal chunks.

    Args:
        dtype: of the operands of the matrix products.
        memory: of the device, in bytes.
        kl: the reference's logits are needed beside the policy's.
        gradient: False where only statistics are wanted.

    Returns:
        At least 1. Chunks are equal up to the last one, which is smaller by less than a tile for
        each of them.
    """
    budget = min(WORKSPACE, memory // MEMORY_SHARE)
    largest = max(1, budget // bytes_per_token(V, H, dtype, kl=kl, gradient=gradient))
    tile = TILE if largest >= TILE else 1
    largest -= largest % tile
    count = max(1, -(-N // largest))
    equal = -(-N // count)
    return max(1, min(N, equal + -equal % tile))
