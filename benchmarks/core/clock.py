"""Time on a device that works on its own: synchronised, warmed up, inputs past the cache."""

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle

import torch

from benchmarks.core.problem import Problem

CACHE_BYTES = 64 << 20  # an H100's second level holds 50 MB, a server CPU's third 32 MB
COPIES = 64  # at most: a few rows are not worth more memory


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def now() -> float:
    """Seconds, when all that was asked of the device is done; pytest-benchmark's timer here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(call: Callable[[], object]) -> float:
    start = now()
    call()
    return now() - start


def median_seconds(call: Callable[[], object], rounds: int = 7) -> float:
    """Of a call that takes milliseconds at least, the first one left out."""
    call()
    return statistics.median(seconds_of(call) for _ in range(rounds))


def plan_rounds(seconds: float, budget: float) -> tuple[int, int]:
    """(rounds, calls in each) for a call of about so many seconds.

    A round lasts 10 ms, so that neither the timer nor a launch is what is measured. As many as the
    budget allows, five at least: a median needs them. A call of over 5 s is clocked once.
    """
    if seconds > 5.0:
        return 1, 1
    calls = max(1, min(1000, round(0.01 / max(seconds, 1e-9))))
    return max(5, min(15, round(budget / (calls * seconds)))), calls


def rotated(problem: Problem) -> Iterator[Problem]:
    """Forever the same numbers at other places, so that no call finds its inputs in a cache."""
    size = sum(each.nbytes for each in problem.leaves.values())
    return cycle([problem, *(problem.copy() for _ in range(copies(size) - 1))])


def copies(size: int) -> int:
    """How many of so many bytes are more than a cache holds."""
    return 1 if size > CACHE_BYTES else min(COPIES, 1 + -(-2 * CACHE_BYTES // size))
