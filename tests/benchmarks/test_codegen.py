"""The kernels' machine code: no spills, wide loads, few instructions per vocabulary entry."""

import json
import os
import subprocess
import sys
from itertools import product

import pytest
import triton

from benchmarks.codegen.__main__ import DEFAULT, MAIN_KERNELS, spread
from benchmarks.codegen.chips import (
    CHIPS,
    MEMORY_EFFICIENCY,
    MEMORY_LATENCY,
    Chip,
    PassCost,
    predict,
)
from benchmarks.codegen.variants import LAYOUTS, TARGETS, variants
from grpo_kernels.backends.triton.launch_configs import pick_row_launch

# Triton 3.6 adds up a tile in another order, which takes another exponential for each access.
OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
FORWARD = "token_stats_forward: log-prob, entropy"
FORWARD_SUMS = "token_stats_forward: log-prob, entropy, sums"
FORWARD_TOP = "token_stats_forward: log-prob, entropy, top"
FORWARD_SOFTCAP = "token_stats_forward: log-prob, entropy, softcap"
BACKWARD = "token_stats_backward: log-prob, entropy"
BACKWARD_SOFTCAP = "token_stats_backward: log-prob, entropy, softcap"
GRPO_LOSS = "grpo_loss: k3, entropy, importance"
# Kernels predicted below 85% of their floor, with the least that is accepted.
SLOWER = {
    # Two passes, and the second reads two rows that do not fit into the L2.
    "approximate_kl_forward": 0.45,
    # The logarithm of the mixture is a polynomial: with it an entry takes fifty-five instructions.
    "jsd_forward": 0.6,
    "jsd_forward: softcap": 0.38,  # of both rows
    "jsd_backward: softcap": 0.55,
    # The softcap's tanh takes sixteen instructions per entry, two of them special-function calls.
    FORWARD_SOFTCAP: 0.65,
    "token_stats_part: log-prob, entropy, softcap": 0.65,
    "grpo_loss: k3_corrected, entropy, softcap": 0.59,
}


def compile_offline(tmp_path_factory, *options: str) -> list[dict]:
    """Run benchmarks.codegen in its own process: Triton's interpreter here compiles nothing."""
    file = tmp_path_factory.mktemp("codegen") / "report.json"
    command = [sys.executable, "-m", "benchmarks.codegen", "--json", str(file), *options]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def hopper(tmp_path_factory) -> dict[str, dict]:
    """Reports for sm_90 and bf16, by kernel name."""
    return {report["kernel"]: report for report in compile_offline(tmp_path_factory)}


def check_no_spills_and_wide_accesses(report: dict) -> None:
    is_one_launch = report["kernel"].startswith("grpo_loss")
    assert report["stack_bytes"] <= (16 if OLD_TRITON and is_one_launch else 0), report
    assert report["spills"] == 0, report
    if not report["kernel"].startswith("top_entries"):  # which reads no whole rows
        assert report["load_bytes"][-1] == 16, report
    for loop in report["loops"]:
        assert set(loop["load_bytes"]) == {16}, report
        narrow = 8 if report["dtype"] == "fp32>bf16" else 16  # four entries of two bytes
        assert set(loop["store_bytes"]) <= {16, narrow}, report
        assert loop["barriers"] == 0, report


def test_hopper_kernels_have_no_spills_and_wide_accesses(hopper):
    assert len(hopper) == 40
    for report in hopper.values():
        check_no_spills_and_wide_accesses(report)


@pytest.mark.parametrize(
    ("kernel", "passes"),
    [
        (FORWARD, [(10.5, 1.1)]),
        (FORWARD_SUMS, [(16.8, 1.1)]),
        (FORWARD_TOP, [(11.3, 1.1)]),
        (FORWARD_SOFTCAP, [(28.0, 3.2)]),
        (BACKWARD, [(9.5, 1.05)]),
        (BACKWARD_SOFTCAP, [(31.0, 3.2)]),
        (GRPO_LOSS, [(10.8, 1.15), (10.5, 1.05)]),
    ],
)
def test_hopper_loops_stay_within_instruction_budget(hopper, kernel, passes):
    """Limits of instructions and special-function calls per entry, with a tenth to spare."""
    if OLD_TRITON:
        passes = [(instructions + 1.0, special + 0.06) for instructions, special in passes]
    loops = hopper[kernel]["loops"]
    for loop, (instructions, special) in zip(loops, passes, strict=True):
        # Every entry needs a load, a conversion and an exponential: a smaller count would mean that
        # the loop was not found.
        assert 4 < loop["instructions"] <= instructions
        assert 1 <= loop["special"] <= special


def test_hopper_kernels_are_memory_bound(hopper):
    passes = {name: report for name, report in hopper.items() if report["loops"]}
    for name, report in passes.items():
        prediction, least = report["prediction"], SLOWER.get(name, 0.85)
        assert prediction["of_floor"] >= least, (name, prediction)
        assert prediction["binds"] == "memory" or name in SLOWER, (name, prediction)
    assert all(hopper[name]["prediction"]["of_floor"] < 0.85 for name in SLOWER)


def test_grpo_loss_kernel_is_predicted_near_one_read_and_one_write(hopper):
    """One program per multiprocessor finds its row in the L2 in the second pass."""
    report = hopper[GRPO_LOSS]
    assert report["resident_programs"] == 1
    assert report["prediction"]["seconds"] <= 1.15 * report["prediction"]["floor"]


