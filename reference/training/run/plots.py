"""The curves of a run as one PNG, drawn anew while it goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from reference.training.errors import UserError
from reference.training.run.run_directory import report_write_errors
from reference.training.run.run_log import duration, finite, percent, short, tenths

# 1500 pixels wide; shown 900 wide, as in a README, the letters are still 10 pixels high.
SIZE, DPI = (10, 9.4), 150
# Fixed, so that nothing moves from one drawing to the next.
MARGINS = {"left": 0.05, "right": 0.985, "top": 0.875, "bottom": 0.045}
MARGINS |= {"wspace": 0.19, "hspace": 0.45}

# Blue and vermilion of Okabe and Ito differ for every kind of colour vision, and in grey.
COLOURS = ("#0072b2", "#d55e00", "#767676")
INK, SOFT, PALE = "#262626", "#5c5c5c", "#b5b5b5"
MARKS = {"linestyle": "none", "markersize": 6.5, "markeredgecolor": "white", "clip_on": False}
STYLE = {
    "text.parse_math": False,  # a $ in a title is a $
    "text.color": INK,
    "font.size": 8.5,
    "axes.edgecolor": PALE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e8e8e8",
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Panel:
    """Up to three curves over the steps; more metrics are a line in PANELS.

    `curves` gives each metric its name in the legend. What evaluations call by that name is marked.
    """

    title: str
    unit: str
    curves: dict[str, str]
    scale: Literal["from zero", "share", "small share", "log"] = "from zero"
    spread: str = ""  # the metric that is half the width of a band around the first curve
    told: str = ""  # a metric whose last value is written, not drawn
    empty: str = "not recorded"


ACCURACY = {"accuracy/strict": "strict", "accuracy/lenient": "lenient"}
CLIPPED = {"clip_ratio/low_mean": "low", "clip_ratio/high_mean": "high"}
CLIPPED |= {"clip_ratio/region_mean": "both"}
LOST = {"frac_reward_zero_std": "no signal", "completions/clipped_ratio": "cut off"}
MISMATCH = {f"sampling/sampling_logp_difference/{name}": name for name in ("mean", "max")}
PANELS = (
    Panel("reward", "band: ± std in a group", {"reward": ""}, spread="reward_std"),
    Panel("accuracy", "lines: sampled, marks: held-out", ACCURACY, "share"),
    Panel("completion length", "tokens", {"completions/mean_length": ""}),
    Panel("entropy", "nats per token", {"entropy": ""}, told="entropy_coef"),
    Panel("KL to the reference", "nats per token", {"kl": ""}, empty="no KL: beta 0"),
    Panel("clipped ratios", "share of tokens", CLIPPED, "small share"),
    Panel("no signal / cut off", "of groups / completions", LOST, "share"),
    Panel("gradient norm", "", {"grad_norm": ""}, told="learning_rate"),
    Panel("trainer - sampler", "|Δ log-prob| per token", MISMATCH, "log"),
    Panel("speed", "sampled tokens per second", {"tokens_per_second": ""}),
    Panel("time", "seconds per step", {"step_time": ""}),
    Panel("memory", "GiB", {"memory_gib": ""}),
)


def load_matplotlib() -> None:
    """Raise a UserError where it is not installed: early, if called before a model is loaded."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError('the curves need matplotlib: pip install "grpo_kernels[train]"') from None


