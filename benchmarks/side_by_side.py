"""Time the implementations of a task against each other, in rounds that alternate between them.

    python -m benchmarks.side_by_side linear_distillation_jsd --tokens 64 256

`pytest benchmarks` measures one case after the other. Here each round calls every implementation
once, so that whatever else a shared machine does falls on all of them; the ratios are of one round,
and their median is printed. An implementation passes the correctness gate first.
"""

import argparse
import statistics
from collections.abc import Sequence

import torch

from benchmarks.core import clock, correctness
from benchmarks.core.harness import call_of, describe_error
from benchmarks.core.problem import make_problem
from benchmarks.core.shapes import DTYPES, HEADS, PLANS, Shape
from benchmarks.core.tasks import TASKS, Task
from benchmarks.peers import OURS, PEERS
from benchmarks.report import tables

HEADS_OF_TABLE = ("implementation", "median", "quartiles", "times ours", "error of gradients")


def compare(
    task: Task, phase: str, shape: Shape, peers: Sequence[str], rounds: int, device: torch.device
) -> list[list[str]]:
    """Return the rows under HEADS_OF_TABLE, ours first; one that fails has its reason instead."""
    problem = make_problem(task.level, shape, device, task.variant)
    calls, errors, rows = {}, {}, {}
    for name in peers:
        try:
            if reason := PEERS[name].missing():
                raise ModuleNotFoundError(reason)
            errors[name] = correctness.check(task, shape, name, device)
            call = call_of(PEERS[name].tasks[task.name], phase, PEERS[name].prepare(problem))
            call()
            calls[name] = call
        except Exception as error:
            if name == OURS:
                raise
            rows[name] = [name, ": ".join(describe_error(error)), *[tables.NONE] * 3]
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        names = list(calls)
        # Whoever is first finds the caches as the last one left them: each is first in turn.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(clock.time_call(calls[name]))
    for name, times in seconds.items():
        lower, median, upper = statistics.quantiles(times, n=4)
        ratios = [x / ours for x, ours in zip(times, seconds[OURS], strict=True)]
        error = max(error for leaf, error in errors[name].items() if leaf.startswith("d_"))
        rows[name] = [
            name,
            tables.time(median),
            f"{tables.time(lower)} – {tables.time(upper)}",
            f"{statistics.median(ratios):.2f}",
            f"{error:.0e}",
        ]
    return [rows[name] for name in peers]


def main(arguments: Sequence[str] | None = None) -> None:
    device = clock.default_device()
    base = PLANS[device.type].base
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("tasks", nargs="+", choices=TASKS, metavar="TASK")
    parser.add_argument("--phase", choices=("forward", "both"), default="both")
    parser.add_argument("--model", choices=HEADS, default=base.model)
    parser.add_argument("--dtype", choices=DTYPES, default=base.dtype)
    parser.add_argument("--tokens", type=int, nargs="+", default=[base.N])
    parser.add_argument("--rounds", type=int, default=9)
    settings = parser.parse_args(arguments)
    for task in (TASKS[name] for name in settings.tasks):
        peers = [name for name, peer in PEERS.items() if task.name in peer.tasks]
        for N in settings.tokens:
            shape = Shape(settings.model, N, settings.dtype)
            rows = compare(task, settings.phase, shape, peers, settings.rounds, device)
            print(f"\n{task.name}, {settings.phase}, {shape}, {settings.rounds} rounds\n")
            print(tables.table(HEADS_OF_TABLE, rows), flush=True)


if __name__ == "__main__":
    main()
