"""Measure a GPU machine with one command in less than nine minutes.

    python -m benchmarks.gpu --out DIR                        all parts
    python -m benchmarks.gpu --out DIR --only logits hidden   some parts
    python -m benchmarks.report    after copying the files of DIR to benchmarks/results

A part is a command of its own with a JSON file of its own, which names the device, driver, versions
and commit. Give the same command again to continue an interrupted run. A copy of the repository
without history takes its commit from GRPO_KERNELS_COMMIT.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.core import clock
from benchmarks.core.results import ROOT, describe_machine, read, same_run, slug, write_json

SECONDS = 520.0
# In the order of importance, after the tests.
SUITES = {
    "hidden": ("-m", "pytest", "-q", "benchmarks/test_ops.py::test_hidden"),
    "logits": ("-m", "pytest", "-q", "benchmarks/test_ops.py::test_logits"),
    "step": ("-m", "pytest", "-q", "benchmarks/test_step.py"),
    "memory": ("-m", "benchmarks.max_tokens"),
}
PARTS = ("tests", *SUITES)


def run_tests(path: Path, device: torch.device, seconds: float) -> int:
    """Run the gpu-marked tests and write their last line; return the exit code."""
    machine = describe_machine(device) | {"roofs": {}}
    if path.exists() and same_run(read(path)[0], machine):
        print("done already")
        return 0
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=seconds)
    print(done.stdout)
    if done.returncode == 0:
        last_line = done.stdout.strip().split("\n")[-1].strip("= ")
        write_json(path, {"machine": machine, "tests": last_line})
    return done.returncode


def run(parts: list[str], out: Path, device: torch.device, seconds: float) -> dict[str, str]:
    """Run the parts; return the outcome of each: "done", "failed (exit N)" or "cut off"."""
    end = time.monotonic() + seconds
    name = slug(describe_machine(device)["device"])
    outcomes = {}
    for part in parts:
        print(f"== {part}", flush=True)
        path = (out / f"{name}-{part}.json").resolve()
        left = end - time.monotonic()
        try:
            if left <= 0:
                raise subprocess.TimeoutExpired(part, seconds)
            if part == "tests":
                code = run_tests(path, device, left)
            else:
                command = [sys.executable, *SUITES[part], "--results", str(path)]
                code = subprocess.run(command, cwd=ROOT, timeout=left).returncode
            outcomes[part] = f"failed (exit {code})" if code else "done"
        except subprocess.TimeoutExpired:
            outcomes[part] = "cut off"
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together")
    arguments = parser.parse_args()
    device = clock.default_device()
    if device.type != "cuda":
        raise SystemExit("no CUDA device here; `pytest benchmarks` measures this machine")
    outcomes = run(list(arguments.only), arguments.out, device, arguments.seconds)
    for part, outcome in outcomes.items():
        print(f"{part}: {outcome}")
    if "cut off" in outcomes.values():
        print("give the same command again to continue; what was measured is not measured again")
    if set(outcomes.values()) != {"done"}:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