def plot_dashboard(
    path: Path, history: Sequence[Mapping], evaluations: Sequence[Mapping], title: str
) -> None:
    """Draw every metric of a run over its steps, each with its running mean.

    Args:
        path: of the PNG, which is written beside its place and renamed.
        history: a row of metrics per step; missing and NaN values are left out.
        evaluations: {"step": 0, "strict": 0.1, "lenient": 0.25} per look at held-out questions.
        title: model and task; steps, tokens, time and held-out accuracies are added below it.

    Raises:
        UserError: matplotlib is not installed, or the disk is full.
    """
    load_matplotlib()
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with style.context(["default", STYLE]):
        figure = Figure(SIZE, DPI)
        axes = figure.subplots(4, 3, sharex=True, gridspec_kw=MARGINS)
        figure.text(MARGINS["left"], 0.966, title, size=14, weight="bold")
        subtitle = _subtitle(history, evaluations)
        figure.text(MARGINS["left"], 0.942, subtitle, size=10, color=SOFT)
        for axis, panel in zip(axes.flat, PANELS, strict=True):
            _draw(axis, panel, history, evaluations)
        for axis in axes[-1]:
            axis.set_xlabel("step", color=SOFT, labelpad=2)
        last = max((row["step"] for row in (*history, *evaluations)), default=0)
        axes[0, 0].set_xlim(0, max(1, last))
        axes[0, 0].xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
        partial = path.with_name("partial-" + path.name)
        with report_write_errors(path):
            figure.savefig(partial)
            partial.rename(path)


def _subtitle(history: Sequence[Mapping], evaluations: Sequence[Mapping]) -> str:
    parts = [f"{len(history):,} step{'s' * (len(history) != 1)}"]
    tokens, seconds = finite(history, "num_tokens")[1], finite(history, "step_time")[1]
    if len(tokens):
        parts.append(f"{short(tokens[-1])} tokens")
    if len(seconds):
        parts.append(duration(seconds.sum()))
    marks = {name: finite(evaluations, name)[1] for name in ("strict", "lenient")}
    told = {x: _change(y[:: max(1, len(y) - 1)], percent) for x, y in marks.items() if len(y)}
    if len(set(told.values())) == 1:
        parts.append(f"held-out accuracy {told.popitem()[1]}")
    elif told:
        named = ", ".join(f"{change} {name}" for name, change in told.items())
        parts.append(f"held-out accuracy {named}")
    return "   ·   ".join(parts)


def _draw(axis, panel: Panel, history: Sequence[Mapping], evaluations: Sequence[Mapping]) -> None:
    form = percent if "share" in panel.scale else short
    curves = [
        (name, *finite(history, key), *finite(evaluations, name))
        for key, name in panel.curves.items()
    ]
    if curves[0][0] == "strict" and all(map(np.array_equal, curves[0][1:], curves[1][1:])):
        curves = [("", *curves[0][1:])]  # a task without a format
    legend, drawn = [], []
    for rank, (name, steps, values, mark_steps, marks) in enumerate(curves):
        look = {"color": COLOURS[rank], "zorder": 3 - rank / 10}  # the first lies on top
        axis.plot(mark_steps, marks, "os"[rank % 2], **look, **MARKS)
        told = marks[:: max(1, len(marks) - 1)] if len(marks) else values
        if len(told):
            change = form(tenths(told)[1]) if len(curves) > 2 else _change(told, form)
            words = ["●■"[rank % 2]] * (len(marks) > 0) + [name] * (name != "") + [change]
            legend.append((" ".join(words), COLOURS[rank]))
        if panel.scale == "log":  # which has no place for 0
            steps, values = steps[values > 0], values[values > 0]
        _lines(axis, steps, values, look)
        drawn += [values, marks]
    if panel.spread:
        drawn.append(_band(axis, *curves[0][1:3], *finite(history, panel.spread)))
    for value in finite(history, panel.told)[1][-1:]:
        legend.append((f"{panel.told.replace('_', ' ')} {short(value)}", SOFT))
    _heading(axis, panel, legend)
    _scale(axis, panel, np.concatenate(drawn), form)


def _lines(axis, steps: np.ndarray, values: np.ndarray, look: dict) -> None:
    """The values, faint, and their running mean; a value without neighbours is a dot."""
    steps, values, trend = _broken(steps, values, running_mean(steps, values))
    known = np.pad(np.isfinite(values), 1)
    alone = np.flatnonzero(known[1:-1] & ~known[:-2] & ~known[2:]).tolist()
    axis.plot(steps, values, color=look["color"], alpha=0.27, linewidth=0.9, zorder=2)
    axis.plot(steps, trend, "o-", markevery=alone, ms=3.5, linewidth=1.8, clip_on=False, **look)


