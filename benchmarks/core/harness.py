"""A case from its tensors to its record: the gate, the memory, the clock."""

import gc
from collections.abc import Callable
from itertools import repeat

import pytest
import torch

from benchmarks.core import clock
from benchmarks.core import correctness as gate
from benchmarks.core import problem as problems
from benchmarks.core import roofline as roofs
from benchmarks.core.case import Case
from benchmarks.core.floors import FLOORS
from benchmarks.core.memory import peak_extra_bytes
from benchmarks.core.problem import Problem
from benchmarks.core.results import Record, ResultFile
from benchmarks.core.tasks import gradients
from benchmarks.peers import OURS, PEERS, Adapter

BUDGET = {"cpu": 0.6, "cuda": 0.3}  # seconds of the clock for a case, where it allows five rounds


class Harness:
    """Measures cases one after the other on one device.

    quick: every case runs once, unclocked.
    """

    def __init__(self, device: torch.device, results: ResultFile, *, quick: bool) -> None:
        self.device, self.results, self.quick = device, results, quick
        self._made: tuple[tuple, Problem] | None = None
        self._errors: dict[tuple, dict[str, float]] = {}

    def measure(self, case: Case, request: pytest.FixtureRequest) -> None:
        """A task by a peer: gate, memory, clock, and what it cost against the roof."""
        floor, make_floor = FLOORS[case.task.level]
        if case.peer != floor and (reason := PEERS[case.peer].missing()):
            pytest.skip(reason)

        def work(record: Record) -> None:
            if case.peer == floor:
                problem = self._problem(case)
                call = make_floor(case.task, case.phase, problem)
            else:
                peer = PEERS[case.peer]
                record.errors = self._gate(case)
                problem = self._problem(case)
                call = call_of(peer.tasks[case.task.name], case.phase, peer.prepare(problem))
            self.run(call, record, request, case.group)
            self._count(case, problem, record)

        must_work = case.peer == floor or case.peer.startswith(OURS)
        self.attempt(record_of(case), work, must_work=must_work)

    def attempt(self, record: Record, work: Callable[[Record], None], *, must_work: bool) -> None:
        """Fill in a record. That a peer raises, or that the gate refuses it, is a result."""
        if record.key in self.results.records:
            pytest.skip("measured already")
        try:
            work(record)
        except Exception as error:
            record.status, record.reason = status_of(error), reason_of(error)
            if must_work and record.status != "out of memory":
                raise
        finally:
            self.results.add(record)
            self.clear()
        if record.status != "ok":
            pytest.xfail(f"{record.status}: {record.reason}")

    def run(
        self,
        call: Callable[[], object],
        record: Record,
        request: pytest.FixtureRequest,
        group: str,
    ) -> None:
        """A first call warms up, watched for its memory; a second says how many are clocked."""
        if self.quick:
            call()
            return
        record.extra_bytes = peak_extra_bytes(call)
        rounds, calls = clock.plan_rounds(clock.seconds_of(call), BUDGET[self.device.type])
        benchmark = request.getfixturevalue("benchmark")
        benchmark.group = group
        benchmark.pedantic(call, rounds=rounds, iterations=calls)
        stats = benchmark.stats.stats
        record.seconds, record.rounds = stats.median, rounds
        record.lower_quartile, record.upper_quartile = stats.q1, stats.q3

    def clear(self) -> None:
        gc.collect()
        # What is left are libraries: to walk over them takes half a second, several times a case.
        gc.freeze()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _problem(self, case: Case) -> Problem:
        """Made once for the cases that share it; one at a time, as it may be gigabytes."""
        key = case.task.level, case.shape, case.task.reference
        if self._made is None or self._made[0] != key:
            self._made = None
            self.clear()
            level, shape, reference = key
            self._made = key, problems.make(level, shape, self.device, reference=reference)
        return self._made[1]

    def _gate(self, case: Case) -> dict[str, float]:
        """Once for all N and phases."""
        of = case.shape
        key = case.task.name, case.peer, of.model, of.dtype, of.masked, of.inert
        if key not in self._errors:
            self._errors[key] = gate.check(case.task, of, case.peer, self.device)
        return self._errors[key]

    def _count(self, case: Case, problem: Problem, record: Record) -> None:
        record.bytes = case.task.bytes(problem, case.phase)
        record.flops = case.task.flops(problem, case.phase)
        if record.seconds is None:
            return
        if record.bytes is not None:
            roof = roofs.copy_bandwidth(self.device)
            record.percent_of_roof = 100 * record.bytes / record.seconds / roof
        else:
            roof = roofs.product_rate(self.device, case.shape.dtype)
            record.percent_of_roof = 100 * record.flops / record.seconds / roof


def record_of(case: Case) -> Record:
    of = case.shape
    return Record(
        case.task.name, case.phase, of.model, of.N, of.dtype, of.masked, of.inert, case.peer
    )


def call_of(adapter: Adapter, phase: str, problem: Problem) -> Callable[[], object]:
    """What the clock runs."""
    inputs = clock.rotated(problem)
    if phase == "forward":
        return torch.no_grad()(lambda: adapter(next(inputs)))
    if phase == "both":

        def both():
            of = next(inputs)
            return gradients(adapter(of), of)

        return both
    # The graphs are made in advance, and kept.
    graphs = repeat((adapter(problem), problem))
    return lambda: gradients(*next(graphs), retain_graph=True)


def status_of(error: Exception) -> str:
    if isinstance(error, gate.Refused):
        return "refused"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return "failed"


def reason_of(error: Exception) -> str:
    """Its first line, which a table can hold."""
    first = str(error).strip().split("\n")[0]
    name = "" if isinstance(error, gate.Refused) else f"{type(error).__name__}: "
    return (name + first)[:160]
