"""Everything that a GPU machine should be asked, in one command of less than nine minutes.

    python -m benchmarks.gpu --out DIR                        all parts
    python -m benchmarks.gpu --out DIR --only logits hidden   some
    python -m benchmarks.report    when the files of DIR have been copied to benchmarks/results

A part is a command of its own and a JSON file of its own, with device, driver, versions and commit
in it. What is cut off goes on where it stopped when the same command is given again. A copy without
history takes its commit from GRPO_KERNELS_COMMIT.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.core import clock
from benchmarks.core.results import ROOT, machine, read, same_run, slug, write_json

SECONDS = 520.0
# What matters most comes first, and is asked of a correct package only.
SUITES = {
    "hidden": ("-m", "pytest", "-q", "benchmarks/test_hidden.py"),
    "logits": ("-m", "pytest", "-q", "benchmarks/test_logits.py"),
    "step": ("-m", "pytest", "-q", "benchmarks/test_step.py"),
    "memory": ("-m", "benchmarks.max_tokens"),
}
PARTS = ("tests", *SUITES)


def run_tests(path: Path, device: torch.device, seconds: float) -> int:
    """The gpu-marked tests; their closing line is the result."""
    here = machine(device) | {"roofs": {}}
    if path.exists() and same_run(read(path)[0], here):
        print("done already")
        return 0
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            printed, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    print(printed)
    if process.returncode == 0:
        write_json(path, {"machine": here, "tests": printed.strip().split("\n")[-1].strip("= ")})
    return process.returncode


def run_suite(part: str, path: Path, seconds: float) -> int:
    command = [sys.executable, *SUITES[part], "--results", str(path)]
    return subprocess.run(command, cwd=ROOT, timeout=seconds, check=False).returncode


def run(parts: list[str], out: Path, device: torch.device, seconds: float) -> dict[str, str]:
    """By part what became of it: "done", "failed (exit N)" or "cut off"."""
    end = time.monotonic() + seconds
    outcomes = {}
    for part in parts:
        print(f"== {part}", flush=True)
        path = (out / f"{slug(machine(device)['device'])}-{part}.json").resolve()
        left = end - time.monotonic()
        try:
            if left <= 0:
                raise subprocess.TimeoutExpired(part, seconds)
            code = run_tests(path, device, left) if part == "tests" else run_suite(part, path, left)
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
    device = clock.device()
    if device.type != "cuda":
        raise SystemExit("no CUDA device here; `pytest benchmarks` measures this machine")
    outcomes = run(list(arguments.only), arguments.out, device, arguments.seconds)
    for part, outcome in outcomes.items():
        print(f"{part}: {outcome}")
    if "cut off" in outcomes.values():
        print("give the same command again: what is measured is kept")
    if set(outcomes.values()) != {"done"}:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
