"""Time the implementations of a task against each other, in rounds that alternate between them.

    python -m benchmarks.side_by_side linear_distillation_jsd --tokens 64 256
    python -m benchmarks.side_by_side linear_grpo_loss --shape 512,151936,896,bf16
    python -m benchmarks.side_by_side linear_grpo_loss --peer my_module:my_loss

`pytest benchmarks` measures one case after the other. Here each round calls every implementation
once, so that whatever else a shared machine does falls on all of them; the ratios are of one round,
and their median is printed. An implementation passes the correctness gate first. A peer of your own
is a function of (hidden, weight, tokens, advantages, *, mask, old_logprob) that returns the loss of
`LossConfig()`, or a tuple that begins with it.
"""

import argparse
import importlib
import statistics
from collections.abc import Sequence

import torch

from benchmarks.core import clock, correctness, roofline
from benchmarks.core.harness import call_of, describe_error
from benchmarks.core.memory import peak_extra_bytes
from benchmarks.core.problem import Problem, make_problem
from benchmarks.core.shapes import DTYPES, HEADS, PLANS, Head, Shape
from benchmarks.core.tasks import TASKS, Task
from benchmarks.peers import OURS, PEERS, Peer
from benchmarks.report import tables

HEADS_OF_TABLE = ("implementation", "median", "quartiles", "times ours")
HEADS_OF_TABLE += ("extra memory", "error of values", "error of gradients")


def compare(
    task: Task, phase: str, shape: Shape, peers: Sequence[str], rounds: int, device: torch.device
) -> list[list[str]]:
    """Return the rows under HEADS_OF_TABLE; an implementation that fails has its reason instead.

    The first row is the floor: the bare matrix products, or a copy of as many bytes.
    """
    problem = make_problem(task.level, shape, device, task.variant)
    floor, make_floor = roofline.FLOORS[task.level]
    calls = {floor: make_floor(task, phase, problem)}
    calls[floor]()
    errors, memory, rows = {}, {}, {}
    for name in peers:
        try:
            if reason := PEERS[name].missing():
                raise ModuleNotFoundError(reason)
            errors[name] = correctness.check(task, shape, name, device)
            call = call_of(PEERS[name].tasks[task.name], phase, PEERS[name].prepare(problem))
            memory[name] = peak_extra_bytes(call)
            calls[name] = call
        except Exception as error:
            if name == OURS:
                raise
            rows[name] = [
                name,
                ": ".join(describe_error(error)),
                *[tables.NONE] * (len(HEADS_OF_TABLE) - 2),
            ]
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        names = list(calls)
        # Whoever is first finds the caches as the last one left them: each is first in turn.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(clock.time_call(calls[name]))
    for name, times in seconds.items():
        lower, median, upper = statistics.quantiles(times * 2 if len(times) == 1 else times, n=4)
        ratios = [x / ours for x, ours in zip(times, seconds[OURS], strict=True)]
        found = errors.get(name, {}).items()
        of_values = [error for leaf, error in found if not leaf.startswith("d_")]
        of_gradients = [error for leaf, error in found if leaf.startswith("d_")]
        rows[name] = [
            name,
            tables.time(median),
            f"{tables.time(lower)} – {tables.time(upper)}",
            f"{statistics.median(ratios):.2f}",
            tables.memory(memory.get(name)),
            *(f"{max(x):.0e}" if x else tables.NONE for x in (of_values, of_gradients)),
        ]
    return [rows[name] for name in (floor, *peers)]


def parse_shape(text: str) -> Shape:
    """Read "N,V,H,DTYPE"; the head becomes one of HEADS."""
    try:
        *sizes, dtype = text.split(",")
        N, V, H = map(int, sizes)
        if dtype not in DTYPES or min(N, V, H) < 1:
            raise ValueError
    except ValueError:
        wanted = f"N,V,H,DTYPE with sizes of at least 1 and a dtype of {', '.join(DTYPES)}"
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}") from None
    name = f"V = {V:,}, H = {H:,}"
    HEADS[name] = Head(V, H)
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
    parser.add_argument("--rounds", type=int, default=9)
    settings = parser.parse_args(arguments)
    PEERS.update({peer.name: peer for peer in settings.peer})
    shapes = settings.shape or [Shape(settings.model, N, settings.dtype) for N in settings.tokens]
    for task in (TASKS[name] for name in settings.tasks):
        peers = [name for name, peer in PEERS.items() if task.name in peer.tasks]
        for shape in shapes:
            rows = compare(task, settings.phase, shape, peers, settings.rounds, device)
            print(f"\n{task.name}, {settings.phase}, {shape}, {settings.rounds} rounds\n")
            print(tables.table(HEADS_OF_TABLE, rows), flush=True)


if __name__ == "__main__":
    main()
