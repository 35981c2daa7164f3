"""The charts: memory against tokens; and for each level times, memory, percentage, accuracy.

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
from benchmarks.peers.plain import PLAIN

MEMORY_PEERS = (PLAIN, "TRL", "Liger", OURS)
MEBI = 2**20
FEWEST_OF_A_LINE = 4  # points; fewer are not joined
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
    against_n: dict[str, list[tuple[int, float, float]]]  # by peer, the fastest first: N, s, MiB
    of_floor: dict[str, dict[str, float]]  # ours, by task and phase, in percent
    accuracy: dict[str, tuple[float, float]]  # by peer: seconds, error of the gradient

    @property
    def digest(self) -> str:
        return digest([str(self.base), self.against_n, self.of_floor, self.accuracy])


@dataclass(frozen=True)
class MemoryData:
    """Extra memory of loss and gradients against the number of tokens."""

    shape: Shape
    by_peer: dict[str, list[tuple[int, float | None]]]  # N, MiB or None: out of memory

    @property
    def digest(self) -> str:
        return digest([str(self.shape), self.by_peer])


def digest(content: list) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


class Chart(NamedTuple):
    data: ChartData | MemoryData
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
        mebibytes = (record.extra_bytes or 0) / MEBI
        against_n.setdefault(record.peer, []).append((record.N, record.seconds, mebibytes))
    for record in headline:
        if record.N == base.N and record.errors:
            errors = [error for name, error in record.errors.items() if name.startswith("d_")]
            accuracy[record.peer] = record.seconds, max(errors)
    times = {(x.task, x.phase, x.peer, x.N): x.seconds for x in along_n}
    of_floor: dict[str, dict[str, float]] = {}
    for (task, phase, peer, N), seconds in times.items():
        if peer == OURS and N == base.N and task in TASKS and TASKS[task].level == level:
            if floor := times.get((task, phase, FLOORS[level][0], N)):
                of_floor.setdefault(task, {})[phase] = 100 * floor / seconds
    fastest_first = dict(sorted(against_n.items(), key=lambda item: item[1][-1][1]))
    return ChartData(level, base, fastest_first, of_floor, accuracy)


def memory_data(records: list[Record], base: Shape) -> MemoryData:
    """Select the memory of MEMORY_PEERS at every N under the head and in the dtype of `base`."""
    by_peer: dict[str, list[tuple[int, float | None]]] = {}
    for record in sorted(records, key=lambda record: record.N):
        is_shape = replace(record.shape, N=base.N) == base and record.peer in MEMORY_PEERS
        if is_shape and (record.task, record.phase) == (HEADLINE["hidden"], "both"):
            if record.status == "ok" and record.extra_bytes:
                by_peer.setdefault(record.peer, []).append((record.N, record.extra_bytes / MEBI))
            elif record.status == "out of memory":
                by_peer.setdefault(record.peer, []).append((record.N, None))
    return MemoryData(base, by_peer)


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
        if isinstance(data, MemoryData):
            figure, axis = pyplot.subplots(figsize=(7.5, 3.8), layout="constrained")
            axes = [axis]
            draw_memory(axis, data)
        else:
            figure, grid = pyplot.subplots(2, 2, figsize=(9.5, 7.5), layout="constrained")
            axes = [*grid.flat]
            draw_against_n(axes[0], data, 1, "seconds, forward and backward")
            draw_against_n(axes[1], data, 2, "extra memory, MiB")
            draw_percent_of_floor(axes[2], data)
            draw_accuracy(axes[3], data)
            handles, labels = axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_facecolor("none")
        figure.suptitle(title, fontsize=10)
        metadata = {"Title": title, "Description": f"data {data.digest}", "Date": None}
        figure.savefig(path, transparent=True, metadata=metadata)
        pyplot.close(figure)


def draw_memory(axis: Any, data: MemoryData) -> None:
    """Draw a line per peer with its name and last value at its end, instead of a legend."""
    for peer, points in data.by_peer.items():
        fits = [(N, mebibytes) for N, mebibytes in points if mebibytes is not None]
        axis.plot(*zip(*fits, strict=True), markersize=5, **style(peer))
        N, mebibytes = fits[-1]
        size = f"{mebibytes / 1024:.1f} GiB" if mebibytes >= 1024 else f"{mebibytes:.0f} MiB"
        beyond = [N for N, mebibytes in points if mebibytes is None]
        note = f"\n{beyond[0]:,} tokens do not fit" if beyond else ""
        axis.annotate(
            f"{peer}: {size}{note}",
            (N, mebibytes),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=style(peer)["color"],
            fontweight="bold" if peer == OURS else "normal",
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted({N for points in data.by_peer.values() for N, _ in points}))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(lambda x, _: f"{x / 1024:g} GiB" if x >= 1024 else f"{x:g} MiB")
    axis.set_yticks([4**k for k in range(3, 8)])
    axis.minorticks_off()
    axis.margins(y=0.1)
    low, high = axis.get_xlim()
    axis.set_xlim(low, high * (high / low) ** 0.35)  # room for the names
    axis.set_xlabel("tokens")
    axis.grid(alpha=0.2)


def style(peer: str) -> dict[str, Any]:
    if peer not in PEERS:
        return {"color": FLOOR_COLOUR, "linestyle": "--", "linewidth": 1.2}
    index = list(PEERS).index(peer) % len(COLOURS)
    width = 2.8 if peer == OURS else 1.3
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
            line = {} if len(shown) >= FEWEST_OF_A_LINE else {"linestyle": ""}
            if peer not in PEERS:
                line["marker"] = "_"
            look = {"markersize": 5} | style(peer) | line
            axis.plot(*zip(*shown, strict=True), label=peer, **look)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_yscale("log")
    set_log_ticks(axis.yaxis)
    axis.set_xlabel("N, tokens")
    axis.set_title(f"{HEADLINE[data.level]}: {label}", fontsize=9, loc="left")
    axis.grid(alpha=0.2)


def draw_percent_of_floor(axis: Any, data: ChartData) -> None:
    """Draw a bar per task and phase."""
    height = 0.8 / len(PHASES)
    for row, phases in enumerate(data.of_floor.values()):
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
    axis.set_yticks(range(len(data.of_floor)), list(data.of_floor), fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.25)  # for the labels
    axis.axvline(100, color=FLOOR_COLOUR, linestyle="--", linewidth=1.2)
    title = f"{OURS}: % of the speed of the {FLOORS[data.level][0]}, {data.base.N:,} tokens"
    axis.set_title(title, fontsize=9, loc="left")


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
