"""The curves of a run: what is drawn where, and that no history breaks the drawing."""

import math
import sys
import warnings

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

from reference.training.errors import UserError
from reference.training.run.plots import COLOURS, PANELS, SIZE, plot_dashboard, running_mean

NAN, INF = float("nan"), float("inf")
METRICS = [*(key for panel in PANELS for key in panel.curves), "reward_std", "learning_rate"]
METRICS += ["num_tokens", "step_time"]


def made_up(steps: int) -> list[dict]:
    """A history of every metric: waves between 0 and 1, each of another length."""
    return [
        {"step": step}
        | {key: 0.5 + 0.5 * math.sin(step / (3 + i)) for i, key in enumerate(METRICS)}
        for step in range(1, steps + 1)
    ]


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Returns the figure and its panels by title; a warning is an error."""
    saved = []
    save = Figure.savefig

    def drawn(history, evaluations=(), title="a model on a task", paint=False):
        with warnings.catch_warnings(), monkeypatch.context() as patch:
            warnings.simplefilter("error")
            patch.setattr(
                Figure,
                "savefig",  # most of the time is in painting
                lambda figure, path: (
                    saved.append(figure),
                    save(figure, path) if paint else path.touch(),
                ),
            )
            plot_dashboard(tmp_path / "curves.png", history, evaluations, title)
        assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
        axes = saved[-1].axes
        return saved[-1], dict(zip((panel.title for panel in PANELS), axes, strict=True))

    return drawn


def texts(axis) -> list[str]:
    return [text.get_text() for text in axis.texts]


def curves(axis) -> list[tuple[list[float], list[float]]]:
    """What the lines of a panel hold, marks of held-out questions left out."""
    lines = [line for line in axis.lines if line.get_linestyle() != "None"]
    return [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in lines]


@pytest.mark.parametrize("steps", [0, 1, 2, 400])
def test_a_history_of_any_length_is_drawn_1500_pixels_wide(draw, tmp_path, steps):
    draw(made_up(steps), [{"step": 0, "strict": 0.25, "lenient": 0.5}], paint=True)
    picture = imread(tmp_path / "curves.png")
    assert picture.shape == (SIZE[1] * 150, 1500, 4)
    assert picture[:4].min() == 1  # white


@pytest.mark.parametrize("value", [NAN, INF, None, 0, -3.0, 1e-30, 3e38])
def test_a_metric_of_one_value_is_drawn(draw, value):
    history = [{"step": step} | dict.fromkeys(METRICS, value) for step in range(1, 15)]
    _, panels = draw(history, [{"step": 3, "strict": value, "lenient": value}], paint=True)
    low, high = panels["entropy"].get_ylim()
    assert low <= 0 <= high and low < high


def test_missing_keys_leave_panels_that_say_so(draw):
    _, panels = draw([{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.75}])
    assert texts(panels["KL to the reference"])[-1] == "no KL: beta 0"
    assert texts(panels["memory"])[-1] == "not recorded"
    assert texts(panels["reward"])[-1] == "0.5 → 0.75"
    assert len(panels["memory"].get_yticks()) == 0


def test_values_and_their_running_mean_are_what_is_drawn(draw):
    history = made_up(40)
    history[7]["entropy"] = NAN
    _, panels = draw(history)
    kept = [row for row in history if row["step"] != 8]
    (steps, values), (_, means) = curves(panels["entropy"])
    assert steps == [row["step"] for row in kept]
    assert values == [row["entropy"] for row in kept]
    windows = [values[max(0, i - 2) : i + 1] for i in range(39)]
    assert means == pytest.approx([sum(window) / len(window) for window in windows])


def test_the_reward_has_a_band_of_one_standard_deviation(draw):
    _, panels = draw([{"step": s, "reward": 0.5, "reward_std": 0.25} for s in (1, 2, 3)])
    band = panels["reward"].collections[0].get_paths()[0].vertices
    assert sorted({tuple(point) for point in band.tolist()}) == [
        (step, height) for step in (1, 2, 3) for height in (0.25, 0.75)
    ]
    assert panels["reward"].get_ylim()[1] > 0.75


def test_held_out_accuracies_are_marks_of_their_own_in_the_colours_of_the_curves(draw):
    evaluations = [
        {"step": 0, "strict": 0.125, "lenient": 0.25},
        {"step": 20, "strict": 0.5, "lenient": NAN},
        {"step": 40, "strict": 0.75, "lenient": 0.875},
    ]
    figure, panels = draw(made_up(40), evaluations)
    marks = [line for line in panels["accuracy"].lines if line.get_linestyle() == "None"]
    assert [list(zip(*line.get_data(), strict=True)) for line in marks] == [
        [(0, 0.125), (20, 0.5), (40, 0.75)],
        [(0, 0.25), (40, 0.875)],
    ]
    assert [to_hex(line.get_color()) for line in marks] == list(COLOURS[:2])
    assert texts(panels["accuracy"])[-2:] == ["● strict 12% → 75%", "■ lenient 25% → 88%"]
    assert "held-out accuracy 12% → 75% strict, 25% → 88% lenient" in texts(figure)[1]


def test_equal_strict_and_lenient_accuracies_are_one_curve(draw):
    history = [{"step": s, "accuracy/strict": 0.5, "accuracy/lenient": 0.5} for s in (1, 2, 3)]
    evaluations = [{"step": step, "strict": step / 4, "lenient": step / 4} for step in (0, 3)]
    figure, panels = draw(history, evaluations)
    assert len(curves(panels["accuracy"])) == 2  # the values and their mean
    assert texts(panels["accuracy"])[-1] == "● 0% → 75%"
    assert texts(figure)[1].endswith("held-out accuracy 0% → 75%")


def test_axes_show_shares_whole_and_begin_at_zero(draw):
    _, panels = draw([row | {"memory_gib": 20.5 + row["entropy"] / 9} for row in made_up(30)])
    for title in ("accuracy", "no signal / cut off"):
        assert panels[title].get_ylim() == (0, 1)
    for title in ("reward", "completion length", "entropy", "speed", "time", "memory"):
        assert panels[title].get_ylim()[0] == 0
    _, panels = draw([{"step": 1, "reward": -1.0, "kl": 0.0}, {"step": 2, "reward": 0.5}])
    low, high = panels["reward"].get_ylim()
    assert low < -1 and high > 0.5
    assert panels["KL to the reference"].get_ylim() == (0, 1)


@pytest.mark.parametrize(
    ("largest", "top"), [(0, 0.01), (0.0099, 0.01), (0.013, 0.02), (0.3, 0.5), (0.6, 1), (1, 1)]
)
def test_clipped_ratios_begin_at_zero_and_end_at_a_round_share(draw, largest, top):
    _, panels = draw([{"step": step, "clip_ratio/low_mean": largest} for step in (1, 2)])
    assert panels["clipped ratios"].get_ylim() == (0, top)


def test_the_difference_of_the_engines_is_drawn_in_whole_powers_of_ten(draw):
    mean, most = "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"
    _, panels = draw([{"step": 1, mean: 0.0, most: 0.25}, {"step": 2, mean: 0.002, most: 0.5}])
    axis = panels["trainer - sampler"]
    assert axis.get_yscale() == "log" and axis.get_ylim() == (0.001, 1)
    assert curves(axis)[0] == ([2], [0.002])
    assert texts(axis)[-2:] == ["mean 0 → 0.002", "max 0.25 → 0.5"]


def test_no_line_crosses_a_gap_longer_than_the_window(draw):
    known = [*range(1, 11), *range(13, 21), 27, *range(34, 41)]
    _, panels = draw([{"step": s} | ({"entropy": 1.0} if s in known else {}) for s in range(1, 41)])
    for steps, values in curves(panels["entropy"]):
        breaks = [i for i, value in enumerate(values) if math.isnan(value)]
        assert [(steps[i - 1], steps[i + 1]) for i in breaks] == [(20, 27), (27, 34)]
    trend = panels["entropy"].lines[-1]
    assert [trend.get_xdata()[i] for i in trend.get_markevery()] == [27]  # alone: a dot


def test_the_running_mean_covers_a_tenth_of_the_run_and_begins_afresh_after_a_gap():
    values = np.arange(30.0)
    steps = np.where(values < 20, values, values + 50)
    expected = [0, 0.5, *range(1, 19), 20, 20.5, *range(21, 29)]
    assert running_mean(steps, values).tolist() == pytest.approx(expected)
    assert running_mean(np.empty(0), np.empty(0)).tolist() == []


def test_title_and_totals_stand_above(draw):
    history = [{"step": s, "num_tokens": 5_000 * s, "step_time": 30.0} for s in (1, 2, 3)]
    figure, _ = draw(
        history, [{"step": 0, "strict": 0.25, "lenient": 0.5}], "a_b for $\\frac$", True
    )
    assert texts(figure) == [
        "a_b for $\\frac$",
        "3 steps   ·   15k tokens   ·   1 min 30 s   ·   held-out accuracy 25% strict, 50% lenient",
    ]


def test_the_learning_rate_is_told_beside_the_gradient_norm(draw):
    _, panels = draw([{"step": s, "grad_norm": 0.5, "learning_rate": s * 1e-6} for s in (1, 2)])
    assert texts(panels["gradient norm"])[-2:] == ["0.5 → 0.5", "learning rate 2e-6"]


def test_numbers_lie_on_no_curve_and_no_heading_reaches_the_next_panel(draw):
    wide = {"num_tokens": 12_345_678, "step_time": 1234.5}
    history = [row | wide for row in made_up(200)]
    for i, row in enumerate(history):
        for key in METRICS:
            row[key] *= 0.0987 if "max" in key else 1 - i / 250
    evaluations = [{"step": 0, "strict": 0.88, "lenient": 0.88}]
    evaluations += [{"step": 200, "strict": 0.89, "lenient": 0.9}]
    _, panels = draw(history, evaluations)
    grid = np.array(list(panels.values())).reshape(4, 3)
    for row in grid:
        bounds = [axis.get_position().x0 * 1500 for axis in row[1:]] + [1500]
        for axis, right in zip(row, bounds, strict=True):
            for text in axis.texts:
                box = text.get_window_extent()
                assert box.y0 >= axis.bbox.y1 - 1, text
                assert box.x1 < right - 5, text
    for axis in grid[:, 0]:
        assert all(label.get_window_extent().x0 >= 0 for label in axis.get_yticklabels())


def test_a_drawing_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    plot_dashboard(path, made_up(3), [], "first")
    first = path.read_bytes()

    def fill_the_disk(self, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fill_the_disk)
    with pytest.raises(UserError, match=r"^cannot write .*curves\.png: disk full$"):
        plot_dashboard(path, made_up(4), [], "second")
    assert path.read_bytes() == first


def test_the_look_depends_on_no_settings_of_the_user_and_leaves_them_alone(tmp_path):
    import matplotlib
    from matplotlib import style

    plot_dashboard(tmp_path / "a.png", made_up(3), [], "title")
    with style.context("dark_background"):
        before = dict(matplotlib.rcParams)
        plot_dashboard(tmp_path / "b.png", made_up(3), [], "title")
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_missing_matplotlib_is_an_error_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="curves need matplotlib: pip install"):
        plot_dashboard(tmp_path / "curves.png", [], [], "title")
