"""The benchmarks can be believed: wrong is refused, slow is slow, bytes are bytes."""

import re
import time
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import grpo_kernels
from benchmarks import gpu
from benchmarks import max_tokens as ceilings
from benchmarks import profile as trace
from benchmarks.core import clock, floors
from benchmarks.core import correctness as gate
from benchmarks.core import problem as problems
from benchmarks.core import roofline as roofs
from benchmarks.core.case import Case, cases
from benchmarks.core.harness import Harness, call_of, record_of
from benchmarks.core.results import ResultFile, read
from benchmarks.core.shapes import Shape
from benchmarks.core.tasks import TASKS
from benchmarks.peers import OURS, PEERS, Peer
from grpo_kernels.backends import use

CPU = torch.device("cpu")
SHAPE = Shape("tiny", 64, "fp32")


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """The harness is under test here, not the kernels: the interpreter would take minutes."""
    use("pytorch")


def honest(problem):
    stats = grpo_kernels.token_stats(problem.logits, problem.tokens, mask=problem.mask)
    return {"logprob": stats.logprob, "entropy": stats.entropy}


def entropy_too_large(problem):
    outputs = honest(problem)
    return outputs | {"entropy": 1.01 * outputs["entropy"]}


def entropy_without_gradient(problem):
    outputs = honest(problem)
    return outputs | {"entropy": outputs["entropy"].detach()}


def nan_logprob(problem):
    outputs = honest(problem)
    return outputs | {"logprob": outputs["logprob"] * float("nan")}


def no_entropy(problem):
    return {"logprob": honest(problem)["logprob"]}


def other_tokens(problem):
    return honest(replace(problem, tokens=problem.tokens.roll(1)))


@pytest.fixture
def as_peer(monkeypatch):
    def register(adapter, name="suspect"):
        tasks = dict.fromkeys(("token_stats", "linear_token_stats"), adapter)
        monkeypatch.setitem(PEERS, name, Peer(tasks, "the truth"))
        return name

    return register


def test_an_honest_implementation_passes_the_gate_with_its_errors(as_peer):
    found = gate.check(TASKS["token_stats"], SHAPE, as_peer(honest), CPU)
    assert set(found) == {"logprob", "entropy", "d_logits"}
    assert max(found.values()) < 1e-5


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (entropy_too_large, "error of entropy"),
        (entropy_without_gradient, "error of d_logits"),
        (nan_logprob, "error of logprob nan"),
        (no_entropy, "no entropy"),
        (other_tokens, "error of logprob"),
    ],
)
def test_a_wrong_implementation_is_refused(as_peer, wrong, why):
    with pytest.raises(gate.Refused, match=why):
        gate.check(TASKS["token_stats"], SHAPE, as_peer(wrong), CPU)


def test_ours_is_held_to_the_documented_accuracy_and_peers_are_not(as_peer):
    def rounded(problem):
        return honest(replace(problem, logits=problem.hidden @ problem.weight.T))

    bf16 = replace(SHAPE, dtype="bf16")
    task = TASKS["linear_token_stats"]
    gate.check(task, bf16, as_peer(rounded), CPU)
    with pytest.raises(gate.Refused, match="error of logprob"):
        gate.check(task, bf16, as_peer(rounded, OURS), CPU)


@pytest.fixture
def harness():
    def make(*, quick=False):
        return Harness(CPU, ResultFile(None, CPU, {}), quick=quick)

    return make


@pytest.mark.parametrize(
    ("wrong", "status"), [(entropy_too_large, "refused"), (lambda problem: 1 / 0, "failed")]
)
def test_a_peer_that_is_refused_or_raises_is_a_record_without_a_time(
    as_peer, harness, request, wrong, status
):
    measured = harness()
    case = Case(TASKS["token_stats"], "both", SHAPE, as_peer(wrong))
    with pytest.raises(pytest.xfail.Exception):
        measured.measure(case, request)
    (record,) = measured.results.records.values()
    assert (record.status, record.seconds) == (status, None)
    assert record.reason


def test_ours_failing_is_no_result_but_an_error(as_peer, harness, request):
    case = Case(TASKS["token_stats"], "both", SHAPE, as_peer(entropy_too_large, OURS))
    with pytest.raises(gate.Refused):
        harness().measure(case, request)


@pytest.mark.benchmark(timer=clock.now)
@pytest.mark.clock
def test_a_slowed_implementation_shows_slower_by_what_it_was_slowed(as_peer, harness, request):
    delay = 0.05

    def slowed(problem):
        time.sleep(delay)
        return honest(problem)

    case = Case(TASKS["token_stats"], "both", SHAPE, as_peer(slowed))
    measured = harness()
    problem = problems.make("logits", SHAPE, CPU)
    fast = clock.median_seconds(call_of(honest, "both", problem))
    measured.measure(case, request)
    (record,) = measured.results.records.values()
    assert fast + 0.9 * delay < record.seconds < fast + 3 * delay
    assert record.lower_quartile <= record.seconds <= record.upper_quartile


