"""Measure a GPU machine, the most valuable figures first; use what it has left at any moment.

    python -m benchmarks.gpu --out DIR                      all parts
    python -m benchmarks.gpu --out DIR --only odd hidden    some parts
    python -m benchmarks.gpu --out DIR --rehearse           every part at tiny sizes, on a CPU
    python -m benchmarks.report    after copying the files of DIR to benchmarks/results

A part is a command of its own with a JSON file of its own, which names the device, driver, versions
and commit, and is written after each case. DIR/summary.md is rewritten after each part. A part that
fails or exceeds its limit does not stop the others. Give the same command again to continue: parts
that are done and cases that were measured are not repeated. A copy of the repository without
history takes its commit from GRPO_KERNELS_COMMIT.

A rehearsal runs the same code; the parts of this package's kernels are in Triton's interpreter. It
does not reach the CUDA allocator, the device clock, the driver or compute-sanitizer.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.core import clock
from benchmarks.core.results import ROOT, Record, describe_machine, read, same_run, slug, write_json
from benchmarks.peers import OURS
from benchmarks.report import tables
from benchmarks.report.targets import DTYPE, MODEL, TARGETS

SECONDS = 520.0
GRACE = 5.0  # between the signal to end and the signal to kill
SANITIZER = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
OWN = ("-m", "benchmarks.gpu_parts")
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
UNREHEARSED = "the CUDA allocator, the device clock, the driver and compute-sanitizer"


@dataclass(frozen=True)
class Part:
    question: str
    command: tuple[str, ...]  # of Python
    limit: float = 115.0  # seconds
    writes: bool = True  # takes --results FILE
    rehearse: tuple[str, ...] = ("--rehearse",)  # its options in a rehearsal
    interpreted: bool = False  # there the kernels run in Triton's interpreter


# In the order of value.
PARTS = {
    "odd": Part("odd vocabularies as fast as aligned ones?", (*OWN, "odd"), interpreted=True),
    "one_launch": Part(
        "one launch as fast with this Triton?", (*OWN, "one_launch"), interpreted=True
    ),
    "hidden": Part("targets from hidden states", (*OWN, "hidden"), interpreted=True),
    "logits": Part("targets from logits", (*OWN, "logits"), interpreted=True),
    "bits": Part(
        "rows keep their bits, split or whole, at any address?", (*OWN, "bits"), interpreted=True
    ),
    "memory": Part("extra memory flat in the tokens?", (*OWN, "memory"), interpreted=True),
    "max_tokens": Part(
        "most tokens of each peer", ("-m", "benchmarks.max_tokens"), rehearse=("--stand-in", "2000")
    ),
    "sanitizer": Part(
        "any access out of bounds?", (*OWN, "launches"), writes=False, interpreted=True
    ),
    "hidden_peers": Part(
        "peers from hidden states",
        (*PYTEST, "benchmarks/test_ops.py::test_hidden"),
        rehearse=("--quick", "-k", "linear_gspo_loss"),
    ),
    "logits_peers": Part(
        "peers from logits",
        (*PYTEST, "benchmarks/test_ops.py::test_logits"),
        rehearse=("--quick", "-k", "grpo_loss and reference and not compiled"),
    ),
    "step": Part(
        "a training step",
        (*PYTEST, "benchmarks/test_step.py"),
        rehearse=("--quick", "-k", "training_step and no"),
    ),
    "tests": Part(
        "the tests that need a GPU",
        (*PYTEST, "tests", "-m", "gpu"),
        limit=480.0,
        writes=False,
        rehearse=("-k", "test_launchers"),
    ),
}


def run_bounded(command: list[str], limit: float, log: Path, **environment: str) -> str:
    """Run a command in a process group of its own; return "done", "failed (...)" or "cut off".

    At the limit the whole group ends: a child that holds the GPU would disturb the next part.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=GRACE)
            except subprocess.TimeoutExpired:
                pass
            return "cut off"
        finally:
            # Also after an interrupt, and for children that outlived their parent.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    return "done" if code == 0 else f"failed (exit {code})"


