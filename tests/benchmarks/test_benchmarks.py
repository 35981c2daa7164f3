"""The benchmarks can be trusted: wrong results are refused, slow ones slow, bytes are counted."""

import re
import time
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import grpo_kernels
from benchmarks import max_tokens, profile
from benchmarks.core import clock, correctness, roofline
from benchmarks.core import problem as problem_module
from benchmarks.core.case import Case, cases
from benchmarks.core.harness import Harness, call_of
from benchmarks.core.problem import make_problem
from benchmarks.core.results import ResultFile, read
from benchmarks.core.shapes import Shape
from benchmarks.core.tasks import TASKS, gradients
from benchmarks.peers import OURS, PEERS, Peer
from grpo_kernels.lm_head import chunk_size, support
from tests.helpers.count_flops import count_flops

pytestmark = pytest.mark.usefixtures("pytorch_backend")  # the harness is tested, not kernels

CPU = torch.device("cpu")
SHAPE = Shape("tiny", 64, "fp32")


def correct(problem):
    stats = grpo_kernels.token_stats(problem.logits, problem.tokens, mask=problem.mask)
    return {"logprob": stats.logprob, "entropy": stats.entropy}


def entropy_too_large(problem):
    outputs = correct(problem)
    return outputs | {"entropy": 1.01 * outputs["entropy"]}


def entropy_without_gradient(problem):
    outputs = correct(problem)
    return outputs | {"entropy": outputs["entropy"].detach()}


def nan_logprob(problem):
    outputs = correct(problem)
    return outputs | {"logprob": outputs["logprob"] * float("nan")}


def no_entropy(problem):
    return {"logprob": correct(problem)["logprob"]}


def other_tokens(problem):
    return correct(replace(problem, tokens=problem.tokens.roll(1)))


@pytest.fixture
def add_peer(monkeypatch):
    def add(adapter, name="suspect"):
        tasks = dict.fromkeys(("token_stats", "linear_token_stats"), adapter)
        monkeypatch.setitem(PEERS, name, Peer(name, tasks, "the truth"))
        return name

    return add


def test_correct_implementation_passes_with_its_errors(add_peer):
    errors = correctness.check(TASKS["token_stats"], SHAPE, add_peer(correct), CPU)
    assert set(errors) == {"logprob", "entropy", "d_logits"}
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (entropy_too_large, "error of entropy"),
        (entropy_without_gradient, "error of d_logits"),
        (nan_logprob, "error of logprob nan"),
        (no_entropy, "no entropy"),
        (other_tokens, "error of logprob"),
    ],
)
def test_wrong_implementation_is_refused(add_peer, wrong, reason):
    with pytest.raises(correctness.Refused, match=reason):
        correctness.check(TASKS["token_stats"], SHAPE, add_peer(wrong), CPU)


def test_limits_of_ours_are_tighter_than_those_of_peers(add_peer):
    def rounded(problem):
        return correct(replace(problem, logits=problem.hidden @ problem.weight.T))

    bf16 = replace(SHAPE, dtype="bf16")
    task = TASKS["linear_token_stats"]
    correctness.check(task, bf16, add_peer(rounded), CPU)
    with pytest.raises(correctness.Refused, match="error of logprob"):
        correctness.check(task, bf16, add_peer(rounded, OURS), CPU)


@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd"])
@pytest.mark.parametrize("peer", ["TRL", "Liger"])
def test_peers_compute_the_same_distillation(peer, divergence):
    if reason := PEERS[peer].missing():
        pytest.skip(reason)
    task = TASKS[f"linear_distillation_{divergence}"]
    errors = correctness.check(task, replace(SHAPE, masked=0.5), peer, CPU)
    assert set(errors) == {"loss", "d_hidden", "d_weight"}


def test_jsd_with_the_weights_exchanged_is_refused(monkeypatch):
    def exchanged(problem):
        loss = grpo_kernels.linear_distillation_loss(
            problem.hidden, problem.weight, problem.ref_hidden, problem.ref_weight,
            divergence="jsd", jsd_weight=1 - problem_module.JSD_WEIGHT,
        ).loss  # fmt: skip
        return {"loss": loss}

    tasks = {"linear_distillation_jsd": exchanged}
    monkeypatch.setitem(PEERS, "suspect", Peer("suspect", tasks, "the truth"))
    with pytest.raises(correctness.Refused, match="error of d_hidden"):
        correctness.check(TASKS["linear_distillation_jsd"], SHAPE, "suspect", CPU)


