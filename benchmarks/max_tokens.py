"""How many tokens a loss takes before the device runs out of memory, for each implementation.

    python -m benchmarks.max_tokens --results FILE

Loss and gradients of linear_grpo_loss under Llama 3.2 1B's head in bf16. N doubles until the device
refuses, then the gap is halved; a ceiling is a multiple of 512 tokens.
"""

import argparse
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.core import clock
from benchmarks.core import problem as problems
from benchmarks.core.harness import reason_of, status_of
from benchmarks.core.results import Record, ResultFile
from benchmarks.core.shapes import Shape
from benchmarks.core.tasks import gradients
from benchmarks.peers import OURS, PEERS

TASK, OF = "memory_ceiling", "linear_grpo_loss"
MODEL, DTYPE = "Llama 3.2 1B", "bf16"
FIRST, STEP, LAST = 1024, 512, 1 << 20  # tokens
SECONDS = 20.0  # for an implementation; an N that would take longer is not tried


def largest(fits: Callable[[int], bool], first: int, step: int, last: int) -> int:
    """The largest multiple of `step` up to `last` that fits; 0: none does.

    fits: asked of few numbers; whatever is below one that fits is taken to fit.
    """
    good, bad = 0, first
    while bad <= last and fits(bad):
        good, bad = bad, 2 * bad
    if bad > last:
        return good
    while bad - good > max(step, good // 16):  # a ceiling to 6% is enough
        middle = (good + bad) // 2 // step * step
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def ceiling(name: str, device: torch.device) -> Record:
    """A record whose N is the ceiling and whose reason says what was beyond it."""
    stopped_by, seconds_per_token = f"not reached: {LAST:,} tokens fit", 0.0

    def fits(N: int) -> bool:
        nonlocal stopped_by, seconds_per_token
        if N * seconds_per_token > SECONDS:
            stopped_by = f"not reached: {N:,} tokens would take over {SECONDS:.0f} s"
            return False
        try:
            seconds_per_token = clock.seconds_of(lambda: loss_and_gradients(name, N, device)) / N
        except torch.OutOfMemoryError as error:
            stopped_by = status_of(error)
            return False
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        return True

    record = Record(TASK, "both", MODEL, 0, DTYPE, 0.0, 0.0, name)
    try:
        record.N = largest(fits, FIRST, STEP, LAST)
        record.reason = stopped_by
    except Exception as error:  # a peer that fails is a result
        record.status, record.reason = status_of(error), reason_of(error)
        if name == OURS:
            raise
    return record


def loss_and_gradients(name: str, N: int, device: torch.device) -> None:
    problem = problems.make("hidden", Shape(MODEL, N, DTYPE), device)
    gradients(PEERS[name].tasks[OF](problem), problem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args()
    device = clock.device()
    if device.type != "cuda":
        raise SystemExit("a memory ceiling needs a CUDA device: a CPU's is its swap file's")
    results = ResultFile(arguments.results, device, {})
    known = {record.peer for record in results.records.values()}
    for name, peer in PEERS.items():
        if OF in peer.tasks and not peer.missing() and name not in known:
            record = ceiling(name, device)
            results.add(record)
            print(f"{name}: {record.N:,} tokens ({record.reason})", flush=True)


if __name__ == "__main__":
    main()