class Run:
    """The files of one run: a JSON file and a log per part, the outcomes, the summary."""

    def __init__(self, out: Path, device: torch.device, *, rehearse: bool) -> None:
        self.out, self.rehearse = out.resolve(), rehearse
        self.machine = describe_machine(device) | {"roofs": {}}
        self.name = ("rehearsal-" if rehearse else "") + slug(self.machine["device"])
        self.state = self.out / f"{self.name}.outcomes"
        self.outcomes: dict[str, dict] = {}
        if self.state.exists():
            then = json.loads(self.state.read_text())
            if same_run(then["machine"], self.machine):
                self.outcomes = then["outcomes"]

    def file_of(self, part: str) -> Path:
        return self.out / f"{self.name}-{part}.json"

    def command_of(self, name: str) -> list[str]:
        part = PARTS[name]
        command = [sys.executable, *part.command]
        if part.writes:
            command += ["--results", str(self.file_of(name))]
        if self.rehearse:
            command += part.rehearse
        elif name == "sanitizer":
            command = [*SANITIZER, *command]
        return command

    def records_of(self, part: str) -> list[Record]:
        path = self.file_of(part)
        if not path.exists():
            return []
        machine, records, _ = read(path)
        return records if same_run(machine, self.machine) else []

    def execute(self, name: str, limit: float) -> None:
        """Run a part that is not done, and write its outcome."""
        if self.outcomes.get(name, {}).get("outcome") == "done":
            return
        started, log = time.monotonic(), self.out / f"{self.name}-{name}.log"
        interpreted = PARTS[name].interpreted and self.machine["kind"] != "cuda"
        environment = {"TRITON_INTERPRET": str(int(interpreted))}
        if name == "sanitizer" and not self.rehearse and not shutil.which(SANITIZER[0]):
            outcome = f"{SANITIZER[0]} is not on PATH"
        else:
            command = self.command_of(name)
            outcome = run_bounded(command, min(limit, PARTS[name].limit), log, **environment)
        lines = log.read_text(errors="replace").split("\n") if log.exists() else []
        last = next((line for line in reversed(lines) if line.strip()), "").strip("= ")
        self.outcomes[name] = {
            "outcome": outcome,
            "seconds": round(time.monotonic() - started, 1),
            "last line": last[:160],
        }
        if name == "tests" and outcome == "done":
            write_json(self.file_of(name), {"machine": self.machine, "tests": last})
        self.write()

    def write(self) -> None:
        write_json(self.state, {"machine": self.machine, "outcomes": self.outcomes})
        summary = self.out / "summary.md"
        part = summary.with_suffix(".part")
        part.write_text(self.summary())
        part.replace(summary)

    def summary(self) -> str:
        """Return the figures so far: parts, targets, odd vocabularies, bits, memory."""
        machine = self.machine
        versions = ", ".join(f"{name} {text}" for name, text in machine["versions"].items())
        text = [f"{machine['device']}, {versions}, commit {machine['commit']}, {machine['date']}"]
        if self.rehearse:
            text.append(f"A rehearsal: no figure counts. Not rehearsed: {UNREHEARSED}.")
        rows = []
        for name, part in PARTS.items():
            outcome = self.outcomes.get(name, {"outcome": "not run"})
            cases = str(len(self.records_of(name))) if part.writes else tables.NONE
            seconds = str(outcome.get("seconds", tables.NONE))
            last = outcome.get("last line", "").replace("|", "\\|")
            rows.append([name, part.question, outcome["outcome"], cases, seconds, last])
        heads = ("part", "question", "outcome", "cases", "seconds", "last line")
        text.append(tables.table(heads, rows))

        found = {
            (record.task, record.phase, record.N): record
            for part in ("hidden", "logits")
            for record in self.records_of(part)
            if (record.model, record.dtype, record.peer) == (MODEL, DTYPE, OURS)
        }
        rows = []
        for target in TARGETS:
            record = found.get((target.task, target.phase, target.N))
            time_text, verdict = tables.NONE, "not measured"
            if record is not None:
                time_text, verdict = tables.outcome(record), record.reason or record.status
            if record is not None and record.seconds is not None:
                met = 1e3 * record.seconds <= target.milliseconds
                verdict = "met" if met else f"missed: {1e3 * record.seconds:.2f}"
            name = f"{target.task}, {target.phase}, {target.N:,}"
            rows.append([name, time_text, f"{target.milliseconds} ms", verdict])
        text.append("Targets are an H100's.")
        text.append(tables.table(("task", "time", "target", ""), rows))

        for part in ("odd", "one_launch", "bits", "memory"):
            heads = ("case", "status", "time", "of roof", "extra memory", "")
            rows = [
                [
                    f"{record.task}, {record.phase}, {record.shape}, {record.peer}",
                    record.status,
                    tables.time(record.seconds),
                    tables.percent(record.percent_of_roof),
                    tables.memory(record.extra_bytes),
                    (record.reason or "").replace("|", "\\|"),
                ]
                for record in self.records_of(part)
            ]
            if rows:
                text += [f"## {part}", tables.table(heads, rows)]
        return "\n\n".join(text) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS], metavar="PART")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes; needs no GPU")
    settings = parser.parse_args(arguments)
    device = clock.default_device()
    if device.type != "cuda" and not settings.rehearse:
        raise SystemExit("no CUDA device here; --rehearse runs every part at tiny sizes")
    run, end = Run(settings.out, device, rehearse=settings.rehearse), time.monotonic()
    end += settings.seconds
    for name in settings.only:
        left = end - time.monotonic()
        if left <= 0:
            print("no time is left: give the same command again to continue")
            break
        run.execute(name, left)
        outcome = run.outcomes[name]
        print(f"{name}: {outcome['outcome']}, {outcome['seconds']} s", flush=True)
    run.write()
    print(run.out / "summary.md")
    if any(run.outcomes.get(name, {}).get("outcome") != "done" for name in settings.only):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
