"""A result file: the machine, the versions, the roofs, and one record per case."""

import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
DIRECTORY = Path(__file__).parents[1] / "results"
PACKAGES = ("torch", "triton", "transformers", "trl", "liger_kernel", "cut_cross_entropy")
PACKAGES += ("quack-kernels", "numpy")


@dataclass
class Record:
    """One case; what was not measured is None.

    status: "ok", "failed" (it raised), "refused" (by the gate) or "out of memory".
    """

    task: str
    phase: str
    model: str
    N: int
    dtype: str
    masked: float
    inert: float
    peer: str
    status: str = "ok"
    reason: str | None = None
    seconds: float | None = None  # the median of the rounds
    lower_quartile: float | None = None
    upper_quartile: float | None = None
    rounds: int | None = None
    bytes: int | None = None  # the fewest that the answer moves
    flops: int | None = None  # of the products that the answer needs
    percent_of_roof: float | None = None  # of the copy's bandwidth, or of the product's rate
    extra_bytes: int | None = None  # peak, beside the inputs
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple:
        shape = self.model, self.N, self.dtype, self.masked, self.inert
        return self.task, self.phase, *shape, self.peer


class ResultFile:
    """Written after every record, so that a run that is cut off loses nothing and goes on later.

    path: None keeps the records in memory only. Records of the same commit and device that a file
    has already are not measured again.
    """

    def __init__(self, path: Path | None, device: torch.device, roofs: dict[str, float]) -> None:
        self._path = path
        self.machine = machine(device) | {"roofs": roofs}
        self.records: dict[tuple, Record] = {}
        if path is not None and path.exists():
            machine_then, records, _ = read(path)
            if same_run(machine_then, self.machine):
                self.records = {each.key: each for each in records}

    def add(self, record: Record) -> None:
        self.records[record.key] = record
        if self._path is not None:
            content = {"machine": self.machine, "records": [*map(asdict, self.records.values())]}
            write_json(self._path, content)


def read(path: Path) -> tuple[dict, list[Record], str | None]:
    """(machine, records, closing line of the device's tests) of a result file."""
    content = json.loads(path.read_text())
    records = [Record(**each) for each in content.get("records", ())]
    return content["machine"], records, content.get("tests")


def write_json(path: Path, content: object) -> None:
    """In one step: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)


def machine(device: torch.device) -> dict:
    """What a figure depends on, beside the code."""
    return {
        "kind": device.type,
        "device": _device_name(device),
        "driver": _driver() if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def slug(device: str) -> str:
    """A device's name as a part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def same_run(one: dict, other: dict) -> bool:
    """Whether figures of two machines' descriptions may stand side by side."""
    return all(one[name] == other[name] for name in ("device", "versions", "commit"))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """Of the checkout, with a + where files of the code differ from it; the environment may name
    it, where a copy has no history."""
    if given := os.environ.get("GRPO_KERNELS_COMMIT"):
        return given
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    return head + ("+" if _output("git", "status", "--porcelain", "--", "*.py") else "")


def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in _cpu_lines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().split("\n") if path.exists() else []


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