class CopiedBytes(TorchDispatchMode):
    """What copies read and write, counted by PyTorch's dispatcher and not by us."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten.copy_.default:
            target, source = arguments[:2]
            self.count += target.nbytes + source.nbytes
        return function(*arguments, **keywords or {})


@pytest.mark.parametrize("name", ["token_stats", "forward_kl", "grpo_loss"])
@pytest.mark.parametrize("masked", [0.0, 0.5])
def test_the_plain_copy_moves_the_counted_bytes(name, masked):
    task, shape = TASKS[name], replace(SHAPE, masked=masked)
    problem = problems.make("logits", shape, CPU)
    for phase in task.cost:
        copy = floors.plain_copy(task, phase, problem)
        with CopiedBytes() as copied:
            copy()
        assert copied.count == task.bytes(problem, phase)


def test_counted_bytes_are_those_of_rows_read_and_rows_written():
    row, N = 4 * 512, 64
    problem = problems.make("logits", replace(SHAPE, masked=0.5), CPU)
    task = TASKS["token_stats"]
    assert task.bytes(problem, "forward") == row * N // 2
    assert task.bytes(problem, "backward") == row * (N // 2 + N)


@pytest.mark.clock
def test_counted_bytes_of_a_plain_copy_give_the_copy_bandwidth(monkeypatch):
    # On a shared machine the clock is rough: the best of five pairs, within a third. Each copy is
    # new, as in a case: its buffers are rotated, and none may be touched for the first time.
    monkeypatch.setitem(roofs.COPIED, "cpu", 128 << 20)
    task = TASKS["token_stats"]
    problem = problems.make("logits", Shape("SmolLM2 135M", 64, "fp32"), CPU)
    wanted = task.bytes(problem, "both")
    assert clock.copies(wanted // 2) > 4
    ratios = []
    for _ in range(5):
        copy = floors.plain_copy(task, "both", problem)
        roofs.copy_bandwidth.cache_clear()
        rate = wanted / clock.median_seconds(copy, rounds=5)
        ratios.append(rate / roofs.copy_bandwidth(CPU))
    roofs.copy_bandwidth.cache_clear()
    assert min(abs(ratio - 1) for ratio in ratios) < 1 / 3, ratios


def test_counted_products_are_those_of_live_tokens():
    shape = replace(SHAPE, masked=0.5, inert=0.5)
    problem = problems.make("hidden", shape, CPU)
    product = 2 * 512 * 32  # of one token
    task = TASKS["linear_grpo_loss"]
    assert (problem.counted, problem.live) == (32, 16)
    assert task.flops(problem, "forward") == product * 32
    assert task.flops(problem, "both") == product * (32 + 2 * 16)
    assert TASKS["linear_token_stats"].flops(problem, "both") == product * 4 * 32


def test_inputs_are_rotated_past_the_cache():
    problem = problems.make("logits", SHAPE, CPU)
    rotated = clock.rotated(problem)
    places = {next(rotated).logits.data_ptr() for _ in range(clock.COPIES)}
    assert len(places) == clock.COPIES  # 64 of 128 KiB: as many as are allowed


def test_a_result_file_keeps_the_records_of_the_same_run_only(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    monkeypatch.setenv("GRPO_KERNELS_COMMIT", "one")
    record = record_of(Case(TASKS["token_stats"], "both", SHAPE, OURS))
    ResultFile(path, CPU, {}).add(record)
    assert ResultFile(path, CPU, {}).records == {record.key: record}
    assert read(path)[0]["commit"] == "one"
    monkeypatch.setenv("GRPO_KERNELS_COMMIT", "two")
    assert ResultFile(path, CPU, {}).records == {}


@pytest.mark.parametrize("limit", [0, 1023, 1024, 5000, 70_000, 1 << 21])
def test_a_ceiling_is_found_within_six_percent(limit):
    asked = []

    def fits(N):
        asked.append(N)
        return N <= limit

    found = ceilings.largest(fits, 1024, 512, 1 << 20)
    assert found <= limit
    assert all(N % 512 == 0 for N in asked)
    if 512 <= limit < 1 << 20:
        assert limit < found + max(512, found // 16) + 512
    elif limit >= 1 << 20:
        assert found == 1 << 20
    else:
        assert found == 0


def test_the_gpu_command_keeps_going_and_says_what_became_of_each_part(tmp_path, monkeypatch):
    written = "import pathlib, sys; pathlib.Path(sys.argv[2]).write_text('{}')"
    suites = {
        "hidden": ("-c", "raise SystemExit(3)"),
        "logits": ("-c", written),
        "step": ("-c", "import time; time.sleep(60)"),
        "memory": ("-c", written),
    }
    monkeypatch.setattr(gpu, "SUITES", suites)
    started = time.monotonic()
    outcomes = gpu.run(list(suites), tmp_path, CPU, seconds=8.0)
    assert outcomes == {
        "hidden": "failed (exit 3)",
        "logits": "done",
        "step": "cut off",
        "memory": "cut off",  # no time was left
    }
    assert time.monotonic() - started < 20
    assert [path.name.split("-")[-1] for path in tmp_path.iterdir()] == ["logits.json"]


def test_records_name_every_case_apart():
    for level in ("logits", "hidden"):
        keys = [record_of(case).key for case in cases(level, CPU)]
        assert len(keys) == len(set(keys)) > 50


def test_a_trace_attributes_the_chunk_loop_s_time_to_its_operators():
    profiler = trace.traced(SHAPE, 8, CPU)
    text = trace.summary(profiler, CPU)
    calls = {each.key: each.count for each in profiler.key_averages()}
    chunks = -(-SHAPE.N // 8)
    assert sum(calls.get(name, 0) for name in trace.PRODUCTS) == 3 * chunks
    shares = [float(share) for share in re.findall(r"([\d.]+)%$", text, re.M)]
    assert len(shares) == trace.ROWS and shares == sorted(shares, reverse=True)
