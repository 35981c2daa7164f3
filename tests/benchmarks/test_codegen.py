"""The machine code of the kernels: no spills, wide loads, few instructions per entry."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.codegen.chips import (
    CHIPS,
    MEMORY_EFFICIENCY,
    MEMORY_LATENCY,
    Chip,
    Walk,
    predict,
)

FORWARD = "token_stats_forward: log-prob, entropy"
BACKWARD = "token_stats_backward: log-prob, entropy"
ONE_LAUNCH = "grpo_loss: k3, entropy, importance"
# Predicted below 85% of the floor, and why; chips.py says how.
SLOWER = {
    # Two walks, of which the second reads two rows that do not fit into the L2.
    "approximate_kl_forward": 0.45,
    # Thirty instructions of every entry are the softcap's tanh and its division.
    "token_stats_forward: log-prob, entropy, softcap": 0.42,
    "token_stats_part: log-prob, entropy, softcap": 0.42,
    "token_stats_backward: log-prob, entropy, softcap": 0.6,
    "grpo_loss: k3_corrected, entropy, softcap": 0.34,
}


def compile_offline(tmp_path_factory, *options: str) -> list[dict]:
    """In a process of its own: this one may run Triton's interpreter, which compiles nothing."""
    file = tmp_path_factory.mktemp("codegen") / "report.json"
    command = [sys.executable, "-m", "benchmarks.codegen", "--json", str(file), *options]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def hopper(tmp_path_factory) -> dict[str, dict]:
    """sm_90, bf16, by kernel."""
    return {each["kernel"]: each for each in compile_offline(tmp_path_factory)}


def check_no_spills_and_wide_accesses(report: dict) -> None:
    assert report["stack_bytes"] == 0, report
    assert report["spills"] == 0, report
    assert report["load_bytes"][-1] == 16, report
    for loop in report["loops"]:
        assert set(loop["load_bytes"]) == {16}, report
        narrow = 8 if report["dtype"] == "fp32>bf16" else 16  # four entries of two bytes
        assert set(loop["store_bytes"]) <= {16, narrow}, report
        assert loop["barriers"] == 0, report


def test_hopper_kernels_have_no_spills_and_no_barrier_and_move_16_bytes_per_thread(hopper):
    assert len(hopper) == 24
    for report in hopper.values():
        check_no_spills_and_wide_accesses(report)


@pytest.mark.parametrize(
    ("kernel", "walks"),
    [
        (FORWARD, [(10.5, 1.1)]),
        (BACKWARD, [(9.5, 1.05)]),
        (ONE_LAUNCH, [(10.8, 1.15), (10.5, 1.05)]),
    ],
)
def test_hopper_loops_stay_within_their_budget_per_entry(hopper, kernel, walks):
    """Instructions and special-function calls, with a tenth to spare."""
    loops = hopper[kernel]["loops"]
    for loop, (instructions, special) in zip(loops, walks, strict=True):
        # An entry cannot do with less than a load, a conversion and an exponential: a count below
        # that would mean that the loop was not found.
        assert 4 < loop["instructions"] <= instructions
        assert 1 <= loop["special"] <= special


def test_hopper_kernels_are_bound_by_memory(hopper):
    for name, report in hopper.items():
        prediction, least = report["prediction"], SLOWER.get(name, 0.85)
        assert prediction["of_floor"] >= least, (name, prediction)
        assert prediction["binds"] == "memory" or name in SLOWER, (name, prediction)
    assert all(hopper[name]["prediction"]["of_floor"] < 0.85 for name in SLOWER)


def test_one_launch_is_predicted_within_a_third_of_its_floor(hopper):
    """1 read and 1 write; as long as one program to a multiprocessor finds its row in the L2."""
    report = hopper[ONE_LAUNCH]
    assert report["resident_programs"] == 1
    assert report["prediction"]["seconds"] <= 1.3 * report["prediction"]["floor"]


def test_a_prediction_is_the_slowest_of_what_a_walk_needs():
    chip = Chip("a chip", bandwidth=1e12, multiprocessors=10, clock=1e9, l2_bytes=1 << 20,
                shared_bytes=1 << 17)  # fmt: skip
    ample = {"read_bytes": 2, "written_bytes": 2, "loads_in_flight": 1 << 20, "again": False}
    case = {"resident": 1, "threads": 1024, "rows": 10, "V": 1000}
    memory = predict(chip, [Walk(1.0, 0.1, **ample)], **case)
    assert memory.binds == "memory" and memory.of_floor == pytest.approx(MEMORY_EFFICIENCY)
    assert memory.floor == pytest.approx(10 * 1000 * 4 / 1e12)
    issue = predict(chip, [Walk(20.0, 0.1, **ample)], **case)
    assert issue.binds == "issue"
    assert issue.seconds == pytest.approx(10 * 1000 * 20 / (10 * 4 * 32 * 1e9))
    special = predict(chip, [Walk(1.0, 5.0, **ample)], **case)
    assert special.binds == "special"
    starved = predict(chip, [Walk(1.0, 0.1, **{**ample, "loads_in_flight": 16})], **case)
    in_flight = 16 * 1024 * 10
    assert starved.seconds == pytest.approx(10 * 1000 * 4 / (in_flight / MEMORY_LATENCY))


def test_a_second_walk_reads_memory_where_its_rows_do_not_fit_the_l2():
    chip = Chip("a chip", bandwidth=1e12, multiprocessors=10, clock=1e9, l2_bytes=100_000,
                shared_bytes=1 << 17)  # fmt: skip
    first = Walk(1.0, 0.1, 2, 0, 1 << 20, again=False)
    second = Walk(1.0, 0.1, 2, 2, 1 << 20, again=True)
    case = {"threads": 1024, "rows": 10, "V": 3000}
    fits = predict(chip, [first, second], resident=1, **case)
    spilt = predict(chip, [first, second], resident=2, **case)
    assert fits.floor == spilt.floor and spilt.seconds == pytest.approx(1.5 * fits.seconds)


def test_residency_is_limited_by_registers_warps_programs_and_shared_memory():
    chip = CHIPS["sm_90"]
    assert chip.resident_programs(32, 0, 32) == 2
    assert chip.resident_programs(33, 0, 32) == 1  # rounded up to 40
    assert chip.resident_programs(64, 0, 4) == 8
    assert chip.resident_programs(16, 0, 1) == 32
    assert chip.resident_programs(16, 100 << 10, 1) == 2


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target_and_dtype_without_spills(tmp_path_factory):
    reports = compile_offline(tmp_path_factory, "--all")
    assert {each["target"] for each in reports} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {each["dtype"] for each in reports} == {"bf16", "fp16", "fp32", "fp32>bf16"}
    for report in reports:
        check_no_spills_and_wide_accesses(report)


@pytest.mark.slow
def test_every_kernel_compiles_in_fp64():
    """The interpreter takes what no GPU has an instruction for."""
    code = (
        "from benchmarks.codegen.variants import compile_variant, variants\n"
        "for each in variants(): compile_variant(each, 'sm_90', 'fp64')\n"
        "print('all of them')"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "all of them\n", done.stderr[-2000:]
