"""Logs of a run: metrics for programs, sampled completions for people.

In metrics.jsonl an evaluation is a line of its own with names eval/... A line, or the completions
of a step, is one write, so a reader never sees half of it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from types import ModuleType

import numpy as np

from reference.training.errors import UserError, import_package, one_line
from reference.training.run.run_directory import report_write_errors, save_json

# A long completion is cut in the middle: answers stand at its end.
SHOWN_START, SHOWN_END = 900, 300


class RunLog:
    """Writes the log files into the directory of the run.

    Without the package tensorboard one printed line says what to install, and the run goes on.

    Attributes:
        unwritten: text by file name that could not be written.

    Args:
        after: the step after which a resumed run starts; TensorBoard hides older rows of later
            steps.
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
        self.directory, self.wandb_run, self.writer = directory, None, None
        self.unwritten: dict[str, str] = {}
        if wandb:
            package = load_wandb()
            try:
                self.wandb_run = package.init(
                    project="grpo_kernels", name=directory.name, dir=str(directory), config=settings
                )
            except package.Error as error:
                hint = "WANDB_MODE=offline needs no account"
                raise UserError(f"--wandb: {one_line(error)} ({hint})") from None
        if tensorboard:
            # TensorBoard imports TensorFlow for its file functions if it can: seconds, and a second
            # CUDA context. A module of this name is its own switch against that.
            switch = "tensorboard.compat.notf"
            sys.modules.setdefault(switch, ModuleType(switch))
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                print("no TensorBoard files without the package: pip install tensorboard")
            else:
                purge = None if after is None else after + 1
                self.writer = SummaryWriter(str(directory), flush_secs=10, purge_step=purge)
        save_json(directory / "settings.json", settings)

    def step(self, row: Mapping[str, float | None], examples: Sequence[Mapping] = ()) -> None:
        """Log the metrics of the training step row["step"], and some of its completions.

        JSON has null for NaN and infinity. The completions of one question stand side by side. Each
        example has `question`, `answer`, `completion`, `rewards` by name and `advantage`; an answer
        or a reward may be None.
        """
        numbers = {
            name: value if isinstance(value, int) else float(value)
            for name, value in row.items()
            if value is not None and math.isfinite(value)
        }
        line = json.dumps(dict.fromkeys(row) | numbers, allow_nan=False)
        step = numbers.pop("step")
        texts = {"metrics.jsonl": line + "\n"}
        if examples:
            texts["completions.txt"] = describe_completions(int(step), examples)
        # A checkpoint of this step has to know all of its text, even if the first file fails.
        for name, text in texts.items():
            self.unwritten[name] = self.unwritten.get(name, "") + text
        for name in list(self.unwritten):
            _append(self.directory / name, self.unwritten[name])
            del self.unwritten[name]
        if self.writer is not None:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)
        if self.wandb_run is not None:
            self.wandb_run.log(numbers, step=step)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics of the held-out questions after `step` training steps."""
        named = {f"eval/{name}": value for name, value in metrics.items() if name != "step"}
        self.step({"step": step, **named})

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


def load_wandb() -> ModuleType:
    """Import wandb; called before a model is loaded, it fails early."""
    return import_package("wandb", "--wandb needs the package wandb: pip install wandb")


def read_metrics(directory: Path) -> tuple[list[dict], list[dict]]:
    """Read metrics.jsonl: the rows of the steps, and those of the evaluations; null is NaN."""
    path = directory / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    steps, evaluations = [], []
    for row in map(json.loads, lines):
        named = {
            name.removeprefix("eval/"): math.nan if value is None else value
            for name, value in row.items()
        }
        (steps if named.keys() == row.keys() else evaluations).append(named)
    return steps, evaluations


def describe_completions(step: int, examples: Sequence[Mapping]) -> str:
    """Format a heading, and under each question its answer and the completions."""
    heading = f"step {step}"
    lines = [heading, "=" * len(heading), ""]
    for (question, answer), group in groupby(examples, lambda x: (x["question"], x["answer"])):
        lines += _labelled("question: ", question)
        lines += [*([] if answer is None else _labelled("answer:   ", answer)), ""]
        for number, example in enumerate(group, 1):
            rewards = ", ".join(
                f"{name} {'none' if value is None else f'{value:g}'}"
                for name, value in example["rewards"].items()
            )
            lines.append(f"  {number}. advantage {example['advantage']:+.2f}, rewards: {rewards}")
            lines += [*_labelled("     | ", example["completion"], "     | "), ""]
    return "\n".join(lines) + "\n"


def _labelled(label: str, text: str, indent: str = " " * 10) -> list[str]:
    """Put a label before the first line of a text, and an indent before the others.

    A long text is cut in the middle; characters that move the cursor of a terminal are escaped.
    """
    left_out = len(text) - SHOWN_START - SHOWN_END
    if left_out > 0:
        text = f"{text[:SHOWN_START]} [... {left_out:,} characters ...] {text[-SHOWN_END:]}"
    text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
    first, *others = text.split("\n")
    return [(label + first).rstrip(), *((indent + line).rstrip() for line in others)]


def _append(path: Path, text: str) -> None:
    """Append a text completely or not at all."""
    data = text.encode("utf-8", errors="backslashreplace")
    size = path.stat().st_size if path.exists() else 0
    with report_write_errors(path), path.open("ab", buffering=0) as file:
        if file.write(data) < len(data):
            with suppress(OSError):
                os.truncate(path, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def summary_table(
    before: Mapping, after: Mapping, history: Sequence[Mapping], of_reward_max: str = ""
) -> str:
    """Summarise a run, from its first and last evaluation and its steps, in aligned lines."""

    def accuracy(metrics: Mapping, name: str) -> str:
        low, high = wilson(metrics[name], metrics.get("completions", metrics["questions"]))
        return f"{metrics[name]:.1%} ({low:.0%} to {high:.0%})"

    heading = f"held-out, {after['questions']:,} questions"
    if "completions" in after:
        heading = f"{after['completions']:,} sampled completions"
    rows = [(heading + " (95% interval)" * ("strict" in after), "before", "after")]
    if "reward" in after:
        first, last = (format_number(metrics["reward"]) for metrics in (before, after))
        rows.append((f"  mean reward{of_reward_max}", first, last))
    if "strict" in after:
        names = {"accuracy, strict": "strict", "accuracy, lenient": "lenient"}
        if all(metrics["strict"] == metrics["lenient"] for metrics in (before, after)):
            names = {"accuracy": "strict"}
        for label, name in names.items():
            rows.append((f"  {label}", accuracy(before, name), accuracy(after, name)))
    for name in (name for name in after if name.startswith("pass@") and name in before):
        rows.append((f"  {name}", f"{before[name]:.1%}", f"{after[name]:.1%}"))

    rows.append((f"sampled, {len(history):,} steps", "first tenth", "last tenth"))
    for label, name in (
        ("reward", "reward"),
        ("divergence (nats per token)", "divergence"),
        ("entropy (nats per token)", "entropy"),
        ("completion length (tokens)", "completions/mean_length"),
    ):
        _, values = finite_values(history, name)
        if len(values):
            first, last = map(format_number, tenths(values))
            rows.append((f"  {label}", first, last))

    tokens, seconds = (finite_values(history, name)[1] for name in ("num_tokens", "step_time"))
    seen = f"{format_number(tokens[-1])} tokens" if len(tokens) else ""
    rows.append(("in all", str(timedelta(seconds=round(seconds.sum()))), seen))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(
        f"{label:<{widths[0]}}   {left:<{widths[1]}}   {right}".rstrip()
        for label, left, right in rows
    )


def wilson(share: float, count: int) -> tuple[float, float]:
    """Compute the 95% interval of a share of `count` trials (Wilson, 1927).

    With z = 1.96 the bounds solve (p - share)² = z²·p·(1 - p) / count.
    """
    z2 = 1.959964**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * share * (1 - share) + z2**2 / 4) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def finite_values(rows: Sequence[Mapping], *names: str) -> np.ndarray:
    """Collect the rows in which all these metrics are finite: their steps, then each metric."""
    table = np.array([[row.get(name) for name in ("step", *names)] for row in rows], dtype=float)
    table = table.reshape(-1, 1 + len(names))
    return table[np.isfinite(table).all(axis=1)].T


def tenths(values: np.ndarray) -> tuple[float, float]:
    """Average the first tenth of the values, and the last; at least one value each."""
    width = max(1, len(values) // 10)
    return float(values[:width].mean()), float(values[-width:].mean())


def format_number(value: float) -> str:
    """Format three significant digits, and whole numbers from 1,000 on."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"
