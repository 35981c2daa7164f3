"""The command line: presets, what --help shows, and what is said of settings that cannot be."""

import re
import subprocess
import sys

import pytest
import torch

from grpo_kernels import LossConfig
from reference import train
from reference.training.command_line import PRESETS, parse_command_line
from reference.training.config import SECTIONS, TrainConfig
from reference.training.errors import UserError
from reference.training.model import load as models


def test_flags_override_the_preset():
    assert parse_command_line(["--preset", "tiny"]) == PRESETS["tiny"]
    config = parse_command_line(["--steps", "7", "--preset", "tiny", "--epsilon-high", "0.3"])
    assert (config.steps, config.epsilon_high, config.model) == (7, 0.3, "scratch")
    assert config.loss_config().epsilon_high == 0.3
    assert parse_command_line([]) == PRESETS["smollm2-135m"]


def test_task_options_are_json_or_text():
    config = TrainConfig(task_option=("a=2", "b=[1, 2]", "c=x=y"))
    assert config.task_settings() == {"a": 2, "b": [1, 2], "c": "x=y"}
    with pytest.raises(UserError, match="--task-option must be name=value; got a"):
        TrainConfig(task_option=("a",)).task_settings()


def test_every_flag_has_a_line_of_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        train.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for name in TrainConfig.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text
    assert "Completions sampled per question" in text


def help_lines(capsys, monkeypatch):
    """Return the lines of --help without the frames of its panels, in a wide terminal."""
    monkeypatch.setenv("COLUMNS", "110")
    with pytest.raises(SystemExit):
        parse_command_line(["--help"])
    return [line.strip("│╭╮─ ") for line in capsys.readouterr().out.splitlines()]


def test_help_names_every_objective_and_its_source(capsys, monkeypatch):
    lines = help_lines(capsys, monkeypatch)
    for name in LossConfig.objectives():
        line = next(line for line in lines if line.startswith(name + ": "))
        assert re.search(r"\(arXiv:\d{4}\.\d{5}|TRL|Williams, 1992|IcePop, 2025", line)


def test_help_sections_are_in_the_order_of_a_step(capsys, monkeypatch):
    lines = help_lines(capsys, monkeypatch)
    titles = [line for line in lines if line.endswith("options")]
    assert titles == ["options", *(f"{name} options" for name in SECTIONS)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--group-size", "1"], "--group-size must be at least 2; got 1"),
        (["--steps", "0"], "--steps must be at least 1; got 0"),
        (["--temperature", "0"], "--temperature must be a positive number; got 0"),
        (["--learning-rate", "nan"], "--learning-rate must be a positive number; got nan"),
        (["--minibatches", "17"], "--minibatches must be at most --prompts; got 17"),
        (["--overlong-buffer", "7"], "--overlong-buffer must be below --max-new-tokens; got 7"),
        (["--reference-refresh", "5"], "--reference-refresh needs a reference"),
        (["--kl-estimator", "k3+"], "--kl-estimator estimates a KL that counts nothing"),
        (["--normalise-each-reward", "--loss", "dr_grpo"], "--loss dr_grpo divides by no standard"),
        (["--normalise-each-reward", "--overlong-buffer", "3"], "--normalise-each-reward would"),
        (["--chat", "--eval-only"], "--chat and --eval-only: choose one"),
        (["--lora-alpha", "0"], "--lora-alpha must be a positive number; got 0"),
        (["--step-reward", "nosuch.py:f"], "reward 'nosuch.py:f': there is no file nosuch.py"),
        (["--step-reward", "a.b", "--dynamic-sampling", "1"], "--dynamic-sampling looks at whole"),
        (["--lora-rank", "4"], "--lora-rank adapts a trained model"),
        (["--task", "arithmetic"], "--model scratch learns --task reverse only"),
        (["--beta", "-1"], "--beta must be at least 0; got -1"),
        (["--ratio-cap", "2"], "--loss grpo: --ratio-cap is read by --surrogate 'cispo' or 'dppo'"),
        (["--loss", "vespo", "--ratio-level", "sequence"], "--loss vespo: --surrogate 'vespo'"),
        (["--top-entropy", "2"], "--loss grpo: --top-entropy must be at most 1, got 2.0"),
        (["--advantage", "pass_at_k", "--pass-k", "9"], "--pass-k must be at most --group-size"),
        (["--pass-k", "1"], "--pass-k must be at least 2; got 1"),
        (["--advantage", "max_rl", "--overlong-buffer", "2"], "--advantage max_rl needs rewards"),
        (["--advantage", "batch", "--normalise-each-reward"], "--normalise-each-reward is an"),
        (
            ["--dynamic-sampling", "1", "--normalise-each-reward"],
            "--dynamic-sampling looks at sums of rewards: not with --normalise-each-reward",
        ),
        (["--entropy-target", "-1"], "--entropy-target must be at least 0; got -1"),
        (
            ["--entropy-target", "0.5", "--entropy-coef", "2"],
            "--entropy-coef-max must be at least the start, 2.0; got 1.0",
        ),
        (["--device", "cuda"], "--device cuda: PyTorch finds no such device here"),
    ],
)
def test_bad_settings_are_one_line_before_any_model_is_loaded(
    flags, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(models, "locate", lambda *_: pytest.fail("a model was looked for"))
    arguments = ["--preset", "tiny", "--output-dir", str(tmp_path / "run"), *flags]
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_shell_sees_exit_code_2_and_no_traceback(tmp_path):
    command = [sys.executable, train.__file__, "--preset", "tiny", "--group-size", "1"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "error: --group-size must be at least 2; got 1\n"
