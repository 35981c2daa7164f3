"""One case from its tensors to its record: correctness gate, memory, clock."""

import gc
from collections.abc import Callable

import pytest
import torch

from benchmarks.core import clock, correctness, roofline
from benchmarks.core.case import Case
from benchmarks.core.memory import free_memory, peak_extra_bytes
from benchmarks.core.problem import Problem, make_problem
from benchmarks.core.results import Record, ResultFile
from benchmarks.core.tasks import gradients
from benchmarks.peers import OURS, PEERS, Adapter

BUDGET = {"cpu": 0.6, "cuda": 0.3}  # seconds of clocked calls per case, but five rounds at least


class Harness:
    """Measures cases one after the other on one device.

    quick: run every case once, unclocked.
    """

    def __init__(self, device: torch.device, results: ResultFile, *, quick: bool) -> None:
        self.device, self.results, self.quick = device, results, quick
        self._problem: tuple[tuple, Problem] | None = None
        self._errors: dict[tuple, dict[str, float]] = {}

    def measure(self, case: Case, request: pytest.FixtureRequest) -> None:
        """Measure a case: correctness, memory, time, and the percentage of the roof."""
        task, phase = case.task, case.phase
        floor, make_floor = roofline.FLOORS[task.level]
        if case.peer != floor and (reason := PEERS[case.peer].missing()):
            pytest.skip(reason)

        def work(record: Record) -> None:
            if case.peer == floor:
                problem = self.problem_of(case)
                call = make_floor(task, phase, problem)
            else:
                peer = PEERS[case.peer]
                record.errors = self.errors_of(case)
                problem = self.problem_of(case)
                call = call_of(peer.tasks[task.name], phase, peer.prepare(problem))
            self.run(call, record, request, case.group)
            record.bytes, record.flops = task.bytes(problem, phase), task.flops(problem, phase)
            if record.seconds is not None:
                if task.level == "logits":
                    rate = record.bytes / record.seconds
                    roof = roofline.copy_bandwidth(self.device)
                else:
                    rate = record.flops / record.seconds
                    roof = roofline.matmul_rate(self.device, case.shape.dtype)
                record.percent_of_roof = 100 * rate / roof

        must_work = case.peer == floor or case.peer.startswith(OURS)
        self.attempt(case.new_record(), work, must_work=must_work)

    def attempt(self, record: Record, work: Callable[[Record], None], *, must_work: bool) -> None:
        """Fill in a record; an error, or a refusal by the correctness gate, is a result too."""
        if record.key in self.results.records:
            pytest.skip("measured already")
        try:
            work(record)
        except Exception as error:
            record.status, record.reason = describe_error(error)
            if must_work and record.status != "out of memory":
                raise
        finally:
            self.results.add(record)
            self.free_memory()
        if record.status != "ok":
            pytest.xfail(f"{record.status}: {record.reason}")

    def run(
        self,
        call: Callable[[], object],
        record: Record,
        request: pytest.FixtureRequest,
        group: str,
    ) -> None:
        """Measure the memory in a first call, plan the rounds from a second, clock the others."""
        if self.quick:
            call()
            return
        record.extra_bytes = peak_extra_bytes(call)
        rounds, calls = clock.plan_rounds(clock.time_call(call), BUDGET[self.device.type])
        benchmark = request.getfixturevalue("benchmark")
        benchmark.group = group
        benchmark.pedantic(call, rounds=rounds, iterations=calls)
        stats = benchmark.stats.stats
        record.seconds, record.rounds = stats.median, rounds
        record.lower_quartile, record.upper_quartile = stats.q1, stats.q3

    def free_memory(self) -> None:
        free_memory(self.device)
        # Only libraries are left: collecting over them takes half a second, several times a case.
        gc.freeze()

    def problem_of(self, case: Case) -> Problem:
        """Return the tensors of a case; the last ones are reused, as they may be gigabytes."""
        key = case.task.level, case.shape, case.task.variant
        if self._problem is None or self._problem[0] != key:
            self._problem = None
            self.free_memory()
            level, shape, variant = key
            self._problem = key, make_problem(level, shape, self.device, variant)
        return self._problem[1]

    def errors_of(self, case: Case) -> dict[str, float]:
        """Return the errors of a peer, measured once for all N and phases."""
        shape = case.shape
        key = case.task.name, case.peer, shape.model, shape.dtype, shape.masked, shape.inert
        if key not in self._errors:
            self._errors[key] = correctness.check(case.task, shape, case.peer, self.device)
        return self._errors[key]


def call_of(adapter: Adapter, phase: str, problem: Problem) -> Callable[[], object]:
    """Return the call that is clocked."""
    problems = clock.rotate(problem)
    if phase == "forward":
        return torch.no_grad()(lambda: adapter(next(problems)))
    if phase == "backward":
        outputs = adapter(problem)
        return lambda: gradients(outputs, problem, retain_graph=True)

    def forward_and_backward() -> dict[str, torch.Tensor]:
        problem = next(problems)
        return gradients(adapter(problem), problem)

    return forward_and_backward


def describe_error(error: Exception) -> tuple[str, str]:
    """Return (status, reason) of a record; the reason is short enough for a table."""
    message = str(error).strip().split("\n")[0]
    if isinstance(error, correctness.Refused):
        return "refused", message[:160]
    is_cpu_memory = "can't allocate memory" in message  # a RuntimeError of PyTorch's CPU allocator
    no_memory = is_cpu_memory or isinstance(error, torch.OutOfMemoryError | MemoryError)
    status = "out of memory" if no_memory else "failed"
    return status, f"{type(error).__name__}: {message}"[:160]
