"""What a run leaves behind while it goes on: numbers for programs, completions for people.

    settings.json      the settings
    metrics.jsonl      a line per step; an evaluation is a line of its own with names eval/...
    completions.txt    sampled completions with their rewards and advantages
    events.out.*       the numbers again for TensorBoard, and where asked for to Weights & Biases

A line or a step's completions go out in one write, so that a reader never sees half of it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import ModuleType

import numpy as np

from reference.training.errors import UserError
from reference.training.run.run_directory import report_write_errors, save_json

# A long completion keeps its start and, because answers stand there, its end.
KEPT_START, KEPT_END = 900, 300


class RunLog:
    """Writes all of it into the directory of the run.

    Without the package tensorboard one printed line says what to install, and the run goes on.

    Args:
        after: the step from which a resumed run goes on; TensorBoard hides later ones of before.

    Raises:
        UserError: `wandb` is asked for and not installed, or does not start; or a file cannot be
            written, which every method may find.
    """

    def __init__(
        self,
        directory: Path,
        settings: dict,
        *,
        tensorboard: bool = True,
        wandb: bool = False,
        after: int | None = None,
    ) -> None:
        settings = json.loads(json.dumps(settings, default=str))  # paths become strings
        self.directory = directory
        self.wandb_run = start_wandb(directory, settings) if wandb else None
        self.writer = tensorboard_writer(directory, after) if tensorboard else None
        save_json(directory / "settings.json", settings)

    def step(self, row: Mapping[str, float]) -> None:
        """The metrics of the training step row["step"]."""
        row = {name: _number(value) for name, value in row.items()}
        _append(self.directory / "metrics.jsonl", json.dumps(row, allow_nan=False) + "\n")
        step = row.pop("step")
        known = {name: value for name, value in row.items() if value is not None}
        if self.writer is not None:
            for name, value in known.items():
                self.writer.add_scalar(name, value, step)
        if self.wandb_run is not None:
            self.wandb_run.log(known, step=step)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of the held-out questions after `step` training steps."""
        named = {f"eval/{name}": value for name, value in metrics.items() if name != "step"}
        self.step({"step": step, **named})

    def completions(self, step: int, samples: Sequence[Mapping]) -> None:
        """Samples of a step, those of a question side by side.

        Each has `question`, `answer`, `completion`, `rewards` by name and `advantage`.
        """
        _append(self.directory / "completions.txt", describe_completions(step, samples))

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


def load_wandb() -> ModuleType:
    """The package, or a UserError: called before a model is loaded, it fails early."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the package wandb: pip install wandb") from None
    return wandb


def start_wandb(directory: Path, settings: dict):
    wandb = load_wandb()
    try:
        return wandb.init(
            project="grpo_kernels", name=directory.name, dir=str(directory), config=settings
        )
    except wandb.Error as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"--wandb: {reason} (WANDB_MODE=offline needs no account)") from None


def tensorboard_writer(directory: Path, after: int | None = None):
    """The writer of event files, or None where the package is missing."""
    # TensorBoard imports TensorFlow for its file functions if it can: seconds, and a second CUDA
    # context. A module of this name is its own switch against that.
    switch = "tensorboard.compat.notf"
    sys.modules.setdefault(switch, ModuleType(switch))
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("no TensorBoard files without the package: pip install tensorboard")
        return None
    purged = None if after is None else after + 1
    return SummaryWriter(str(directory), flush_secs=10, purge_step=purged)


def read_metrics(directory: Path) -> tuple[list[dict], list[dict]]:
    """The rows of the steps of metrics.jsonl, and those of the evaluations, as they were logged."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps, evaluations = [], []
    for row in map(json.loads, lines):
        named = {name.removeprefix("eval/"): value for name, value in row.items()}
        (steps if named.keys() == row.keys() else evaluations).append(named)
    return steps, evaluations


def describe_completions(step: int, samples: Sequence[Mapping]) -> str:
    """A heading, and under each question its right answer and the completions."""
    heading = f"step {step}"
    lines = [heading, "=" * len(heading), ""]
    for (question, answer), group in groupby(samples, lambda s: (s["question"], s["answer"])):
        lines += _labelled("question: ", question) + _labelled("answer:   ", answer) + [""]
        for number, sample in enumerate(group, 1):
            rewards = ", ".join(f"{name} {value:g}" for name, value in sample["rewards"].items())
            lines.append(f"  {number}. advantage {sample['advantage']:+.2f}, rewards: {rewards}")
            lines += [*_labelled("     | ", sample["completion"], "     | "), ""]
    return "\n".join(lines) + "\n"


