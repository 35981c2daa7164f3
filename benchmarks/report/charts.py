"""The chart of a level: time and memory against N, percentage of the roof, accuracy against time.

Each chart is drawn for a light page and for a dark one. A file names the digest of its data.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.core.results import Record
from benchmarks.core.roofline import FLOORS
from benchmarks.core.shapes import Shape
from benchmarks.core.tasks import PHASES, TASKS
from benchmarks.peers import OURS, PEERS

HEADLINE = {"logits": "grpo_loss", "hidden": "linear_grpo_loss"}
THEMES = {"light": "#1f2328", "dark": "#e6edf3"}  # colour of text; the background is transparent
# One per peer: those of Okabe and Ito without the yellow, and more that most eyes can tell apart on
# white and on black.
COLOURS = ("#0072b2", "#56b4e9", "#8c8c8c", "#cc79a7", "#e69f00", "#009e73", "#d55e00")
COLOURS += ("#b08d57", "#7f63d2", "#4d7a2a")
MARKERS = "osXDv^P*h<"
FLOOR_COLOUR = "#8c8c8c"
PHASE_SHADES = {"forward": 0.4, "backward": 0.7, "both": 1.0}


@dataclass(frozen=True)
class ChartData:
    """The numbers that a chart shows."""

    level: str
    base: Shape
    against_n: dict[str, list[tuple[int, float, float]]]  # by peer: N, seconds, MiB
    of_roof: dict[str, dict[str, float]]  # ours, by task and phase
    accuracy: dict[str, tuple[float, float]]  # by peer: seconds, error of the gradient

    @property
    def digest(self) -> str:
        content = [str(self.base), self.against_n, self.of_roof, self.accuracy]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


class Chart(NamedTuple):
    data: ChartData
    theme: str
    title: str


def chart_data(records: list[Record], level: str, base: Shape) -> ChartData:
    """Select the numbers from the records of one machine."""
    along_n = [
        record
        for record in records
        if record.status == "ok"
        and record.seconds is not None
        and replace(record.shape, N=base.N) == base
    ]
    headline = [
        record for record in along_n if (record.task, record.phase) == (HEADLINE[level], "both")
    ]
    against_n: dict[str, list] = {}
    accuracy = {}
    for record in sorted(headline, key=lambda record: record.N):
        mebibytes = (record.extra_bytes or 0) / 2**20
        against_n.setdefault(record.peer, []).append((record.N, record.seconds, mebibytes))
    for record in headline:
        if record.N == base.N and record.errors:
            errors = [error for name, error in record.errors.items() if name.startswith("d_")]
            accuracy[record.peer] = record.seconds, max(errors)
    of_roof: dict[str, dict[str, float]] = {}
    for record in along_n:
        if record.peer == OURS and record.N == base.N:
            if record.task in TASKS and TASKS[record.task].level == level:
                of_roof.setdefault(record.task, {})[record.phase] = record.percent_of_roof
    return ChartData(level, base, against_n, of_roof, accuracy)


def draw(chart: Chart, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    data, theme, title = chart
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings = dict.fromkeys(names, THEMES[theme]) | {
        "font.size": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": "grpo_kernels",
    }
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(2, 2, figsize=(9.5, 7.5), layout="constrained")
        (time, memory), (roof, accuracy) = axes
        draw_against_n(time, data, 1, "seconds, forward and backward")
        draw_against_n(memory, data, 2, "extra memory, MiB")
        draw_percent_of_roof(roof, data)
        draw_accuracy(accuracy, data)
        for axis in axes.flat:
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_facecolor("none")
        handles, labels = time.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(title, fontsize=10)
        metadata = {"Title": title, "Description": f"data {data.digest}", "Date": None}
        figure.savefig(path, transparent=True, metadata=metadata)
        pyplot.close(figure)


def style(peer: str) -> dict[str, Any]:
    if peer not in PEERS:
        return {"color": FLOOR_COLOUR, "linestyle": "--", "linewidth": 1.2}
    index = list(PEERS).index(peer) % len(COLOURS)
    width = 2.4 if peer == OURS else 1.3
    return {"color": COLOURS[index], "marker": MARKERS[index], "linewidth": width}


def set_log_ticks(axis: Any) -> None:
    """Label 1, 2, 5 and 10 of each decade in full, because few decades are shown."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def draw_against_n(axis: Any, data: ChartData, column: int, label: str) -> None:
    for peer, points in data.against_n.items():
        shown = [(point[0], point[column]) for point in points if point[column]]
        is_memory_of_floor = column == 2 and peer not in PEERS  # its buffers are no measurement
        if shown and not is_memory_of_floor:
            axis.plot(*zip(*shown, strict=True), label=peer, markersize=5, **style(peer))
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_yscale("log")
    set_log_ticks(axis.yaxis)
    axis.set_xlabel("N, tokens")
    axis.set_title(f"{HEADLINE[data.level]}: {label}", fontsize=9, loc="left")
    axis.grid(alpha=0.2)


def draw_percent_of_roof(axis: Any, data: ChartData) -> None:
    """Draw a bar per task and phase."""
    height = 0.8 / len(PHASES)
    for row, phases in enumerate(data.of_roof.values()):
        for index, phase in enumerate(PHASES):
            if phase in phases:
                bars = axis.barh(
                    row + (index - 1) * height,
                    phases[phase],
                    height,
                    color=COLOURS[0],
                    alpha=PHASE_SHADES[phase],
                )
                axis.bar_label(bars, fmt=f" {phase} {{:.0f}}%", fontsize=6)
    axis.set_yticks(range(len(data.of_roof)), list(data.of_roof), fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.25)  # for the labels
    axis.axvline(100, color=FLOOR_COLOUR, linestyle="--", linewidth=1.2)
    roof = "copy bandwidth" if data.level == "logits" else "rate of torch.mm"
    axis.set_title(f"{OURS}: % of the {roof}, {data.base.N:,} tokens", fontsize=9, loc="left")


def draw_accuracy(axis: Any, data: ChartData) -> None:
    for peer, (seconds, error) in data.accuracy.items():
        axis.plot(seconds, error, **style(peer) | {"linestyle": "", "markersize": 8})
    floor, _ = FLOORS[data.level]
    for N, seconds, _ in data.against_n.get(floor, ()):
        if N == data.base.N:
            axis.axvline(seconds, **style(floor))
    axis.set_xscale("log")
    axis.set_yscale("log")
    set_log_ticks(axis.xaxis)
    set_log_ticks(axis.yaxis)
    axis.set_xlabel("seconds")
    axis.set_title(f"error of the gradient, {data.base.N:,} tokens", fontsize=9, loc="left")
    axis.grid(alpha=0.2)
