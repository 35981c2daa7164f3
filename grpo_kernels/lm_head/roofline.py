"""Predicted time of the hidden level on a GPU, a pure function of sizes and rates.

A matrix product takes the longer of

    its operations     in whole waves of tiles over the multiprocessors, at the rate of large
                       products; then a tile's results leave, and those that it adds to arrive,
                       while its multiprocessor does not multiply
    its bytes          operands once, results written and, where they are added to, read

A pass over rows takes its bytes at the bandwidth that is reached. Every kernel costs a gap. No
product is split along its sum, and no two kernels run at once: both would be faster.
"""

from collections.abc import Callable
from typing import NamedTuple

from ..backends.triton.launch_configs import L2_SHARE, looping_programs
from .device_rates import DeviceRates

# Assumed, like the next two. (rows, columns, share of the rate): a smaller tile reads each operand
# more often.
TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.85), (64, 256, 0.85))
LAUNCH_GAP = 2e-6  # seconds from the end of a kernel to the work of the next
CHUNK_LAUNCHES = 8  # kernels of a chunk beside its products and row passes


class ChunkSizes(NamedTuple):
    """Tokens whose logits exist at a time, and tokens whose logit gradients do.

    weight_chunk is a multiple of logit_chunk, or all tokens. The products of the logit gradients
    run once for each weight_chunk.
    """

    logit_chunk: int
    weight_chunk: int

    def with_logit_chunk(self, size: int) -> "ChunkSizes":
        """Keep the number of logit chunks to a weight chunk."""
        return ChunkSizes(size, size * -(-self.weight_chunk // self.logit_chunk))


class HeadWork(NamedTuple):
    """One loop over the chunks of N tokens."""

    N: int
    V: int
    H: int
    itemsize: int  # of the operands of the products, in bytes
    logits: int = 1  # products for logits: 2 with a reference policy's
    row_bytes: int = 0  # from and to memory per entry, of the row passes together
    row_again: int = 0  # of the bytes of an entry, those that one kernel reads once more
    hidden_grad: bool = False
    weight_grad: bool = False


class Prediction(NamedTuple):
    """Predicted seconds of each part."""

    logits: float  # products
    rows: float  # passes over the logits
    d_hidden: float  # products
    d_weight: float  # products, had they no results to read and write
    d_weight_traffic: float  # what reading and writing their results adds
    copies: float  # hidden states gathered, d_hidden put into place, gradients rounded
    gaps: float

    @property
    def total(self) -> float:
        return sum(self)


def product_seconds(
    rates: DeviceRates, M: int, N: int, K: int, itemsize: int, result_bytes: int
) -> float:
    """Predict the product [M, K] @ [K, N].

    result_bytes: written and read per entry of the result.
    """
    rate = rates.matmul_rate * (2 / itemsize) ** 3  # fp32 without TF32: an eighth
    waves = (
        (-(-(-(-M // rows) * -(-N // columns)) // rates.multiprocessors), rows * columns / share)
        for rows, columns, share in TILES
    )
    work = min(count * area for count, area in waves) * rates.multiprocessors * 2 * K
    results = M * N * result_bytes
    moved = itemsize * (M * K + K * N) + results
    return max(work / rate + results / rates.port_rate, moved / rates.reached_bandwidth)


def predict(work: HeadWork, sizes: ChunkSizes, rates: DeviceRates) -> Prediction:
    """Predict a loop over the chunks."""
    N, V, H, itemsize = work[:4]
    bandwidth, wide = rates.reached_bandwidth, max(4, itemsize)
    logit_chunks, weight_chunks = (_split(N, size) for size in sizes)

    def products(
        chunks: dict[int, int], shape: Callable[[int], tuple[int, int, int]], result_bytes: int
    ) -> float:
        return sum(
            count * product_seconds(rates, *shape(m), itemsize, result_bytes)
            for m, count in chunks.items()
        )

    row_bytes = work.row_bytes
    again = work.row_again * V  # bytes of a row
    programs = looping_programs(max(1, again), rates.multiprocessors, rates.l2_bytes)
    if programs * again > L2_SHARE * rates.l2_bytes:
        row_bytes += work.row_again
    copied = 2 * itemsize * N * H * work.logits
    d_hidden = d_weight = traffic = 0.0
    if work.hidden_grad:
        d_hidden = products(weight_chunks, lambda m: (m, H, V), wide)
        copied += (4 * wide + itemsize) * N * H  # zeros, a read, a write; then rounded
    if work.weight_grad:
        d_weight = products(weight_chunks, lambda m: (V, H, m), 0)
        traffic = products(weight_chunks, lambda m: (V, H, m), 2 * wide) - d_weight
        first = max(weight_chunks, default=0)  # has nothing to add to
        traffic -= product_seconds(rates, V, H, first, itemsize, 2 * wide)
        traffic += product_seconds(rates, V, H, first, itemsize, wide)
        if itemsize < wide:
            copied += (wide + itemsize) * V * H
    launches = sum(logit_chunks.values()) * (CHUNK_LAUNCHES + work.logits)
    launches += sum(weight_chunks.values()) * (work.hidden_grad + work.weight_grad)
    return Prediction(
        work.logits * products(logit_chunks, lambda m: (m, V, H), wide),
        N * V * row_bytes / bandwidth,
        d_hidden,
        d_weight,
        traffic,
        copied / bandwidth,
        launches * LAUNCH_GAP,
    )


def _split(N: int, size: int) -> dict[int, int]:
    """Map the sizes of chunks to their numbers."""
    return {m: count for m, count in ((size, N // size), (N % size, 1)) if m and count}
