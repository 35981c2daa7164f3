"""The training script: it learns, writes its files, and runs with every option."""

import json
import os
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo_kernels import LossConfig
from reference import train
from reference.training import warm_start as supervised
from reference.training.command_line import PRESETS
from reference.training.model import load as models
from reference.training.run import run_directory
from reference.training.update.learner import Learner
from tests.helpers.training_runs import write_parity_reward


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_curves(monkeypatch):
    """Draw no curves, which takes as long as several steps."""
    monkeypatch.setattr(train, "plot_dashboard", lambda *_: None)


@pytest.fixture
def float64_models(monkeypatch):
    """Load models in fp64: in fp32, rounding grows past 1e-4 in sixty supervised steps."""
    load = models.load

    def load_float64(*arguments):
        model, tokenizer = load(*arguments)
        return model.double(), tokenizer

    monkeypatch.setattr(models, "load", load_float64)


def tiny(directory, *flags, impl="reference"):
    arguments = ["--preset", "tiny", "--output-dir", str(directory), "--loss-impl", impl]
    return train.main([*arguments, "--eval-questions", "16", *flags])


CLOCKS = {"step_time", "rollout_time", "tokens_per_second", "memory_gib"}


def rows_of(directory):
    """Read the rows of steps; evaluations are other rows."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "reward" in row]


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "steps"), [(0, 700), (1, 350)])
def test_tiny_model_learns(tmp_path, no_curves, seed, steps):
    """Seed 1 does so in half of the preset's steps."""
    assert PRESETS["tiny"].steps == 700
    flags = ["--preset", "tiny", "--output-dir", str(tmp_path), "--loss-impl", "reference"]
    flags += ["--no-tensorboard", "--seed", str(seed), "--steps", str(steps)]
    assert train.main(flags) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["before"]["lenient"] < 0.6 and summary["after"]["lenient"] >= 0.85


def test_run_writes_its_files(tmp_path, tiny_model, capsys):
    assert tiny(tmp_path, "--model", tiny_model, "--steps", "3") == 0
    names = {path.name for path in tmp_path.iterdir() if "tfevents" not in path.name}
    assert names == {
        "settings.json", "metrics.jsonl", "completions.txt", "curves.png", "summary.json", "model",
        "checkpoints",
    }  # fmt: skip
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["reward"] == pytest.approx(row["rewards/exact/mean"])
        assert row["reward"] == pytest.approx(row["accuracy/strict"])
        assert 0 <= row["completions/clipped_ratio"] <= 1
        assert 1 <= row["completions/mean_length"] <= 7
        assert row["learning_rate"] == pytest.approx(4e-4 * row["step"] / 20)
    assert rows[2]["num_tokens"] > rows[0]["num_tokens"] >= 256 * (7 + 1)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    printed = capsys.readouterr().out
    assert (
        "VALUE says nothing about progress" in printed
        and "before" in printed
        and "after" in printed
    )


@pytest.mark.parametrize("backend", ["pytorch"], indirect=True)
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], marks=pytest.mark.slow),
        ["--inner-iterations", "2", "--beta", "0.05"],
    ],
)
def test_fused_and_reference_losses_give_the_same_run(
    tmp_path, float64_models, no_curves, backend, flags, monkeypatch
):
    """They also share the warm start, of four steps, after which only parity earns rewards."""
    monkeypatch.setattr(supervised, "TARGET", 0.0)
    flags = ["--steps", "3", "--reward", write_parity_reward(tmp_path), *flags]
    assert tiny(tmp_path / "fused", *flags, impl="fused") == 0
    assert tiny(tmp_path / "reference", *flags, impl="reference") == 0
    assert all(row["reward_std"] > 0 for row in rows_of(tmp_path / "fused"))
    for ours, expected in zip(
        rows_of(tmp_path / "fused"), rows_of(tmp_path / "reference"), strict=True
    ):
        assert ours.keys() == expected.keys()
        for name in ours.keys() - CLOCKS:
            assert ours[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-8), name


def test_unusable_output_dir_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "locate", lambda *_: pytest.fail("a model was looked for"))
    (tmp_path / "file").write_text("mine")
    assert tiny(tmp_path) == 2
    assert "is not empty" in capsys.readouterr().err
    assert tiny(tmp_path / "file") == 2
    assert tiny(tmp_path / "file" / "below") == 2
    error = capsys.readouterr().err
    assert error.count("error: cannot write to the output directory") == 2
    assert (tmp_path / "file").read_text() == "mine"


