"""The curves of a run: the contents of each panel; any history can be drawn."""

import math
import sys
import warnings

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

from reference.training.errors import UserError
from reference.training.run.plots import (
    COLORS,
    PANELS,
    main,
    plot_dashboard,
    running_mean,
    split_into_rows,
)

NAN, INF = float("nan"), float("inf")
METRICS = [*(key for panel in PANELS for key in panel.curves), "reward_std", "learning_rate"]
METRICS += ["num_tokens", "step_time"]


def make_history(steps: int) -> list[dict]:
    """Make a history of every metric: waves between 0 and 1, each of another length."""
    return [
        {"step": step}
        | {key: 0.5 + 0.5 * math.sin(step / (3 + i)) for i, key in enumerate(METRICS)}
        for step in range(1, steps + 1)
    ]


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Return the figure and its panels by title; a warning is an error."""
    saved = []
    save = Figure.savefig

    def drawn(history, evaluations=(), title="a model on a task", paint=False, **options):
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
            plot_dashboard(tmp_path / "curves.png", history, evaluations, title, **options)
        assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
        return saved[-1], {axis.get_title(loc="left"): axis for axis in saved[-1].axes}

    return drawn


def texts(axis) -> list[str]:
    return [text.get_text() for text in axis.texts]


def legend(axis) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def curves(axis) -> list[tuple[list[float], list[float]]]:
    """Return the data of the lines of a panel, without the marks of held-out questions."""
    lines = [line for line in axis.lines if line.get_linestyle() != "None"]
    return [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in lines]


@pytest.mark.parametrize("steps", [0, 1, 2, 400])
def test_history_of_any_length_is_drawn_1500_pixels_wide(draw, tmp_path, steps):
    draw(make_history(steps), [{"step": 0, "strict": 0.25, "lenient": 0.5}], paint=True)
    picture = imread(tmp_path / "curves.png")
    rows = 5 if steps else 1
    assert picture.shape == pytest.approx((150 * (0.4 + 2.25 * rows), 1500, 4), abs=1)
    assert picture[:4].min() == 1  # white


@pytest.mark.parametrize("value", [NAN, INF, None])
def test_values_that_are_not_finite_are_left_out(draw, value):
    history = [{"step": step} | dict.fromkeys(METRICS, value) for step in range(1, 15)]
    assert draw(history, [{"step": 3, "strict": value, "lenient": value}])[1] == {}


@pytest.mark.parametrize("value", [0, -3.0, 1e-30, 3e38])
def test_constant_metric_is_drawn(draw, value):
    history = [{"step": step} | dict.fromkeys(METRICS, value) for step in range(1, 15)]
    _, panels = draw(history, [{"step": 3, "strict": value, "lenient": value}], paint=True)
    low, high = panels["entropy"].get_ylim()
    assert low <= 0 <= high and low < high


def test_panels_without_data_are_left_out(draw):
    _, panels = draw([{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.75}])
    assert list(panels) == ["reward"]
    assert legend(panels["reward"]) == [" 0.5 → 0.75"]
    assert list(draw([], [{"step": 0, "strict": 0.5, "lenient": 0.5}], paint=True)[1]) == [
        "accuracy"
    ]
    assert draw([], paint=True)[1] == {}


OMIT_ZEROS = [panel for panel in PANELS if panel.omit_zeros]


@pytest.mark.parametrize("panel", OMIT_ZEROS, ids=lambda panel: panel.title)
def test_panel_of_zeros_is_left_out_until_a_value_is_not_zero(draw, panel):
    history = [row | dict.fromkeys(panel.curves, 0.0) for row in make_history(5)]
    titles = [each.title for each in PANELS]
    assert list(draw(history)[1]) == [title for title in titles if title != panel.title]
    history[-1] |= dict.fromkeys(list(panel.curves)[-1:], 0.25)
    assert list(draw(history)[1]) == titles


def test_other_panels_are_drawn_if_they_are_zero(draw):
    assert "gradient norm" in draw([{"step": 1, "grad_norm": 0.0}])[1]
    assert [panel.title for panel in OMIT_ZEROS] == [
        "KL to the reference",
        "clipped ratios",
        "trainer - sampler",
    ]


@pytest.mark.parametrize("count", [1, 4, 5, 6, 7, 10, 12])
def test_panels_fill_the_picture(draw, count):
    keys = [key for panel in PANELS[:count] for key in panel.curves]
    history = [{name: row[name] for name in ("step", *keys)} for row in make_history(3)]
    _, panels = draw(history, paint=True)
    assert len(panels) == count
    boxes = [axis.get_position() for axis in panels.values()]
    rows = {}
    for box in boxes:
        rows.setdefault(round(box.y0, 2), []).append(box)
    assert [len(row) for row in rows.values()] == split_into_rows(count)
    for row in rows.values():
        assert len({round(box.width, 1) for box in row}) == 1
        assert row[0].x0 < 0.1 and row[-1].x1 > 0.95
    numbered = [axis for axis in panels.values() if axis.xaxis.get_tick_params()["labelbottom"]]
    assert list(panels.values())[-1] in numbered


def test_rows_of_panels():
    expected = {1: [1], 4: [2, 2], 5: [2, 3], 7: [2, 2, 3], 10: [2, 2, 3, 3], 12: [3] * 4}
    assert {count: split_into_rows(count) for count in expected} == expected
    assert split_into_rows(0) == []


def test_reward_of_a_task_with_a_maximum(draw):
    history = [{"step": s, "reward": 0.5 * s, "reward_std": 1.0} for s in (1, 2, 3)]
    evaluations = [{"step": 0, "reward": 0.25}, {"step": 3, "reward": 2.5}]
    figure, panels = draw(history, evaluations, reward_max=4.0)
    assert panels["reward of 4"].get_ylim() == (0, pytest.approx(4.2))
    assert "held-out reward 0.25 → 2.5 of 4" in texts(figure)[0]
    marks = [line for line in panels["reward of 4"].lines if line.get_linestyle() == "None"]
    assert [line.get_data()[1].tolist() for line in marks] == [[0.25, 2.5]]
    _, panels = draw(history, evaluations)
    assert "reward" in panels and "accuracy" not in panels
    assert panels["reward"].get_ylabel() == "band: ± std; dots: held-out"


def test_values_and_their_running_mean_are_drawn(draw):
    history = make_history(40)
    history[7]["entropy"] = NAN
    _, panels = draw(history)
    kept = [row for row in history if row["step"] != 8]
    (steps, values), (_, means) = curves(panels["entropy"])
    assert steps == [row["step"] for row in kept]
    assert values == [row["entropy"] for row in kept]
    windows = [values[max(0, i - 2) : i + 1] for i in range(39)]
    assert means == pytest.approx([sum(window) / len(window) for window in windows])


def test_reward_has_a_band_of_one_standard_deviation(draw):
    _, panels = draw([{"step": s, "reward": 0.5, "reward_std": 0.25} for s in (1, 2, 3)])
    band = panels["reward"].collections[0].get_paths()[0].vertices
    assert sorted({tuple(corner) for corner in band.tolist()}) == [
        (step, height) for step in (1, 2, 3) for height in (0.25, 0.75)
    ]
    assert panels["reward"].get_ylim()[1] > 0.75


def test_held_out_accuracies_are_marks_in_the_colors_of_the_curves(draw):
    evaluations = [
        {"step": 0, "strict": 0.125, "lenient": 0.25},
        {"step": 20, "strict": 0.5, "lenient": NAN},
        {"step": 40, "strict": 0.75, "lenient": 0.875},
    ]
    figure, panels = draw(make_history(40), evaluations)
    marks = [line for line in panels["accuracy"].lines if line.get_linestyle() == "None"]
    assert [list(zip(*line.get_data(), strict=True)) for line in marks] == [
        [(0, 0.125), (20, 0.5), (40, 0.75)],
        [(0, 0.25), (40, 0.875)],
    ]
    assert [to_hex(line.get_color()) for line in marks] == list(COLORS[:2])
    assert "held-out strict 12.5% → 75.0%   ·   held-out lenient 25.0% → 87.5%" in texts(figure)[0]


def test_axes_show_shares_from_0_to_1_and_others_from_0(draw):
    _, panels = draw([row | {"memory_gib": 20.5 + row["entropy"] / 9} for row in make_history(30)])
    for title in ("accuracy", "no signal / cut off"):
        assert panels[title].get_ylim() == (0, 1)
    for title in ("reward", "completion length", "entropy", "speed", "time", "memory"):
        assert panels[title].get_ylim()[0] == 0
    _, panels = draw([{"step": 1, "reward": -1.0, "kl": 0.5}, {"step": 2, "reward": 0.5}])
    low, high = panels["reward"].get_ylim()
    assert low < -1 and high > 0.5
    assert panels["KL to the reference"].get_ylim()[0] == 0


def test_trainer_sampler_difference_has_a_log_axis(draw):
    mean, most = "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"
    _, panels = draw([{"step": 1, mean: 0.0, most: 0.25}, {"step": 2, mean: 0.002, most: 0.5}])
    axis = panels["trainer - sampler"]
    assert axis.get_yscale() == "log"
    (_, values), _, _, _ = curves(axis)
    assert math.isnan(values[0]) and values[1] == 0.002
    assert legend(axis) == ["mean 0 → 0.002", "max 0.25 → 0.5"]


def test_running_mean_covers_a_tenth_of_the_run():
    assert running_mean(np.arange(20.0)).tolist() == pytest.approx([0, *np.arange(0.5, 19)])
    assert running_mean(np.empty(0)).tolist() == []


def test_title_and_totals_are_above_the_panels(draw):
    history = [{"step": s, "num_tokens": 5_000 * s, "step_time": 30.0} for s in (1, 2, 3)]
    figure, _ = draw(
        history, [{"step": 0, "strict": 0.25, "lenient": 0.5}], "a_b for $\\frac$", True
    )
    assert texts(figure) == [
        "a_b for $\\frac$\n3 steps   ·   15,000 tokens   ·   1.5 min   ·   "
        "held-out strict 25.0% → 25.0%   ·   held-out lenient 50.0% → 50.0%"
    ]


def test_learning_rate_is_in_the_legend_of_the_gradient_norm(draw):
    _, panels = draw([{"step": s, "grad_norm": 0.5, "learning_rate": s * 1e-6} for s in (1, 2)])
    assert legend(panels["gradient norm"]) == [" 0.5 → 0.5", "learning rate 2e-06"]


def test_failed_drawing_leaves_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    plot_dashboard(path, make_history(3), [], "first")
    first = path.read_bytes()

    def fill_the_disk(self, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fill_the_disk)
    with pytest.raises(UserError, match=r"^cannot write .*curves\.png: disk full$"):
        plot_dashboard(path, make_history(4), [], "second")
    assert path.read_bytes() == first


def test_drawing_ignores_and_preserves_the_users_matplotlib_settings(tmp_path):
    import matplotlib
    from matplotlib import style

    plot_dashboard(tmp_path / "a.png", make_history(3), [], "title")
    with style.context("dark_background"):
        before = dict(matplotlib.rcParams)
        plot_dashboard(tmp_path / "b.png", make_history(3), [], "title")
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_missing_matplotlib_raises_user_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="curves need matplotlib: pip install"):
        plot_dashboard(tmp_path / "curves.png", [], [], "title")


def test_chosen_panels_of_a_run(tmp_path, monkeypatch):
    (tmp_path / "settings.json").write_text('{"model": "org/small", "task": "reverse"}')
    rows = ('{"step": 0, "eval/strict": 0.5}', '{"step": 1, "reward": 0.5, "entropy": 1.0}')
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path: (saved.append(figure), save(figure, path))
    )
    picture = tmp_path / "picture.png"
    main([str(tmp_path), str(picture), "--panels", "reward", "accuracy"])
    assert picture.exists() and saved[0].get_suptitle().startswith("small on reverse\n1 steps")
    reward, accuracy = saved[0].axes
    assert (reward.get_title(loc="left"), accuracy.get_title(loc="left")) == ("reward", "accuracy")
    assert reward.lines[-1].get_ydata().tolist() == [0.5]
    assert accuracy.lines[0].get_ydata().tolist() == [0.5]  # the evaluation
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(picture), "--panels", "rewards"])
