"""Short runs of the training script, and what two equal runs have in common."""

import json
from pathlib import Path

from reference import train

CLOCKS = {"step_time", "rollout_time", "tokens_per_second", "memory_gib", "sampling/wait_time"}


def tiny(directory: Path, *flags: str) -> int:
    """Train shortly in this directory; return the exit code."""
    start = ["--preset", "tiny", "--output-dir", str(directory), "--loss-impl", "reference"]
    sizes = ["--prompts", "8", "--eval-questions", "16"]
    return train.main([*start, "--no-tensorboard", *sizes, *flags])


def write_parity_reward(directory: Path) -> str:
    """Write a reward that random weights earn now and then; return the value of its flag."""
    source = directory / "parity.py"
    source.write_text(
        "def even(completions, **_):\n"
        "    return [float(text[:1] in ('0', '2', '4', '6', '8')) for text in completions]\n"
    )
    return f"{source}:even"


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