def _band(axis, steps, values, spread_steps, spread) -> np.ndarray:
    """Fill the spread around the running mean; returns the upper edge."""
    steps, left, right = np.intersect1d(steps, spread_steps, return_indices=True)
    middle, half = (running_mean(steps, each) for each in (values[left], spread[right]))
    axis.fill_between(
        *_broken(steps, middle - half, middle + half), color=COLOURS[0], alpha=0.13, linewidth=0
    )
    return middle + half


def running_mean(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Each value averaged with those before it, over a tenth of the run, afresh after a gap."""
    width = max(1, len(values) // 10)
    means = [
        np.convolve(piece, np.ones(width))[: len(piece)]
        / np.minimum(np.arange(1, len(piece) + 1), width)
        for piece in np.split(values, _gaps(steps))
        if len(piece)
    ]
    return np.concatenate([values[:0], *means])


def _gaps(steps: np.ndarray) -> np.ndarray:
    """Where steps are missing, more than the running mean's window."""
    return np.flatnonzero(np.diff(steps) > max(3, len(steps) // 10)) + 1


def _broken(steps: np.ndarray, *series: np.ndarray) -> tuple[np.ndarray, ...]:
    """With a NaN in every gap, so that no line crosses it."""
    return tuple(np.insert(each, _gaps(steps), np.nan) for each in (steps, *series))


def _heading(axis, panel: Panel, legend: Sequence[tuple[str, str]]) -> None:
    """What is shown, and under it the legend: names and numbers in the colours of the curves."""
    title = [(panel.title, {"weight": "bold"}), (panel.unit, {"color": SOFT})]
    for line, height in ((title, 17), ([(text, {"color": x}) for text, x in legend], 4)):
        place = {"xy": (0, 1), "xycoords": "axes fraction", "xytext": (0, height)}
        for text, look in line:
            placed = axis.annotate(text, textcoords="offset points", va="bottom", **place, **look)
            place = {"xy": (1, 0), "xycoords": placed, "xytext": (7, 0)}


def _scale(axis, panel: Panel, values: np.ndarray, form: Callable[[float], str]) -> None:
    """The limits and ticks of the vertical axis, which has 0 unless it is logarithmic."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    low, high = values.min(initial=0), values.max(initial=0)
    if not len(values):
        axis.set_yticks([])
        axis.grid(False)
        axis.spines["left"].set_visible(False)
        axis.text(0.5, 0.5, panel.empty, color=SOFT, ha="center", transform=axis.transAxes)
    elif panel.scale == "log":
        first = math.floor(np.log10(values.min()))
        last = max(first + 1, math.ceil(np.log10(high)))
        axis.set_yscale("log")
        axis.set_ylim(10.0**first, 10.0**last)
        axis.set_yticks(10.0 ** np.arange(first, last + 1, math.ceil((last - first) / 4)))
        axis.yaxis.set_minor_locator(NullLocator())
    elif panel.scale == "from zero":
        margin = 0.07 * (high - low)
        axis.set_ylim(low - margin * (low < 0), high + margin * (high > 0) if margin else 1)
        axis.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    else:
        tops = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if panel.scale == "small share" else ()
        top = next((each for each in tops if high <= each), 1)
        axis.set_ylim(0, top)
        axis.set_yticks(np.linspace(0, top, 5 if top == 1 else 3))
    axis.yaxis.set_major_formatter(lambda value, _: form(value))


def _change(values: np.ndarray, form: Callable[[float], str]) -> str:
    """From the mean of the first tenth to that of the last."""
    first, last = map(form, tenths(values))
    return first if len(values) == 1 else f"{first} → {last}"