@pytest.fixture
def harness():
    return Harness(CPU, ResultFile(None, CPU, {}), quick=False)


@pytest.mark.parametrize(
    ("wrong", "status"), [(entropy_too_large, "refused"), (lambda problem: 1 / 0, "failed")]
)
def test_refused_or_failed_peer_has_a_record_without_time(
    add_peer, harness, request, wrong, status
):
    case = Case(TASKS["token_stats"], "both", SHAPE, add_peer(wrong))
    with pytest.raises(pytest.xfail.Exception):
        harness.measure(case, request)
    (record,) = harness.results.records.values()
    assert (record.status, record.seconds) == (status, None)
    assert record.reason


def test_wrong_result_of_ours_is_an_error(add_peer, harness, request):
    case = Case(TASKS["token_stats"], "both", SHAPE, add_peer(entropy_too_large, OURS))
    with pytest.raises(correctness.Refused):
        harness.measure(case, request)


@pytest.mark.benchmark(timer=clock.now)
@pytest.mark.clock
def test_delay_shows_in_the_time(add_peer, harness, request):
    delay = 0.05

    def slow(problem):
        time.sleep(delay)
        return correct(problem)

    case = Case(TASKS["token_stats"], "both", SHAPE, add_peer(slow))
    problem = make_problem("logits", SHAPE, CPU)
    fast = clock.median_seconds(call_of(correct, "both", problem))
    harness.measure(case, request)
    (record,) = harness.results.records.values()
    assert fast + 0.9 * delay < record.seconds < fast + 3 * delay
    assert record.lower_quartile <= record.seconds <= record.upper_quartile


class CopiedBytes(TorchDispatchMode):
    """Counts what copies read and write, by PyTorch's dispatcher."""

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
def test_plain_copy_moves_the_counted_bytes(name, masked):
    task = TASKS[name]
    problem = make_problem("logits", replace(SHAPE, masked=masked), CPU)
    for phase in task.cost:
        copy = roofline.plain_copy(task, phase, problem)
        with CopiedBytes() as copied:
            copy()
        assert copied.count == task.bytes(problem, phase)


