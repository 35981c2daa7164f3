"""A result file: the machine, the versions, the roofs, and one record per case."""

import json
import os
import platform
import re
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.core.shapes import PLANS, Shape

ROOT = Path(__file__).parents[2]
DIRECTORY = Path(__file__).parents[1] / "results"
PACKAGES = ("torch", "triton", "transformers", "trl", "liger_kernel", "cut_cross_entropy")
PACKAGES += ("quack-kernels", "numpy")


@dataclass
class Record:
    """The measurement of one case; None where nothing was measured."""

    task: str
    phase: str
    model: str
    N: int
    dtype: str
    masked: float
    inert: float
    peer: str
    status: str = "ok"  # or "failed" (it raised), "refused" (wrong values), "out of memory"
    reason: str | None = None
    seconds: float | None = None  # median of the rounds
    lower_quartile: float | None = None
    upper_quartile: float | None = None
    rounds: int | None = None
    bytes: int | None = None  # the fewest that must move
    flops: int | None = None  # of the matmuls that the task needs
    percent_of_roof: float | None = None  # of the copy bandwidth, or of the rate of torch.mm
    extra_bytes: int | None = None  # peak memory, inputs not counted
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def shape(self) -> Shape:
        return Shape(self.model, self.N, self.dtype, self.masked, self.inert)

    @property
    def key(self) -> tuple[str, str, Shape, str]:
        return self.task, self.phase, self.shape, self.peer


class ResultFile:
    """A file that is written after every record, so that an interrupted run can continue.

    Records of the same commit, versions and device that the file has already are not measured
    again. Without a path, records stay in memory.
    """

    def __init__(self, path: Path | None, device: torch.device, roofs: dict[str, float]) -> None:
        self._path = path
        self.machine = describe_machine(device) | {"roofs": roofs}
        self.records: dict[tuple, Record] = {}
        if path is not None and path.exists():
            machine_then, records, _ = read(path)
            if same_run(machine_then, self.machine):
                self.records = {record.key: record for record in records}

    def add(self, record: Record) -> None:
        self.records[record.key] = record
        if self._path is not None:
            content = {"machine": self.machine, "records": [*map(asdict, self.records.values())]}
            write_json(self._path, content)


def read(path: Path) -> tuple[dict, list[Record], str | None]:
    """Return (machine, records, last line of the GPU tests) of a result file."""
    content = json.loads(path.read_text())
    records = [Record(**values) for values in content.get("records", ())]
    return content["machine"], records, content.get("tests")


def write_json(path: Path, content: object) -> None:
    """Write atomically: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


@dataclass
class DeviceResults:
    """All results of one device."""

    machine: dict  # of the first of its files
    records: list[Record] = field(default_factory=list)
    tests: str | None = None  # last line of the GPU tests

    @property
    def base(self) -> Shape:
        return PLANS[self.machine["kind"]].base

    def find(self, task: str, phase: str, peer: str, shape: Shape | None = None) -> Record | None:
        key = (task, phase, shape or self.base, peer)
        return next((record for record in self.records if record.key == key), None)


def load(directory: Path = DIRECTORY) -> list[DeviceResults]:
    """Read the result files of a directory, joined by device."""
    devices: dict[str, DeviceResults] = {}
    for path in sorted(directory.glob("*.json")):
        machine, records, tests = read(path)
        results = devices.setdefault(machine["device"], DeviceResults(machine))
        if not same_run(results.machine, machine):
            raise ValueError(f"{path.name} is of other code or versions than the files beside it")
        results.machine["roofs"] |= machine["roofs"]
        results.records += records
        results.tests = tests or results.tests
    return list(devices.values())


def describe_machine(device: torch.device) -> dict:
    """Return what a figure depends on beside the code."""
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "kind": device.type,
        "device": device_name(device),
        "driver": command_output(*driver) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def same_run(machine: dict, other: dict) -> bool:
    """Return whether figures of two descriptions may stand in one table."""
    return all(machine[name] == other[name] for name in ("device", "versions", "commit"))


def slug(device: str) -> str:
    """Return a device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().split("\n") if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Return the commit of the checkout, with a + if Python files differ from it.

    A copy without history takes it from GRPO_KERNELS_COMMIT.
    """
    if given := os.environ.get("GRPO_KERNELS_COMMIT"):
        return given
    head = command_output("git", "rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    return head + ("+" if command_output("git", "status", "--porcelain", "--", "*.py") else "")


def command_output(*command: str) -> str:
    """Return what a command prints, or "" if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
