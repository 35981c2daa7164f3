"""Short runs of the training script, and what two equal runs have in common."""

import json
from pathlib import Path

from reference import train

CLOCKS = {"step_time", "rollout_time", "tokens_per_second", "memory_gib"}


def tiny(directory: Path, *flags: str) -> int:
    """Train shortly in this directory; return the exit code."""
    start = ["--preset", "tiny", "--output-dir", str(directory), "--loss-impl", "reference"]
    return train.main([*start, "--no-tensorboard", "--eval-questions", "16", *flags])


def left_by(directory: Path) -> dict:
    """Read the files of a run, without times."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in lines]
    summary = json.loads((directory / "summary.json").read_text())
    return {
        "metrics": rows,
        "completions": (directory / "completions.txt").read_bytes(),
        "model": (directory / "model" / "model.safetensors").read_bytes(),
        "summary": {name: value for name, value in summary.items() if name != "seconds"},
    }