def test_model_directory_without_weights_is_refused(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    assert tiny(tmp_path / "run", "--model", str(tmp_path / "model")) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_nan_reward_is_named_and_no_model_is_saved(tmp_path, tiny_model, capsys):
    source = tmp_path / "broken.py"
    source.write_text(
        "def nothing(prompts, completions, answers):\n    return [float('nan')] * len(answers)\n"
    )
    reward = ["--reward", f"{source}:nothing"]
    assert tiny(tmp_path / "run", "--model", tiny_model, *reward) == 2
    error = capsys.readouterr().err
    assert "gave nan, not a finite number, for the completion" in error
    assert not (tmp_path / "run" / "model").exists()


def test_interrupted_run_saves_its_model(tmp_path, tiny_model, no_curves, monkeypatch, capsys):
    step = Learner.step

    def interrupted(learner, *arguments):
        if learner.steps == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(learner, *arguments)

    monkeypatch.setattr(Learner, "step", interrupted)
    assert tiny(tmp_path, "--model", tiny_model) == 130
    assert "stopped by Ctrl-C" in capsys.readouterr().err
    assert not (tmp_path / "summary.json").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert len(rows_of(tmp_path)) == 2


def test_default_output_dirs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        directory = run_directory.make_run_directory(PRESETS["tiny"])
        (directory / "metrics.jsonl").touch()
        names.append(directory.as_posix())
    stem = "runs/tiny-reverse-seed0"
    assert names == [stem, stem + "-2", stem + "-3"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--dynamic-sampling", "2", "--minibatches", "2", "--inner-iterations", "2"],
        ["--mask-truncated", "--overlong-buffer", "3", "--loss", "dapo", "--micro-batch", "4"],
        ["--beta", "0.1", "--kl-estimator", "k3+", "--reference-refresh", "2", "--loss", "gspo"],
        ["--reward-weight", "exact=2", "--eval-every", "2", "--pass-at", "4"],
        ["--gradient-checkpointing", "--advantage", "opo", "--aggregation", "prompt_mean"],
        ["--advantage", "ema", "--loss", "m2po", "--minibatches", "2", "--rejection", "token_k2=1"],
        ["--nll-coef", "0.1", "--loss", "topr"],
        ["--advantage", "pass_at_k", "--entropy-target", "1", "--micro-batch", "8"],
        ["--advantage", "centered", "--loss", "cispo", "--top-entropy", "0.2"],
        ["--normalise-each-reward", "--loss", "luspo"],
        ["--top-p", "0.8", "--top-k", "9", "--beta", "0.1", "--pass-at", "4", "--minibatches", "2"],
        ["--min-p", "0.1", "--no-support", "--sampler", "generate"],
    ],
    ids=" ".join,
)
def test_train_with_options(flags, tmp_path, tiny_model, no_curves):
    start = ["--model", tiny_model, "--steps", "3", "--no-tensorboard"]
    assert tiny(tmp_path, *start, *flags) == 0
    assert len(rows_of(tmp_path)) == 3
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert ("pass@4" in summary["after"]) == ("--pass-at" in flags)


@pytest.mark.parametrize("backend", ["pytorch"], indirect=True)
@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("loss", LossConfig.objectives())
def test_train_every_loss(backend, loss, impl, tmp_path, tiny_model, no_curves):
    flags = ["--model", tiny_model, "--steps", "1", "--eval-questions", "8", "--prompts", "4"]
    flags += ["--no-tensorboard", "--inner-iterations", "2", "--loss", loss]
    assert tiny(tmp_path, *flags, impl=impl) == 0
    (row,) = rows_of(tmp_path)
    assert row["grad_norm"] > 0 and None not in row.values()


def test_lora_is_merged_when_saved(tmp_path, tiny_model, no_curves):
    flags = ["--model", tiny_model, "--steps", "2", "--lora-rank", "4", "--beta", "0.1"]
    assert tiny(tmp_path, *flags, "--learning-rate", "0.01") == 0
    assert {"kl", "entropy"} <= rows_of(tmp_path)[-1].keys()
    before, after = (
        AutoModelForCausalLM.from_pretrained(directory).state_dict()
        for directory in (tiny_model, tmp_path / "model")
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_eval_only_and_chat(tmp_path, tiny_model, no_curves, monkeypatch, capsys):
    assert tiny(tmp_path / "run", "--model", tiny_model, "--steps", "1") == 0
    after = json.loads((tmp_path / "run" / "summary.json").read_text())["after"]
    model = ["--model", str(tmp_path / "run" / "model"), "--output-dir", str(tmp_path / "none")]
    flags = ["--eval-only", "--eval-questions", "16"]
    assert train.main(["--preset", "tiny", *flags, *model]) == 0
    assert f"lenient {after['lenient']:.1%}" in capsys.readouterr().out.splitlines()[-1]
    lines = iter(["123456=", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert train.main(["--preset", "tiny", "--chat", "--top-p", "0.5", *model]) == 0
    assert "model> " in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
