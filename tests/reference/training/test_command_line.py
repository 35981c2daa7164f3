"""The command line: presets, --help, and errors in settings."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from grpo_kernels import LossConfig
from reference import train
from reference.training.command_line import FIRST, PRESETS, TASK_DEFAULTS, parse_command_line
from reference.training.config import SECTIONS, TrainConfig
from reference.training.errors import UserError
from reference.training.model import load as models
from reference.training.model.policy import Policy
from reference.training.run import plots
from tests.helpers.training_runs import tiny


def test_flags_override_the_preset():
    assert parse_command_line(["--preset", "tiny"]) == PRESETS["tiny"]
    config = parse_command_line(["--steps", "7", "--preset", "tiny", "--epsilon-high", "0.3"])
    assert (config.steps, config.epsilon_high, config.model) == (7, 0.3, "scratch")
    assert config.loss_config().epsilon_high == 0.3
    assert parse_command_line([]) == PRESETS["smollm2-135m"]


@pytest.mark.parametrize("preset", ["smollm2-135m", "llama-3.2-1b"])
def test_one_question_has_defaults_of_its_own(preset):
    start = ["--preset", preset, "--task", "capital-of-brazil"]
    assert parse_command_line(start) == replace(
        PRESETS[preset], task="capital-of-brazil", **TASK_DEFAULTS["capital-of-brazil"]
    )
    assert parse_command_line([*start, "--group-size", "4"]).group_size == 4


def test_a_teacher_replaces_the_loss_of_the_preset():
    flags = ["--preset", "llama-3.2-1b", "--teacher", "runs/x/model", "--group-size", "1"]
    config = parse_command_line(flags)
    assert (config.loss, config.group_size, config.teacher) == ("grpo", 1, "runs/x/model")
    assert config.loss_config() == LossConfig.grpo()


@pytest.mark.parametrize("flag", ["--teacher-coef", "--teacher_coef"])
def test_with_a_coefficient_a_teacher_is_added_to_the_loss_of_the_preset(flag):
    start = ["--preset", "llama-3.2-1b", "--teacher", "runs/x/model", flag, "0.5"]
    config = parse_command_line([*start, "--distill", "forward", "--dynamic-sampling", "2"])
    assert config.loss_config() == LossConfig.dapo(beta=0.5, kl_estimator="forward")
    config = parse_command_line([*start, "--loss", "bnpo", "--advantage", "leave_one_out"])
    assert config.loss_config() == LossConfig.distillation(beta=0.5)


def test_task_options_are_json_or_text():
    config = TrainConfig(task_option=("a=2", "b=[1, 2]", "c=x=y"))
    assert config.task_settings() == {"a": 2, "b": [1, 2], "c": "x=y"}
    with pytest.raises(UserError, match="--task-option must be name=value; got a"):
        TrainConfig(task_option=("a",)).task_settings()


def test_every_flag_has_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        train.main(["--help", "all"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for name in TrainConfig.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text
    assert "Completions sampled per question" in text


def help_lines(capsys, monkeypatch):
    """Return the lines of --help all without the frames of its panels, in a wide terminal."""
    monkeypatch.setenv("COLUMNS", "110")
    with pytest.raises(SystemExit):
        parse_command_line(["--help", "all"])
    return [line.strip("│╭╮─ ") for line in capsys.readouterr().out.splitlines()]


def test_help_names_every_objective_and_its_source(capsys, monkeypatch):
    lines = help_lines(capsys, monkeypatch)
    for name in LossConfig.objectives():
        line = next(line for line in lines if line.startswith(name + ": "))
        assert re.search(r"\(arXiv:\d{4}\.\d{5}|TRL|Williams, 1992|IcePop, 2025|prime-rl", line)


def test_help_sections_are_in_the_order_of_a_step(capsys, monkeypatch):
    lines = help_lines(capsys, monkeypatch)
    titles = [line for line in lines if line.endswith("options")]
    assert titles == ["options", *(f"{name} options" for name in SECTIONS)]


@pytest.mark.parametrize("preset", PRESETS)
def test_help_shows_the_main_flags_with_the_defaults_of_the_preset(preset, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_:
        train.main(["--preset", preset, "-h"])
    assert exit_.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 80
    shown = re.findall(r"^  --(\S+)(?: (\S+))?", "\n".join(lines), re.M)
    assert len(shown) == len(FIRST) + 1
    assert "  --loss" in "\n".join(lines) and "dapo, " in "\n".join(lines)
    for flag, value in shown:
        default = getattr(PRESETS[preset], flag.replace("-", "_"))
        assert default in (False, ()) or value == str(default)


def test_help_does_not_wait_for_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from reference import train; train.main(['--help'])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--group-size", "1"], "--group-size must be at least 2; got 1"),
        (["--steps", "0"], "--steps must be at least 1; got 0"),
        (["--temperature", "0"], "--temperature must be a positive number; got 0"),
        (["--learning-rate", "nan"], "--learning-rate must be a positive number; got nan"),
        (["--minibatches", "33"], "--minibatches must be at most --prompts; got 33"),
        (["--overlong-buffer", "7"], "--overlong-buffer must be below --max-new-tokens; got 7"),
        (["--reference-refresh", "5"], "--reference-refresh needs a reference"),
        (
            ["--stale-sampler"],
            "--stale-sampler, --weights-dir and --sampler-timeout concern a server",
        ),
        (
            ["--weights-dir", "x"],
            "--stale-sampler, --weights-dir and --sampler-timeout concern a server",
        ),
        (
            ["--sampler-timeout", "9"],
            "--stale-sampler, --weights-dir and --sampler-timeout concern a server",
        ),
        (
            ["--sampler", "http://x", "--stale-sampler", "--weights-dir", "x"],
            "--weights-dir passes on new weights, and --stale-sampler does without: choose one",
        ),
        (["--sampler-timeout", "0"], "--sampler-timeout must be a positive number; got 0"),
        (["--kl-estimator", "k3+"], "--kl-estimator estimates a KL that counts nothing"),
        (["--normalise-each-reward", "--loss", "dr_grpo"], "--loss dr_grpo divides by no standard"),
        (["--normalise-each-reward", "--overlong-buffer", "3"], "--normalise-each-reward would"),
        (["--chat", "--eval-only"], "--chat and --eval-only: choose one"),
        (["--lora-alpha", "0"], "--lora-alpha must be a positive number; got 0"),
        (["--step-reward", "nosuch.py:f"], "reward 'nosuch.py:f': there is no file nosuch.py"),
        (["--step-reward", "a.b", "--dynamic-sampling", "1"], "--dynamic-sampling compares whole"),
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
        (
            ["--dynamic-sampling", "1", "--advantage", "ema"],
            "--dynamic-sampling replaces groups of equal rewards, from which --advantage ema",
        ),
        (["--ema-decay", "1"], "--ema-decay must be at least 0 and below 1; got 1.0"),
        (["--entropy-target", "-1"], "--entropy-target must be at least 0; got -1"),
        (
            ["--entropy-target", "0.5", "--entropy-coef", "2"],
            "--entropy-coef-max must be at least the start, 2.0; got 1.0",
        ),
        (["--max-completion-length", "99"], "--max-completion-length is the denominator of"),
        (["--device", "cuda"], "--device cuda: PyTorch finds no such device here"),
    ],
)
def test_bad_settings_are_refused_before_a_model_is_loaded(
    flags, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(models, "locate", lambda *_: pytest.fail("a model was looked for"))
    arguments = ["--preset", "tiny", "--output-dir", str(tmp_path / "run"), *flags]
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_output_beyond_the_encoding_of_stdout_is_escaped():
    code = (
        "import sys; from reference import train; from tqdm import tqdm\n"
        "def run(config, _): print('שלום'); tqdm.write('Brasília \\ud800', sys.stdout)\n"
        "train.run = run; sys.exit(train.main([]))"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [rb"\u05e9\u05dc\u05d5\u05dd", rb"Bras\xedlia \ud800"]


@pytest.mark.parametrize("run", ["train.parse_command_line(['--help'])", "print('trained')"])
def test_a_reader_that_has_gone_ends_the_run_with_one_line(run):
    code = (
        "import sys; from reference import train\n"
        f"train.run = lambda *_: {run}\n"
        "sys.exit(train.main([]))"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"stopped: the reader of the output has gone\n"
    assert process.returncode == 141


def test_user_error_exits_with_2_without_traceback(tmp_path):
    command = [sys.executable, train.__file__, "--preset", "tiny", "--group-size", "1"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "error: --group-size must be at least 2; got 1\n"


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(Policy, "load", lambda *_, **__: pytest.fail("a model was loaded"))


EARLY = {
    "--task revers --model x": "error: --task revers: expected one of arithmetic, reverse",
    "--task jsonl --data nowhere.jsonl --model x": "error: cannot read nowhere.jsonl",
    "--reward nowhere.py:f": "error: reward 'nowhere.py:f': there is no file nowhere.py",
    "--sampler vlm": "error: --sampler must be shared-prompt",
    "--top-k 1": "error: --top-k 1 and --min-p 1 keep one token, whose log-prob is always 0",
    "--min-p 1": "error: --top-k 1 and --min-p 1 keep one token",
    "--top-k -1": "error: --top-k must be at least 0; got -1",
    "--top-p 0": "error: --top-p must be above 0 and at most 1; got 0",
    "--min-p nan": "error: --min-p must be 0 to 1; got nan",
    "--no-support": "error: --no-support concerns --top-k, --top-p and --min-p: set one of them",
    "--sampler continuous --top-p 0.8": "error: --sampler continuous does not return the tokens",
    "--sampler continuous --min-p 0.1 --no-support": "error: --min-p: the continuous batching of",
    "--teacher x --beta 0.1 --advantage batch --overlong-buffer 2": "error: --teacher: the loss is "
    "the divergence from the teacher, without rewards: not with --overlong-buffer, --advantage, "
    "--beta",
    "--teacher x --top-k 9 --no-support": "error: --teacher: the loss is the divergence from the "
    "teacher, without rewards: not with --no-support",
    "--teacher x --teacher-coef 0.5 --beta 0.1 --reference-refresh 2": "error: --teacher-coef: the "
    "KL in the loss is that to the teacher, and not to a reference policy: not with --beta, "
    "--reference-refresh",
    "--teacher x --teacher-coef 1 --distill jsd": "error: --teacher-coef adds a KL to the loss of "
    "the rewards: set --distill reverse or forward",
    "--teacher x --teacher-coef 1 --group-size 1": "error: --group-size must be at least 2; got 1",
    "--teacher x --teacher-coef 0": "error: --teacher-coef must be a positive number; got 0.0",
    "--teacher-coef 0.5": "error: --teacher-coef is the weight of the KL to a --teacher: name one",
    "--teacher runs/none": "error: --teacher runs/none: there is no such directory",
    "--teacher mine": "error: mine is not a model directory: it has no config.json",
    "--teacher scratch": "error: --teacher scratch has learnt nothing: name a directory",
    "--jsd-weight 0.3": "error: --jsd-weight is the weight of the teacher in --distill jsd",
    "--distill forward": "error: --distill chooses the divergence from a --teacher: name one",
    "--epsilon-low -1": "error: --loss grpo: --epsilon-low",
    "--output-dir mine": "error: --output-dir mine is not empty: name a new one, or leave the flag "
    "out; or go on with its run by --resume mine, or replace it by --overwrite",
    "--output-dir mine --overwrite": "error: --overwrite: mine is not empty, and not the directory",
    "--overwrite": "error: --overwrite replaces the run in --output-dir: name one",
    "--output-dir mine/file": "error: cannot write to the output directory mine/file: File exists",
    "--resume mine": "error: --resume mine is not the directory of a run",
    "--resume min": "error: --resume min is not the directory of a run: settings.json: No such "
    "file or directory; did you mean mine?",
}


@pytest.mark.parametrize("flags", EARLY)
def test_errors_are_found_before_a_model_is_loaded(flags, no_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    assert train.main(["--preset", "tiny", *flags.split()]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(EARLY[flags])
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "file"]


def test_missing_matplotlib_is_found_before_a_model_is_loaded(
    no_model, tmp_path, monkeypatch, capsys
):
    def missing():
        raise UserError("the curves need matplotlib")

    monkeypatch.setattr(train, "load_matplotlib", missing)
    assert plots.load_matplotlib() is None
    assert tiny(tmp_path / "run") == 2
    assert capsys.readouterr().err == "error: the curves need matplotlib\n"


def test_chat_has_a_temperature_of_its_own_unless_it_is_given():
    assert parse_command_line([]).temperature == 1.0
    assert parse_command_line(["--chat"]).temperature == 0.7
    assert parse_command_line(["--chat", "--temperature", "1.0"]).temperature == 1.0
