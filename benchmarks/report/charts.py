"""Four panels per level: time and memory against N, percentage of the roof, accuracy against time.

Drawn twice, for a light page and for a dark one. Each file names the digest of the data in it.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.core.floors import FLOORS
from benchmarks.core.results import Record
from benchmarks.core.shapes import Shape
from benchmarks.core.tasks import PHASES, TASKS
from benchmarks.peers import OURS, PEERS

HEADLINE = {"logits": "grpo_loss", "hidden": "linear_grpo_loss"}
THEMES = {"light": "#1f2328", "dark": "#e6edf3"}  # the ink; the page shines through
# One a peer. Okabe and Ito's without the yellow, and more: apart for most eyes, on white and black.
COLOURS = ("#0072b2", "#56b4e9", "#8c8c8c", "#cc79a7", "#e69f00", "#009e73", "#d55e00")
COLOURS += ("#b08d57", "#7f63d2")
MARKERS = "osXDv^P*h"
FLOOR_COLOUR = "#8c8c8c"
PHASE_SHADES = {"forward": 0.4, "backward": 0.7, "both": 1.0}


@dataclass(frozen=True)
class Data:
    """What the panels of a level show."""

    level: str
    base: Shape
    against_n: dict[str, list[tuple[int, float, float]]]  # by peer: N, seconds, MiB
    of_roof: dict[str, dict[str, float]]  # by task and phase: ours
    accuracy: dict[str, tuple[float, float]]  # by peer: seconds, error of the gradient

    @property
    def digest(self) -> str:
        content = [str(self.base), self.against_n, self.of_roof, self.accuracy]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def data_of(records: list[Record], level: str, base: Shape) -> Data:
    """From the records of one machine."""
    done = [each for each in records if each.status == "ok" and each.seconds is not None]
    along = [each for each in done if _differs_in_n_only(each, base) and each.phase == "both"]
    headline = [each for each in along if each.task == HEADLINE[level]]
    against_n: dict[str, list] = {}
    for each in sorted(headline, key=lambda each: each.N):
        memory = (each.extra_bytes or 0) / 2**20
        against_n.setdefault(each.peer, []).append((each.N, each.seconds, memory))
    of_roof: dict[str, dict[str, float]] = {}
    for each in done:
        if each.peer == OURS and _differs_in_n_only(each, base) and each.N == base.N:
            if each.task in TASKS and TASKS[each.task].level == level:
                of_roof.setdefault(each.task, {})[each.phase] = each.percent_of_roof
    accuracy = {
        each.peer: (each.seconds, max(e for name, e in each.errors.items() if name[:2] == "d_"))
        for each in headline
        if each.N == base.N and each.errors
    }
    return Data(level, base, against_n, of_roof, accuracy)


def _differs_in_n_only(record: Record, base: Shape) -> bool:
    kept = (base.model, base.dtype, base.masked, base.inert)
    return (record.model, record.dtype, record.masked, record.inert) == kept


def draw(data: Data, theme: str, title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ink = THEMES[theme]
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings = dict.fromkeys(names, ink) | {
        "font.size": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": "grpo_kernels",
    }
    with pyplot.rc_context(settings):
        figure, ((time, memory), (roof, accuracy)) = pyplot.subplots(
            2, 2, figsize=(9.5, 7.5), layout="constrained"
        )
        _against_n(time, data, 1, "seconds, forward and backward")
        _against_n(memory, data, 2, "extra memory, MiB")
        _of_roof(roof, data)
        _accuracy(accuracy, data)
        for axis in (time, memory, roof, accuracy):
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_facecolor("none")
        handles, labels = time.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(title, fontsize=10)
        metadata = {"Title": title, "Description": f"data {data.digest}", "Date": None}
        figure.savefig(path, transparent=True, metadata=metadata)
        pyplot.close(figure)


def _style(peer: str) -> dict:
    if peer not in PEERS:
        return {"color": FLOOR_COLOUR, "linestyle": "--", "linewidth": 1.2}
    index = list(PEERS).index(peer) % len(COLOURS)
    weight = 2.4 if peer == OURS else 1.3
    return {"color": COLOURS[index], "marker": MARKERS[index], "linewidth": weight}


def _against_n(axis, data: Data, column: int, label: str) -> None:
    for peer, points in data.against_n.items():
        shown = [(each[0], each[column]) for each in points if each[column]]
        if shown and not (column == 2 and peer not in PEERS):  # a floor's buffers mean nothing
            axis.plot(*zip(*shown, strict=True), label=peer, markersize=5, **_style(peer))
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_yscale("log")
    _plain_ticks(axis.yaxis)
    axis.set_xlabel("N, tokens")
    axis.set_title(f"{HEADLINE[data.level]}: {label}", fontsize=9, loc="left")
    axis.grid(alpha=0.2)


def _plain_ticks(axis) -> None:
    """1, 2, 5 and 10 of each decade, written out: few decades are shown."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _of_roof(axis, data: Data) -> None:
    """A bar per phase and task."""
    height = 0.8 / len(PHASES)
    for row, phases in enumerate(data.of_roof.values()):
        for at, phase in enumerate(PHASES):
            if phase in phases:
                place = row + (at - 1) * height
                axis.barh(place, phases[phase], height, color=COLOURS[0], alpha=PHASE_SHADES[phase])
                label = f" {phase} {phases[phase]:.0f}%"
                axis.annotate(label, (phases[phase], place), va="center", fontsize=6)
    axis.set_yticks(range(len(data.of_roof)), list(data.of_roof), fontsize=7)
    axis.invert_yaxis()
    longest = max([100, *(each for phases in data.of_roof.values() for each in phases.values())])
    axis.set_xlim(0, 1.25 * longest)
    axis.axvline(100, color=FLOOR_COLOUR, linestyle="--", linewidth=1.2)
    roof = "copy bandwidth" if data.level == "logits" else "rate of torch.mm"
    axis.set_title(f"{OURS}: % of the {roof}, {data.base.N:,} tokens", fontsize=9, loc="left")


def _accuracy(axis, data: Data) -> None:
    for peer, (seconds, error) in data.accuracy.items():
        axis.plot(seconds, error, **_style(peer) | {"linestyle": "", "markersize": 8})
    floor, _ = FLOORS[data.level]
    for N, seconds, _ in data.against_n.get(floor, ()):
        if N == data.base.N:
            axis.axvline(seconds, **_style(floor))
    axis.set_xscale("log")
    axis.set_yscale("log")
    _plain_ticks(axis.xaxis)
    _plain_ticks(axis.yaxis)
    axis.set_xlabel("seconds")
    axis.set_title(f"error of the gradient, {data.base.N:,} tokens", fontsize=9, loc="left")
    axis.grid(alpha=0.2)
