"""The log files of a run and its summary."""

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reference.training.errors import UserError
from reference.training.run.run_log import (
    RunLog,
    describe_completions,
    finite_values,
    format_number,
    load_wandb,
    read_metrics,
    summary_table,
    tenths,
    wilson,
)

NAN, INF = float("nan"), float("inf")


def lines(directory: Path) -> list[dict]:
    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    text = (directory / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def example(completion: str, advantage: float = 0.5, question: str = "7 + 5?", **rewards) -> dict:
    rewards = rewards or {"correct": 1.0}
    return {
        "question": question,
        "answer": "12",
        "completion": completion,
        "rewards": rewards,
        "advantage": advantage,
    }


def test_step_is_a_json_line_with_null_for_nan_and_infinity(tmp_path):
    log = RunLog(tmp_path, {}, tensorboard=False)
    log.step({"step": 1, "reward": 0.25, "kl": NAN, "grad_norm": INF, "entropy": None})
    log.step({"step": 2, "reward": torch.tensor(0.5), "kl": np.float32(0.25)})
    assert lines(tmp_path) == [
        {"step": 1, "reward": 0.25, "kl": None, "grad_norm": None, "entropy": None},
        {"step": 2, "reward": 0.5, "kl": 0.25},
    ]


def test_evaluation_is_a_separate_line_with_names_under_eval(tmp_path):
    log = RunLog(tmp_path, {}, tensorboard=False)
    log.evaluation(0, {"strict": 0.25, "lenient": 0.5})
    log.evaluation(8, {"step": 8, "strict": 0.75, "pass@4": 1.0})
    assert lines(tmp_path) == [
        {"step": 0, "eval/strict": 0.25, "eval/lenient": 0.5},
        {"step": 8, "eval/strict": 0.75, "eval/pass@4": 1.0},
    ]


def test_read_metrics_returns_the_rows_of_an_uninterrupted_run(tmp_path):
    """A mean reward is NaN where no reward applies."""
    rows, evaluations = [{"step": 1, "reward": NAN}], [{"step": 0, "reward": NAN, "questions": 3}]
    log = RunLog(tmp_path, {}, tensorboard=False)
    log.evaluation(0, evaluations[0])
    log.step(rows[0])
    assert str(read_metrics(tmp_path)) == str((rows, evaluations))


def test_later_log_appends_to_the_same_files(tmp_path):
    for step in (1, 2):
        log = RunLog(tmp_path, {}, tensorboard=False)
        log.step({"step": step}, [example("12")])
        log.close()
    assert [row["step"] for row in lines(tmp_path)] == [1, 2]
    assert (tmp_path / "completions.txt").read_text().count("answer:   12") == 2


def test_each_line_and_each_block_of_completions_is_one_write(tmp_path, monkeypatch):
    written = []
    opened = Path.open

    class Recorder:
        def __init__(self, file):
            assert isinstance(file, io.FileIO)  # without a buffer that could split the write
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            written.append(len(data))
            return self.file.write(data)

    log = RunLog(tmp_path, {}, tensorboard=False)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *args, **more: Recorder(opened(*args, **more)))
        row = {"step": 1} | {f"metric/{i}": i / 7 for i in range(2_000)}
        log.step(row, [example("word " * 200) for _ in range(200)])
    sizes = [(tmp_path / name).stat().st_size for name in ("metrics.jsonl", "completions.txt")]
    assert written == sizes and min(sizes) > 20_000


def test_settings_are_written_once_with_paths_as_text(tmp_path):
    RunLog(tmp_path, {"steps": 3, "data": Path("a/b"), "reward": ("x",)}, tensorboard=False)
    found = json.loads((tmp_path / "settings.json").read_text())
    assert found == {"steps": 3, "data": "a/b", "reward": ["x"]}
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_tensorboard_files_hold_the_finite_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, {})
    log.evaluation(0, {"strict": 0.25})
    log.step({"step": 1, "reward": 0.5, "kl": NAN})
    log.step({"step": 2, "reward": 0.75, "kl": 0.125})
    log.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    found = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    assert found == {
        "eval/strict": [(0, 0.25)],
        "reward": [(1, 0.5), (2, 0.75)],
        "kl": [(2, 0.125)],
    }


