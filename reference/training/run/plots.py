"""The curves of a run as one PNG, drawn again while the run goes on.

python -m reference.training.run.plots runs/NAME picture.png --panels reward accuracy
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from reference.training.errors import import_package
from reference.training.run.run_directory import report_write_errors
from reference.training.run.run_log import finite_values, format_number, read_metrics, tenths

WIDTH, DPI = 10, 150  # inches
ROW_HEIGHT, HEADING_HEIGHT = 2.25, 0.4
# Blue and vermilion of Okabe and Ito differ for every kind of colour vision, and in grey.
COLORS = ("#0072b2", "#d55e00", "#767676")
MARKS = {"markeredgecolor": "white", "clip_on": False, "in_layout": False}
STYLE = {
    "font.size": 8.5,
    "figure.titlesize": 11,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#5c5c5c",
    "axes.edgecolor": "#b5b5b5",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e8e8e8",
    "xtick.color": "#5c5c5c",
    "ytick.color": "#5c5c5c",
    "legend.handlelength": 1,
    "legend.framealpha": 0.6,
    "legend.edgecolor": "none",
}


@dataclass(frozen=True)
class Panel:
    """Up to three curves over the steps; for another metric add a line to PANELS.

    A panel without data is left out.

    Attributes:
        curves: the name of each metric in the legend. Evaluations under the last part of the
            metric's name are drawn as marks.
        spread: the metric that is half the width of a band around the first curve.
        last_value: a metric whose last value is in the legend.
        omit_zeros: leave the panel out if all values are 0.
    """

    title: str
    unit: str
    curves: dict[str, str]
    scale: Literal["from zero", "share", "log"] = "from zero"
    spread: str = ""
    last_value: str = ""
    omit_zeros: bool = False


ACCURACY = {"accuracy/strict": "strict", "accuracy/lenient": "lenient"}
CLIPPED = {"clip_ratio/low_mean": "low", "clip_ratio/high_mean": "high"}
CLIPPED |= {"clip_ratio/region_mean": "both"}
LOST = {"frac_reward_zero_std": "no signal", "completions/clipped_ratio": "cut off"}
MISMATCH = {f"sampling/sampling_logp_difference/{name}": name for name in ("mean", "max")}
PANELS = (
    Panel("reward", "band: ± std", {"reward": ""}, spread="reward_std"),
    Panel("accuracy", "sampled", ACCURACY, "share"),
    Panel("completion length", "tokens", {"completions/mean_length": ""}),
    Panel("divergence from the teacher", "nats per token", {"divergence": ""}),
    Panel("entropy", "nats per token", {"entropy": ""}, last_value="entropy_coef"),
    Panel("KL to the reference", "nats per token", {"kl": ""}, omit_zeros=True),
    Panel("clipped ratios", "share of tokens", CLIPPED, omit_zeros=True),
    Panel("no signal / cut off", "of groups / completions", LOST, "share"),
    Panel("gradient norm", "", {"grad_norm": ""}, last_value="learning_rate"),
    Panel("trainer - sampler", "|Δ log-prob| per token", MISMATCH, "log", omit_zeros=True),
    Panel("speed", "sampled tokens per second", {"tokens_per_second": ""}),
    Panel("time", "seconds per step", {"step_time": ""}),
    Panel("memory", "GiB", {"memory_gib": ""}),
)


def load_matplotlib() -> None:
    """Import matplotlib; called before a model is loaded, it fails early."""
    message = 'the curves need matplotlib: pip install -e ".[train]"'
    import_package("matplotlib", message)


def plot_dashboard(
    path: Path,
    history: Sequence[Mapping],
    evaluations: Sequence[Mapping],
    title: str,
    reward_max: float | None = None,
    panels: Sequence[Panel] = PANELS,
) -> None:
    """Draw the metrics of a run over its steps, each with its running mean.

    Args:
        history: a row of metrics per step; missing and NaN values are left out.
        evaluations: {"step": 0, "strict": 0.1, "lenient": 0.25} per evaluation, or "reward".
        title: model and task; steps, tokens, time and results on held-out questions are added.
        reward_max: the largest reward that the task can give, where the axis then ends.
    """
    load_matplotlib()
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    totals = [f"{len(history):,} steps"]
    tokens, seconds = (finite_values(history, name)[1] for name in ("num_tokens", "step_time"))
    if len(tokens):
        totals.append(f"{format_number(tokens[-1])} tokens")
    if len(seconds):
        totals.append(f"{format_number(seconds.sum() / 60)} min")
    measured = "sampled" if evaluations and "completions" in evaluations[0] else "held-out"
    best = "" if reward_max is None else f" of {format_number(reward_max)}"
    _, rewards = finite_values(evaluations, "reward")
    if len(rewards):
        first, last = map(format_number, (rewards[0], rewards[-1]))
        totals.append(f"{measured} reward {first} → {last}{best}")
    for name in ("strict",) if len(rewards) else ("strict", "lenient"):  # what fits on a line
        _, shares = finite_values(evaluations, name)
        if len(shares):
            totals.append(f"{measured} {name} {shares[0]:.1%} → {shares[-1]:.1%}")
    subtitle = "   ·   ".join(totals)

    panels = [panel for panel in panels if _has_data(panel, history, evaluations)]
    rows = split_into_rows(len(panels))
    with style.context(["default", STYLE]):
        height = HEADING_HEIGHT + ROW_HEIGHT * max(1, len(rows))
        figure = Figure((WIDTH, height), DPI, layout="constrained")
        heading = figure.suptitle(f"{title}\n{subtitle}", x=0.01, ha="left")
        heading.set_parse_math(False)  # a $ in a title is a $
        grid = figure.add_gridspec(max(1, len(rows)), 6)
        places = [(row, place) for row, count in enumerate(rows) for place in range(count)]
        axis = None
        for panel, (row, place) in zip(panels, places, strict=True):
            width = 6 // rows[row]
            columns = slice(place * width, (place + 1) * width)
            axis = figure.add_subplot(grid[row, columns], sharex=axis)
            _draw(axis, panel, history, evaluations)
            if panel.title == "reward" and reward_max is not None:
                axis.set_title(f"reward{best}")
                axis.set_ylim(top=1.05 * reward_max)
            if row == len(rows) - 1:
                axis.set_xlabel("step")
            elif rows[row] == rows[row + 1]:  # the panel below has the same numbers
                axis.tick_params(labelbottom=False)
        if axis is not None:
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
            if not history:
                axis.set_xlim(-0.5, 0.5)
        partial = path.with_name("partial-" + path.name)
        with report_write_errors(path):
            figure.savefig(partial)
            partial.rename(path)


def split_into_rows(panels: int) -> list[int]:
    """Return the number of panels in each row: two or three, and the first rows have the two."""
    rows = -(-panels // 3)
    return [(panels + row) // rows for row in range(rows)]


def _has_data(panel: Panel, history: Sequence[Mapping], evaluations: Sequence[Mapping]) -> bool:
    pairs = [pair for metric in panel.curves for pair in _values(metric, history, evaluations)]
    values = np.concatenate([values for _, values in pairs])
    return bool(values.any()) if panel.omit_zeros else len(values) > 0


def _values(metric: str, history: Sequence[Mapping], evaluations: Sequence[Mapping]):
    """Return (steps, values) of a metric, and those of the evaluations of that name."""
    evaluated = metric.rpartition("/")[2]
    return finite_values(history, metric), finite_values(evaluations, evaluated)


def _draw(axis, panel: Panel, history: Sequence[Mapping], evaluations: Sequence[Mapping]) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_title(panel.title)
    form = "{:.1%}".format if panel.scale == "share" else format_number
    drawn = [np.empty(0)]
    for (metric, name), color in zip(panel.curves.items(), COLORS, strict=False):
        (steps, values), (mark_steps, marks) = _values(metric, history, evaluations)
        drawn += [values, marks]
        axis.plot(mark_steps, marks, "o", color=color, **MARKS)
        if not len(values):
            continue
        mean = running_mean(values)
        change = " → ".join(form(mean) for mean in tenths(values))
        if panel.scale == "log":
            values, mean = (np.where(x > 0, x, np.nan) for x in (values, mean))
        axis.plot(steps, values, color=color, alpha=0.27, linewidth=0.9)
        dot = "o" if len(values) == 1 else ""
        axis.plot(steps, mean, dot + "-", color=color, linewidth=1.8, label=f"{name} {change}")
    if panel.spread:
        steps, values, spread = finite_values(history, *panel.curves, panel.spread)
        mean, half = running_mean(values), running_mean(spread)
        axis.fill_between(steps, mean - half, mean + half, color=COLORS[0], alpha=0.13, linewidth=0)
    for value in finite_values(history, panel.last_value)[1][-1:]:
        label = f"{panel.last_value.replace('_', ' ')} {format_number(value)}"
        axis.plot([], [], " ", label=label)
    is_marked = any(len(marks) for marks in drawn[2::2])
    axis.set_ylabel(panel.unit + "; dots: held-out" * is_marked)
    drawn = np.concatenate(drawn)
    if axis.get_legend_handles_labels()[0]:
        axis.legend().set_in_layout(False)
    if panel.scale == "log":
        axis.set_yscale("log")
    elif panel.scale == "share":
        axis.set_ylim(0, 1)
        axis.yaxis.set_major_formatter(PercentFormatter(1))
    else:
        axis.update_datalim([(0, 0)])  # the axis includes 0
        axis.autoscale_view()
        if drawn.min() >= 0:
            axis.set_ylim(bottom=0)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Average each value with those before it, over a tenth of the run."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - max(1, len(values) // 10))
    return (sums[ends] - sums[starts]) / (ends - starts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw some panels of a run that is over, or still going on."""
    titles = [panel.title for panel in PANELS]
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("run", type=Path, help="its directory")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parser.add_argument("--panels", nargs="+", choices=titles, default=titles, metavar="TITLE")
    chosen = parser.parse_args(arguments)
    settings = json.loads((chosen.run / "settings.json").read_text(encoding="utf-8"))
    history, evaluations = read_metrics(chosen.run)
    title = f"{Path(settings['model']).name} on {settings['task']}"
    panels = [panel for panel in PANELS if panel.title in chosen.panels]
    plot_dashboard(chosen.picture, history, evaluations, title, panels=panels)


if __name__ == "__main__":
    main()