def _labelled(label: str, text: str, later: str | None = None) -> list[str]:
    """The lines of a text behind a label; later lines are indented to it or begin with `later`."""
    later = " " * len(label) if later is None else later
    first, *rest = _printable(_shortened(text)).split("\n")
    return [(label + first).rstrip(), *((later + line).rstrip() for line in rest)]


def _shortened(text: str) -> str:
    left_out = len(text) - KEPT_START - KEPT_END
    if left_out <= 0:
        return text
    return f"{text[:KEPT_START]} [... {left_out:,} characters ...] {text[-KEPT_END:]}"


def _printable(text: str) -> str:
    """Escapes what would move the cursor or hide in a terminal."""
    return "".join(
        each if each.isprintable() or each == "\n" else ascii(each)[1:-1] for each in text
    )


def _number(value: float) -> float | None:
    """A plain number, or None for NaN, infinity and None, which JSON has no word for."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(value)


def _append(path: Path, text: str) -> None:
    data = text.encode("utf-8", errors="backslashreplace")
    with report_write_errors(path), path.open("ab", buffering=0) as file:
        if file.write(data) < len(data):  # the room that was left
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def summary_table(before: Mapping, after: Mapping, history: Sequence[Mapping]) -> str:
    """How a run went, in a few aligned lines.

    `before` and `after` hold the accuracies `strict` and `lenient` on the held-out questions,
    pass@... where estimated, and where accuracies shall have intervals the number of `questions`.
    """
    asked = f", {after['questions']:,} questions (95% interval)" if "questions" in after else ""
    rows = [(f"held-out{asked}", "before", "after")]
    names = {"accuracy, strict": "strict", "accuracy, lenient": "lenient"}
    if all(each["strict"] == each["lenient"] for each in (before, after)):
        names = {"accuracy": "strict"}
    for label, name in names.items():
        rows.append((f"  {label}", *(_with_interval(each, name) for each in (before, after))))
    for name in (name for name in after if name.startswith("pass@") and name in before):
        rows.append((f"  {name}", percent(before[name]), percent(after[name])))

    rows.append((f"sampled, {len(history):,} steps", "first tenth", "last tenth"))
    for label, name in (
        ("reward", "reward"),
        ("entropy (nats per token)", "entropy"),
        ("completion length (tokens)", "completions/mean_length"),
    ):
        values = finite(history, name)[1]
        if len(values):
            rows.append((f"  {label}", *map(short, tenths(values))))

    tokens, seconds = finite(history, "num_tokens")[1], finite(history, "step_time")[1].sum()
    read = f"{tokens[-1]:,.0f} tokens" if len(tokens) else ""
    rows.append(("in all", duration(seconds), read))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(
        f"{label:<{widths[0]}}   {left:<{widths[1]}}   {right}".rstrip()
        for label, left, right in rows
    )


def _with_interval(metrics: Mapping, name: str) -> str:
    if "questions" not in metrics:
        return f"{metrics[name]:.1%}"
    low, high = wilson(metrics[name], metrics["questions"])
    return f"{metrics[name]:.1%} ({low:.0%} to {high:.0%})"


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share of `count` trials; Wilson, 1927.

    With z = 1.96 the bounds solve (p - share)² = z²·p·(1 - p) / count.
    """
    z2 = 1.959964**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * share * (1 - share) + z2**2 / 4) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def finite(rows: Sequence[Mapping], name: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps and values of the rows that have a finite value under this name."""
    numbers = ((row["step"], _number(row.get(name))) for row in rows)
    known = np.array([pair for pair in numbers if pair[1] is not None], dtype=float)
    return tuple(known.reshape(-1, 2).T)


def tenths(values: np.ndarray) -> tuple[float, float]:
    """The mean of the first tenth of the values, and of the last; at least one value each."""
    width = max(1, len(values) // 10)
    return float(values[:width].mean()), float(values[-width:].mean())


def short(value: float) -> str:
    """Three significant digits, two below 0.01, one below 0.001: 3e-5, 0.0012, 0.123, 12.3k."""
    size = abs(value)
    for bound, divisor, unit in ((999.5e6, 1e9, "G"), (999.5e3, 1e6, "M"), (999.5, 1e3, "k")):
        if bound <= size < 999.5e9:
            return f"{value / divisor:.3g}{unit}"
    if 0 < size < 0.00095:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.3g}" if size >= 0.01 else f"{value:.2g}"


def percent(share: float) -> str:
    """Whole percents, two digits below 10%."""
    return f"{share:.0%}" if abs(share) >= 0.0995 else f"{100 * share:.2g}%"


def duration(seconds: float) -> str:
    """1 h 02 min, 6 min 41 s, 12 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {left:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