@pytest.mark.parametrize(("architecture", "itemsize"), [(80, 2), (90, 2), (90, 4), (100, 4)])
def test_grpo_loss_runs_one_program_per_multiprocessor_whatever_its_registers(
    architecture, itemsize
):
    launch = pick_row_launch(
        "grpo_loss", 128_256, itemsize, architecture=architecture, interpreted=False
    )
    assert launch.programs == 1


def test_prediction_is_the_slowest_limit():
    chip = Chip("a chip", bandwidth=1e12, multiprocessors=10, clock=1e9, l2_bytes=1 << 20,
                shared_bytes=1 << 17)  # fmt: skip
    ample = {"read_bytes": 2, "written_bytes": 2, "loads_in_flight": 1 << 20, "again": False}
    case = {"resident": 1, "threads": 1024, "rows": 10, "V": 1000}
    memory = predict(chip, [PassCost(1.0, 0.1, **ample)], **case)
    assert memory.binds == "memory" and memory.of_floor == pytest.approx(MEMORY_EFFICIENCY)
    assert memory.floor == pytest.approx(10 * 1000 * 4 / 1e12)
    issue = predict(chip, [PassCost(20.0, 0.1, **ample)], **case)
    assert issue.binds == "issue"
    assert issue.seconds == pytest.approx(10 * 1000 * 20 / (10 * 4 * 32 * 1e9))
    special = predict(chip, [PassCost(1.0, 5.0, **ample)], **case)
    assert special.binds == "special"
    starved = predict(chip, [PassCost(1.0, 0.1, **{**ample, "loads_in_flight": 16})], **case)
    in_flight = 16 * 1024 * 10
    assert starved.seconds == pytest.approx(10 * 1000 * 4 / (in_flight / MEMORY_LATENCY))


def test_second_pass_reads_memory_if_rows_do_not_fit_l2():
    chip = Chip("a chip", bandwidth=1e12, multiprocessors=10, clock=1e9, l2_bytes=100_000,
                shared_bytes=1 << 17)  # fmt: skip
    first = PassCost(1.0, 0.1, 2, 0, 1 << 20, again=False)
    second = PassCost(1.0, 0.1, 2, 2, 1 << 20, again=True)
    case = {"threads": 1024, "rows": 10, "V": 3000}
    fits = predict(chip, [first, second], resident=1, **case)
    misses = predict(chip, [first, second], resident=2, **case)
    assert fits.floor == misses.floor and misses.seconds == pytest.approx(1.5 * fits.seconds)


def test_programs_on_some_multiprocessors_have_their_issue_slots_alone():
    chip = Chip("a chip", bandwidth=1e12, multiprocessors=10, clock=1e9, l2_bytes=100_000,
                shared_bytes=1 << 17)  # fmt: skip
    first = PassCost(1.0, 0.1, 2, 0, 1 << 20, again=False)
    second = PassCost(20.0, 0.1, 2, 2, 1 << 20, again=True)
    case = {"threads": 1024, "rows": 10, "V": 6000, "resident": 1}
    whole, half = (predict(chip, [first, second], **case, programs=n) for n in (10, 5))
    issue, memory = 20 / (5 * 4 * 32 * 1e9), 2 / (MEMORY_EFFICIENCY * 1e12)
    assert half.seconds == pytest.approx(10 * 6000 * (issue + memory))
    assert whole.seconds == pytest.approx(10 * 6000 * (issue / 2 + memory))


def test_resident_programs_limits():
    chip = CHIPS["sm_90"]
    assert chip.resident_programs(32, 0, 32) == 2
    assert chip.resident_programs(33, 0, 32) == 1  # rounded up to 40
    assert chip.resident_programs(64, 0, 4) == 8
    assert chip.resident_programs(16, 0, 1) == 32
    assert chip.resident_programs(16, 100 << 10, 1) == 2


def test_spread_meets_each_target_and_each_dtype():
    names = [variant.name for variant in variants()]
    cases = [(name, *DEFAULT) for name in names] + spread(names)
    assert len(cases) == len(set(cases)) < len(names) * len(TARGETS) * len(LAYOUTS) / 2
    for name in names:
        met = [(target, dtype) for case, target, dtype in cases if case == name]
        everywhere = set(product(TARGETS, LAYOUTS))
        assert {target for target, _ in met} == set(TARGETS)
        assert {dtype for _, dtype in met} == set(LAYOUTS)
        assert (set(met) == everywhere) is (name in MAIN_KERNELS)
    assert set(MAIN_KERNELS) <= set(names)


@pytest.mark.slow
def test_kernels_of_all_dtypes_and_targets_have_no_spills(tmp_path_factory):
    reports = compile_offline(tmp_path_factory, "--spread")
    assert len(reports) == len(spread([variant.name for variant in variants()]))
    for report in reports:
        check_no_spills_and_wide_accesses(report)


@pytest.mark.slow
def test_all_variants_compile_in_fp64():
    """The interpreter accepts fp64 operations that a GPU has no instruction for.

    The largest logits of fp64 are found by sorting, without a kernel.
    """
    code = (
        "from benchmarks.codegen.variants import compile_variant, variants\n"
        "for variant in variants():\n"
        "    if 'top' not in variant.name: compile_variant(variant, 'sm_90', 'fp64')\n"
        "print('all of them')"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "all of them\n", done.stderr[-2000:]
