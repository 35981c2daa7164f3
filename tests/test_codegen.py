"""The machine code of the kernels: no spills, wide loads, few instructions per entry."""

import json
import os
import subprocess
import sys

import pytest

FORWARD = "token_stats_forward: log-prob, entropy"
BACKWARD = "token_stats_backward: log-prob, entropy"


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


def check_no_spills_and_wide_loads(report: dict) -> None:
    assert report["stack_bytes"] == 0, report
    assert report["spills"] == 0, report
    assert report["main_loop"]["widest_load"] == 16, report
    assert report["main_loop"]["narrowest_load"] == 16 or report["target"] == "gfx942", report


def test_hopper_kernels_have_no_spills_and_load_16_bytes_per_thread(hopper):
    assert len(hopper) == 12
    for report in hopper.values():
        check_no_spills_and_wide_loads(report)


def test_hopper_main_loops_have_no_barrier(hopper):
    assert {each["main_loop"]["barriers"] for each in hopper.values()} == {0}


@pytest.mark.parametrize(
    ("kernel", "instructions", "special"), [(FORWARD, 12.0, 1.3), (BACKWARD, 9.0, 1.05)]
)
def test_hopper_loops_stay_within_their_budget_per_entry(hopper, kernel, instructions, special):
    loop = hopper[kernel]["main_loop"]
    # An entry cannot do with less than a load, a conversion and an exponential: a count below
    # that would mean that the loop was not found.
    assert 4 < loop["instructions"] <= instructions
    assert 1 <= loop["special"] <= special


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target_and_dtype_without_spills(tmp_path_factory):
    reports = compile_offline(tmp_path_factory, "--all")
    assert {each["target"] for each in reports} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {each["dtype"] for each in reports} == {"bf16", "fp16", "fp32", "fp32>bf16"}
    for report in reports:
        check_no_spills_and_wide_loads(report)