def test_missing_tensorboard_is_reported_and_logging_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    log = RunLog(tmp_path, {})
    log.step({"step": 1, "reward": 0.5})
    log.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert "pip install tensorboard" in line
    assert lines(tmp_path) == [{"step": 1, "reward": 0.5}]


def test_tensorflow_and_unused_packages_are_not_imported(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorflow.py").write_text("raise RuntimeError('imported')")
    code = (
        "import sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from reference.training.run.run_log import RunLog\n"
        "import reference.training.run.plots\n"
        "assert not {'tensorboard', 'wandb', 'matplotlib'} & set(sys.modules)\n"
        f"log = RunLog(Path({str(tmp_path)!r}), {{}})\n"
        "log.step({'step': 1, 'reward': 0.5}); log.close()\n"
        "assert 'tensorboard' in sys.modules and 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[4])


class FakeWandb(SimpleNamespace):
    class Error(Exception):
        pass

    def __init__(self, refusal: str | None = None) -> None:
        super().__init__(refusal=refusal, logged=[], finished=0)

    def init(self, **settings):
        if self.refusal:
            raise self.Error(self.refusal)
        self.settings = settings
        return self

    def log(self, row, step):
        self.logged.append((step, row))

    def finish(self):
        self.finished += 1


def test_wandb_receives_settings_and_finite_numbers(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = RunLog(tmp_path, {"steps": 3}, tensorboard=False, wandb=True)
    log.evaluation(0, {"strict": 0.25})
    log.step({"step": 1, "reward": 0.5, "kl": NAN})
    log.close()
    assert fake.settings["config"] == {"steps": 3}
    assert (fake.settings["name"], fake.settings["dir"]) == (tmp_path.name, str(tmp_path))
    assert fake.logged == [(0, {"eval/strict": 0.25}), (1, {"reward": 0.5})]
    assert fake.finished == 1


def test_wandb_is_imported_only_on_request(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # any import of it raises
    RunLog(tmp_path, {}, tensorboard=False).close()


def test_missing_wandb_raises_user_error_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"^--wandb needs .* pip install wandb$"):
        load_wandb()
    with pytest.raises(UserError, match="pip install wandb"):
        RunLog(tmp_path, {}, wandb=True)
    assert list(tmp_path.iterdir()) == []


def test_wandb_start_failure_is_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("no key configured\nread the manual"))
    with pytest.raises(UserError, match=r"^--wandb: no key configured \(WANDB_MODE[^\n]*$"):
        RunLog(tmp_path, {}, tensorboard=False, wandb=True)


def test_completions_are_grouped_under_question_and_answer():
    text = describe_completions(
        12,
        [
            example("It is 12.\nSure.", 0.87, correct=1.0, format=0.5),
            example("", -0.875, correct=0.0, format=0.0),
            example("12", 0.0, question="Add:\n5 + 7"),
        ],
    )
    assert text == (
        "step 12\n=======\n\n"
        "question: 7 + 5?\nanswer:   12\n\n"
        "  1. advantage +0.87, rewards: correct 1, format 0.5\n"
        "     | It is 12.\n     | Sure.\n\n"
        "  2. advantage -0.88, rewards: correct 0, format 0\n"
        "     |\n\n"
        "question: Add:\n          5 + 7\nanswer:   12\n\n"
        "  1. advantage +0.00, rewards: correct 1\n"
        "     | 12\n\n"
    )


def test_missing_answers_and_rewards_are_not_shown_as_values():
    example = {"question": "q", "answer": None, "completion": "c", "advantage": 0.0}
    text = describe_completions(1, [{**example, "rewards": {"a": None, "b": 0.5}}])
    assert "answer:" not in text and "rewards: a none, b 0.5" in text


def test_long_completion_is_cut_in_the_middle():
    text = describe_completions(1, [example("start " + "x" * 5_000 + " end 12")])
    assert "| start xxx" in text and text.endswith("xxx end 12\n\n")
    assert "[... 3,813 characters ...]" in text and len(text) < 1_500
    whole = "y" * 1_200
    assert f"| {whole}\n" in describe_completions(1, [example(whole)])


def test_control_characters_in_completions_are_escaped(tmp_path):
    log = RunLog(tmp_path, {}, tensorboard=False)
    log.step({"step": 1}, [example("\x1b[2Ja\rb\tc\u2028d\ud800e 7 × 8 = 五十六")])
    text = (tmp_path / "completions.txt").read_text(encoding="utf-8")
    assert r"| \x1b[2Ja\rb\tc\u2028d\ud800e 7 × 8 = 五十六" in text


HISTORY = [
    {
        "step": step,
        "reward": step / 20,
        "entropy": NAN if step == 1 else 2.0 - step / 20,
        "completions/mean_length": 11.5,
        "num_tokens": 1_000 * step,
        "step_time": 20.0,
    }
    for step in range(1, 21)
]


def test_summary_shows_before_and_after_with_intervals():
    before = {"strict": 0.125, "lenient": 0.25, "pass@4": 0.5, "questions": 128}
    after = {"strict": 0.75, "lenient": 0.75, "pass@4": 0.875, "questions": 128}
    assert summary_table(before, after, HISTORY) == (
        "held-out, 128 questions (95% interval)   before               after\n"
        "  accuracy, strict                       12.5% (8% to 19%)    75.0% (67% to 82%)\n"
        "  accuracy, lenient                      25.0% (18% to 33%)   75.0% (67% to 82%)\n"
        "  pass@4                                 50.0%                87.5%\n"
        "sampled, 20 steps                        first tenth          last tenth\n"
        "  reward                                 0.075                0.975\n"
        "  entropy (nats per token)               1.9                  1\n"
        "  completion length (tokens)             11.5                 11.5\n"
        "in all                                   0:06:40              20,000 tokens"
    )


def test_summary_of_sampled_completions_starts_with_their_reward():
    counts = {"questions": 1, "completions": 64}
    before = {"reward": 0.25, "strict": 0.0, "lenient": 0.125, **counts}
    after = {"reward": 3.5, "strict": 0.75, "lenient": 1.0, **counts}
    assert summary_table(before, after, [], " of 4").splitlines()[:4] == [
        "64 sampled completions (95% interval)   before              after",
        "  mean reward of 4                      0.25                3.5",
        "  accuracy, strict                      0.0% (0% to 6%)     75.0% (63% to 84%)",
        "  accuracy, lenient                     12.5% (6% to 23%)   100.0% (94% to 100%)",
    ]


def test_summary_merges_equal_accuracies():
    before = {"strict": 0.25, "lenient": 0.25, "questions": 128}
    after = {"strict": 0.5, "lenient": 0.5, "questions": 128}
    assert summary_table(before, after, []).splitlines() == [
        "held-out, 128 questions (95% interval)   before               after",
        "  accuracy                               25.0% (18% to 33%)   50.0% (41% to 59%)",
        "sampled, 0 steps                         first tenth          last tenth",
        "in all                                   0:00:00",
    ]


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81 / 263, 263, 0.2553, 0.3662),
        (15 / 148, 148, 0.0624, 0.1605),
        (0 / 20, 20, 0.0, 0.1611),
        (1 / 29, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_matches_published_intervals(share, count, low, high):
    assert wilson(share, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson(1 - share, count) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_finite_values_skips_nan_infinity_and_missing():
    rows = [{"step": 1, "a": NAN}, {"step": 2, "a": 3}, {"step": 3}, {"step": 4, "a": None}]
    steps, values = finite_values([*rows, {"step": 5, "a": -INF}, {"step": 6, "a": 0.5}], "a")
    assert (steps.tolist(), values.tolist()) == ([2, 6], [3, 0.5])
    assert [len(column) for column in finite_values([], "a")] == [0, 0]


def test_tenths_average_the_ends():
    assert tenths(np.arange(20.0)) == (0.5, 18.5)
    assert tenths(np.array([3.0, 7.0])) == (3.0, 7.0)
    assert tenths(np.array([3.0])) == (3.0, 3.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.00123, "0.00123"),
        (-0.12345, "-0.123"),
        (999.4, "999"),
        (12_345, "12,345"),
        (1e20, "1e+20"),
    ],
)
def test_numbers_are_short(value, text):
    assert format_number(value) == text
