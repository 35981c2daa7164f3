"""The clock: device synchronised, calls warmed up, inputs rotated past the cache."""

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle

import torch

from benchmarks.core.problem import Problem

CACHE_BYTES = 64 << 20  # the L2 of an H100 has 50 MB, the L3 of a server CPU 32 MB
MAX_COPIES = 64


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def now() -> float:
    """Return seconds after the device has finished its work; pytest-benchmark's timer here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def time_call(call: Callable[[], object]) -> float:
    start = now()
    call()
    return now() - start


def median_seconds(call: Callable[[], object], rounds: int = 7) -> float:
    """Return the median time of a call that takes milliseconds at least, after a warm-up."""
    call()
    return statistics.median(time_call(call) for _ in range(rounds))


def plan_rounds(seconds: float, budget: float) -> tuple[int, int]:
    """Return (rounds, calls per round) for a call of about so many seconds.

    A round lasts at least 10 ms, so that the timer and the launch do not count. The median needs
    five rounds at least; more are made if the budget allows. A call of over 5 s is timed once.
    """
    if seconds > 5.0:
        return 1, 1
    calls = max(1, min(1000, round(0.01 / max(seconds, 1e-9))))
    return max(5, min(15, round(budget / (calls * seconds)))), calls


def rotate(problem: Problem) -> Iterator[Problem]:
    """Yield copies of a problem in turn, so that no call finds its inputs in a cache."""
    size = sum(leaf.nbytes for leaf in problem.leaves.values())
    return cycle([problem, *(problem.copy() for _ in range(copies_past_cache(size) - 1))])


def copies_past_cache(size: int) -> int:
    """Return how many copies of `size` bytes exceed the cache."""
    return 1 if size > CACHE_BYTES else min(MAX_COPIES, 1 + -(-2 * CACHE_BYTES // size))
