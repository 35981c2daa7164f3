"""The curves of a run as one PNG."""

from __future__ import annotations

from pathlib import Path

PANELS = [
    ("reward", "mean reward"),
    ("accuracy", "accuracy of the sampled answers"),
    ("entropy", "entropy per token (nats)"),
    ("completions/mean_length", "completion length (tokens)"),
]
TREND = "#1f5fa8"


def plot_curves(path: Path, history: list[dict], before: float, after: float, title: str) -> None:
    """Draw reward, accuracy, entropy and length over the steps, each with its running mean.

    `before` and `after` are held-out greedy accuracies; they stand at the two ends of the accuracy
    panel.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
    for axis, (key, label) in zip(axes.flat, PANELS, strict=True):
        rows = [row for row in history if key in row]  # a step without signal has no entropy
        steps, values = [row["step"] for row in rows], [row[key] for row in rows]
        axis.plot(steps, values, color=TREND, alpha=0.3, linewidth=1)
        axis.plot(steps, _running_mean(values), color=TREND, linewidth=2)
        axis.set_title(label, fontsize=10, loc="left")
        axis.set_ylim(0, 1.1 * max(values, default=1.0))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 1].set_ylim(0, 1.05)
    _mark_held_out(axes[0, 1], [0, len(history)], [before, after])
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.suptitle(title, fontsize=11)
    partial = path.with_name("partial-" + path.name)
    figure.savefig(partial, dpi=120)
    pyplot.close(figure)
    partial.rename(path)


def _mark_held_out(axis, steps: list[int], values: list[float]) -> None:
    axis.plot(
        steps, values, "o", color="#c8501e", label="held-out questions, greedy", clip_on=False
    )
    for step, value, side in zip(steps, values, ("left", "right"), strict=True):
        offset = (6 if side == "left" else -6, 7)
        axis.annotate(
            f"{value:.0%}",
            (step, value),
            offset,
            textcoords="offset points",
            ha=side,
            color="#c8501e",
        )
    axis.legend(frameon=False, fontsize=9, loc="lower right")


def _running_mean(values: list[float]) -> list[float]:
    """Each value averaged with those before it, over a tenth of the run."""
    width = max(1, len(values) // 10)
    windows = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
