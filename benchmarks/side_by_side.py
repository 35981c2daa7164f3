"""Time the implementations of a task against each other, in rounds that alternate between them.

    python -m benchmarks.side_by_side linear_distillation_jsd --tokens 64 256
    python -m benchmarks.side_by_side linear_grpo_loss --shape 512,151936,896,bf16
    python -m benchmarks.side_by_side linear_grpo_loss --peer my_module:my_loss
    python -m benchmarks.side_by_side linear_grpo_loss --rounds 0 --tokens 1024 16384    memory only

`pytest benchmarks` measures one case after the other. Here each round calls every implementation
once, so that whatever else a shared machine does falls on all of them; the ratios are of one round,
and their median is printed. An implementation passes the correctness gate first. A peer of your own
is a function of (hidden, weight, tokens, advantages, *, mask, old_logprob) that returns the loss of
`LossConfig()`, or a tuple that begins with it. With --results FILE, the shapes that the file has
from the same commit and machine are not measured again.
"""

import argparse
import importlib
import statistics
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import torch

from benchmarks.core import clock, correctness, roofline
from benchmarks.core.harness import call_of, describe_error
from benchmarks.core.memory import free_memory, limit_memory, peak_extra_bytes
from benchmarks.core.problem import Problem, make_problem
from benchmarks.core.results import Record, ResultFile
from benchmarks.core.shapes import DTYPES, HEADS, PLANS, Head, Shape
from benchmarks.core.tasks import TASKS, Task
from benchmarks.peers import OURS, PEERS, Peer
from benchmarks.report import tables

LONG_CALL = 5.0  # seconds; none is warmed up if one takes longer
HEADS_OF_TABLE = ("implementation", "median", "quartiles", "times ours")
HEADS_OF_TABLE += ("extra memory", "error of values", "error of gradients")


