"""Find how many tokens each implementation of a loss takes before the device is out of memory.

    python -m benchmarks.max_tokens --results FILE
    python -m benchmarks.max_tokens --results FILE --stand-in 3000    on a CPU: tiny, "full" there

Loss and gradients of linear_grpo_loss under Llama 3.2 1B's head in bf16. N doubles until memory
runs out, then the gap is bisected, in multiples of 512 tokens.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.core import clock
from benchmarks.core.harness import describe_error
from benchmarks.core.memory import free_memory
from benchmarks.core.problem import make_problem
from benchmarks.core.results import Record, ResultFile
from benchmarks.core.shapes import Shape
from benchmarks.core.tasks import gradients
from benchmarks.peers import OURS, PEERS

TASK = "linear_grpo_loss"
MODEL, DTYPE = "Llama 3.2 1B", "bf16"
FIRST, STEP, LAST = 1024, 512, 1 << 20  # tokens
SECONDS = 20.0  # an N that would take longer is not tried


def find_largest(fits: Callable[[int], bool], first: int, step: int, last: int) -> int:
    """Return the largest multiple of `step` up to `last` that fits, to 6%; 0 if none does.

    Few numbers are tried, and all below one that fits are assumed to fit.
    """
    good, bad = 0, first
    while bad <= last and fits(bad):
        good, bad = bad, 2 * bad
    if bad > last:
        return good
    while bad - good > max(step, good // 16):
        middle = (good + bad) // 2 // step * step
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def measure_max_tokens(name: str, device: torch.device, stand_in: int | None = None) -> Record:
    """Return a record whose N is the largest that fits; its reason says what stopped the search.

    stand_in: tokens of a small head that are taken for all that fit, to rehearse without a GPU.
    """
    model = MODEL if stand_in is None else "tiny"
    stopped_by, seconds_per_token = f"not reached: {LAST:,} tokens fit", 0.0

    def loss_and_gradients(N: int) -> None:
        if stand_in is not None and N > stand_in:
            raise torch.OutOfMemoryError(f"{N:,} tokens exceed the stand-in of {stand_in:,}")
        problem = make_problem("hidden", Shape(model, N, DTYPE), device)
        gradients(PEERS[name].tasks[TASK](problem), problem)

    def fits(N: int) -> bool:
        nonlocal stopped_by, seconds_per_token
        if N * seconds_per_token > SECONDS:
            stopped_by = f"not reached: {N:,} tokens would take over {SECONDS:.0f} s"
            return False
        try:
            seconds_per_token = clock.time_call(lambda: loss_and_gradients(N)) / N
        except torch.OutOfMemoryError:
            stopped_by = "out of memory"
            return False
        finally:
            free_memory(device)
        return True

    record = Record("memory_ceiling", "both", model, 0, DTYPE, 0.0, 0.0, name)
    try:
        record.N = find_largest(fits, FIRST, STEP, LAST)
        record.reason = stopped_by
    except Exception as error:  # a peer that fails is a result
        record.status, record.reason = describe_error(error)
        if name == OURS:
            raise
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, required=True, metavar="FILE")
    parser.add_argument("--stand-in", type=int, metavar="TOKENS")
    arguments = parser.parse_args()
    device = clock.default_device()
    if device.type != "cuda" and arguments.stand_in is None:
        raise SystemExit("a CUDA device is needed: a CPU swaps before it is out of memory")
    results = ResultFile(arguments.results, device, {})
    known = {record.peer for record in results.records.values()}
    for name, peer in PEERS.items():
        if TASK in peer.tasks and not peer.missing() and name not in known:
            record = measure_max_tokens(name, device, arguments.stand_in)
            results.add(record)
            print(f"{name}: {record.N:,} tokens ({record.reason})", flush=True)


if __name__ == "__main__":
    main()