def test_counted_bytes_are_rows_read_and_rows_written():
    row, N = 4 * 512, 64
    problem = make_problem("logits", replace(SHAPE, masked=0.5), CPU)
    task = TASKS["token_stats"]
    assert task.bytes(problem, "forward") == row * N // 2
    assert task.bytes(problem, "backward") == row * (N // 2 + N)


@pytest.mark.clock
def test_plain_copy_runs_at_the_copy_bandwidth(monkeypatch):
    # The clock is rough on a shared machine: the best of five pairs, within a third. Each copy is
    # new, as in a case: its buffers are rotated, and none may be touched for the first time.
    monkeypatch.setitem(roofline.COPY_BYTES, "cpu", 128 << 20)
    task = TASKS["token_stats"]
    problem = make_problem("logits", Shape("SmolLM2 135M", 64, "fp32"), CPU)
    size = task.bytes(problem, "both")
    assert clock.copies_past_cache(size // 2) > 4
    ratios = []
    for _ in range(5):
        copy = roofline.plain_copy(task, "both", problem)
        roofline.copy_bandwidth.cache_clear()
        rate = size / clock.median_seconds(copy, rounds=5)
        ratios.append(rate / roofline.copy_bandwidth(CPU))
    roofline.copy_bandwidth.cache_clear()
    assert min(abs(ratio - 1) for ratio in ratios) < 1 / 3, ratios


def test_counted_flops_depend_on_mask_and_advantages():
    shape = replace(SHAPE, masked=0.5, inert=0.5)
    problem = make_problem("hidden", shape, CPU)
    token_flops = 2 * 512 * 32  # of one matmul
    task = TASKS["linear_grpo_loss"]
    assert (problem.num_active, problem.num_with_gradient) == (32, 16)
    assert task.flops(problem, "forward") == token_flops * 32
    assert task.flops(problem, "both") == token_flops * (32 + 2 * 16)


HIDDEN_TASKS = [task for task in TASKS.values() if task.level == "hidden"]


@pytest.mark.parametrize("in_one_chunk", [True, False])
@pytest.mark.parametrize("task", HIDDEN_TASKS, ids=lambda task: task.name)
def test_counted_products_are_those_of_this_package(task, in_one_chunk, monkeypatch):
    monkeypatch.setattr(chunk_size, "WORKSPACE", (1 << 20) if in_one_chunk else (1 << 16))
    monkeypatch.setattr(problem_module, "RANK", 1)
    monkeypatch.setattr(support, "SMALLEST_GAIN", 1)
    problem = make_problem("hidden", replace(SHAPE, inert=0.5), CPU, task.variant)
    function = PEERS[OURS].tasks[task.name]
    made = count_flops(lambda: gradients(function(problem), problem))
    counted = task.flops(problem, "both")
    # The products of the adapter are not counted: 3 · V and 4 · H beside 2 · V · H at least.
    of_adapter = 0.1 if task.variant == "adapter" else 0.0
    assert counted <= made <= (1 + of_adapter) * counted


@pytest.mark.parametrize("in_one_chunk", [True, False])
@pytest.mark.parametrize("task", HIDDEN_TASKS, ids=lambda task: task.name)
def test_bare_products_are_the_counted_ones(task, in_one_chunk, monkeypatch):
    monkeypatch.setattr(chunk_size, "WORKSPACE", (1 << 20) if in_one_chunk else (1 << 16))
    problem = make_problem("hidden", replace(SHAPE, masked=0.5, inert=0.5), CPU, task.variant)
    for phase in task.cost:
        call = roofline.bare_matmuls(task, phase, problem)
        assert count_flops(call) == task.flops(problem, phase)


def test_products_with_a_head_that_is_frozen_or_fits_one_chunk(monkeypatch):
    def products(name):
        task = TASKS[name]
        problem = make_problem("hidden", SHAPE, CPU, task.variant)
        return task.flops(problem, "both") / (2 * 512 * 32 * SHAPE.N)

    names = ("linear_token_stats", "linear_token_stats_frozen", "linear_token_stats_frozen_entropy")
    names += ("linear_grpo_loss_frozen", "linear_token_stats_adapter", "linear_grpo_loss_tree")
    assert [products(name) for name in names] == [3, 2, 2, 2, 2, 1.5]
    monkeypatch.setattr(chunk_size, "WORKSPACE", 1 << 16)
    assert [products(name) for name in names] == [4, 2, 3, 2, 3, 1.5]


def test_inputs_are_rotated_past_the_cache():
    problems = clock.rotate(make_problem("logits", SHAPE, CPU))
    addresses = {next(problems).logits.data_ptr() for _ in range(clock.MAX_COPIES)}
    assert len(addresses) == clock.MAX_COPIES  # 64 of 128 KiB: as many as are allowed


def test_result_file_resumes_the_same_commit_only(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    monkeypatch.setenv("GRPO_KERNELS_COMMIT", "one")
    record = Case(TASKS["token_stats"], "both", SHAPE, OURS).new_record()
    ResultFile(path, CPU, {}).add(record)
    assert ResultFile(path, CPU, {}).records == {record.key: record}
    assert read(path)[0]["commit"] == "one"
    monkeypatch.setenv("GRPO_KERNELS_COMMIT", "two")
    assert ResultFile(path, CPU, {}).records == {}


@pytest.mark.parametrize("limit", [0, 1023, 1024, 5000, 70_000, 1 << 21])
def test_max_tokens_are_found_within_six_percent(limit):
    tried = []

    def fits(N):
        tried.append(N)
        return N <= limit

    found = max_tokens.find_largest(fits, 1024, 512, 1 << 20)
    assert found <= limit
    assert all(N % 512 == 0 for N in tried)
    if 512 <= limit < 1 << 20:
        assert limit < found + max(512, found // 16) + 512
    elif limit >= 1 << 20:
        assert found == 1 << 20
    else:
        assert found == 0


@pytest.mark.parametrize("level", ["logits", "hidden"])
def test_keys_of_records_are_unique(level):
    keys = [case.new_record().key for case in cases(level, CPU)]
    assert len(keys) == len(set(keys)) > 50


def test_profile_attributes_the_time_to_operators():
    profiler = profile.profile_loss(SHAPE, 8, CPU)
    text = profile.summary(profiler, CPU)
    calls = {event.key: event.count for event in profiler.key_averages()}
    chunks = -(-SHAPE.N // 8)
    assert sum(calls.get(name, 0) for name in profile.MATMULS) == 3 * chunks
    shares = [float(share) for share in re.findall(r"([\d.]+)%$", text, re.M)]
    assert len(shares) == profile.ROWS and shares == sorted(shares, reverse=True)