def compare(
    task: Task,
    phase: str,
    shape: Shape,
    peers: Sequence[str],
    rounds: int,
    seconds: float,
    device: torch.device,
) -> tuple[list[Record], list[float]]:
    """Measure a shape: a record per implementation, and the median of its times over ours.

    The first is the floor: the bare matrix products, or a copy of as many bytes. Fewer rounds are
    made if they would take longer than `seconds`; without a round, the memory is measured alone.
    """
    floor, make_floor = roofline.FLOORS[task.level]
    records = {name: Record(task.name, phase, *astuple(shape), name) for name in (floor, *peers)}
    problem = make_problem(task.level, shape, device, task.variant)
    calls, first = {}, {}
    if rounds:
        calls[floor] = make_floor(task, phase, problem)
    for name in peers:
        record = records[name]
        try:
            if reason := PEERS[name].missing():
                raise ModuleNotFoundError(reason)
            record.errors = correctness.check(task, shape, name, device)
            call = call_of(PEERS[name].tasks[task.name], phase, PEERS[name].prepare(problem))
            start = clock.now()
            record.extra_bytes = peak_extra_bytes(call)
            if rounds:
                calls[name], first[name] = call, clock.now() - start
        except Exception as error:
            if name == OURS:
                raise
            record.status, record.reason = describe_error(error)
        free_memory(device)
    if max(first.values(), default=LONG_CALL) < LONG_CALL:
        for name in first:  # once more where the workspace stays for the clocked calls
            first[name] = clock.time_call(calls[name])
    rounds = min(rounds, max(1, int(seconds / max(sum(first.values()), 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        names = list(calls)
        # Whoever is first finds the caches as the last one left them: each is first in turn.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(clock.time_call(calls[name]))
    ratios = {}
    for name, found in times.items():
        record = records[name]
        quartiles = statistics.quantiles(found * 2 if len(found) == 1 else found, n=4)
        record.lower_quartile, record.seconds, record.upper_quartile = quartiles
        record.rounds = rounds
        ratios[name] = statistics.median(
            x / ours for x, ours in zip(found, times[OURS], strict=True)
        )
    return list(records.values()), [ratios.get(name) for name in records]


def row(record: Record, ratio: float | None) -> list[str]:
    """Format a record as the row under HEADS_OF_TABLE."""
    if record.status != "ok":
        reason = f"{record.status}: {record.reason}"
        return [record.peer, reason, *[tables.NONE] * (len(HEADS_OF_TABLE) - 2)]
    return [
        record.peer,
        tables.time(record.seconds),
        tables.quartiles(record),
        tables.NONE if ratio is None else f"{ratio:.2f}",
        tables.memory(record.extra_bytes),
        tables.largest_error(record, gradients=False),
        tables.largest_error(record, gradients=True),
    ]


def parse_shape(text: str) -> Shape:
    """Read "N,V,H,DTYPE"; a new head becomes one of HEADS."""
    try:
        *sizes, dtype = text.split(",")
        N, V, H = map(int, sizes)
        if dtype not in DTYPES or min(N, V, H) < 1:
            raise ValueError
    except ValueError:
        wanted = f"N,V,H,DTYPE with sizes of at least 1 and a dtype of {', '.join(DTYPES)}"
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}") from None
    head = Head(V, H)
    names = [name for name, known in HEADS.items() if known == head]
    name = names[0] if names else f"V = {V:,}, H = {H:,}"
    HEADS[name] = head
    return Shape(name, N, dtype)


def parse_peer(text: str) -> Peer:
    """Import "module:function" as an implementation of linear_grpo_loss."""
    module, _, function_name = text.partition(":")
    try:
        function = getattr(importlib.import_module(module), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"expected module:function, got {text!r}: {error}"
        ) from None

    def adapter(problem: Problem) -> dict[str, torch.Tensor]:
        inputs = (problem.hidden, problem.weight, problem.tokens, problem.advantages)
        output = function(*inputs, mask=problem.mask, old_logprob=problem.old_logprob)
        return {"loss": output[0] if isinstance(output, tuple) else output}

    return Peer(text, {"linear_grpo_loss": adapter}, "not known")


def main(arguments: Sequence[str] | None = None) -> None:
    device = clock.default_device()
    base = PLANS[device.type].base
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("tasks", nargs="+", choices=TASKS, metavar="TASK")
    parser.add_argument("--phase", choices=("forward", "both"), default="both")
    parser.add_argument("--model", choices=HEADS, default=base.model)
    parser.add_argument("--dtype", choices=DTYPES, default=base.dtype)
    parser.add_argument("--tokens", type=int, nargs="+", default=[base.N])
    parser.add_argument("--shape", type=parse_shape, nargs="+", metavar="N,V,H,DTYPE")
    parser.add_argument("--peer", type=parse_peer, nargs="+", default=[], metavar="MODULE:FUNCTION")
    parser.add_argument("--rounds", type=int, default=9, help="0 measures memory alone")
    parser.add_argument("--seconds", type=float, default=60.0, help="limit of a shape's rounds")
    parser.add_argument("--results", type=Path, metavar="FILE", help="write a result file as well")
    settings = parser.parse_args(arguments)
    PEERS.update({peer.name: peer for peer in settings.peer})
    shapes = settings.shape or [Shape(settings.model, N, settings.dtype) for N in settings.tokens]
    results = ResultFile(settings.results, device, roofs={})
    for task in (TASKS[name] for name in settings.tasks):
        peers = [name for name, peer in PEERS.items() if task.name in peer.tasks]
        for shape in shapes:
            if (task.name, settings.phase, shape, peers[-1]) in results.records:
                continue
            limits = settings.rounds, settings.seconds
            records, ratios = compare(task, settings.phase, shape, peers, *limits, device)
            for record in records:
                results.add(record)
            rounds = max(record.rounds or 0 for record in records)
            print(f"\n{task.name}, {settings.phase}, {shape}, {rounds} rounds\n")
            print(tables.table(HEADS_OF_TABLE, map(row, records, ratios)), flush=True)


if __name__ == "__main__":
    limit_memory()
    main()
