"""A stopped run resumes bit for bit as if it had not been stopped."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, LlamaForCausalLM

from reference import train
from reference.training.command_line import parse_command_line
from reference.training.distributed import SINGLE_PROCESS
from reference.training.errors import UserError
from reference.training.model import load as models
from reference.training.run import checkpoint, resume, run_log, training_state
from reference.training.run.graceful_shutdown import Stopped
from reference.training.run.resume import load_settings
from reference.training.run.training_state import digest_frozen_weights
from reference.training.update.learner import Learner
from reference.training.update.micro_batches import MicroBatchSplitter
from tests.helpers.learner import make_learner
from tests.helpers.training_runs import left_by, tiny

ROOT = Path(__file__).parents[4]
KILL_RUN = ROOT / "tests" / "helpers" / "kill_run.py"
FLAGS = ["--minibatches", "2", "--inner-iterations", "2", "--entropy-target", "1", "--beta", "0.1"]
FLAGS += ["--reference-refresh", "3", "--print-every", "2", "--learning-rate", "1e-3"]
FLAGS += ["--top-p", "0.9"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Draw no curves."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(train, "plot_dashboard", lambda *_: None)
    yield
    torch.set_num_threads(threads)


def again(directory, *flags):
    return train.main(["--resume", str(directory), *flags])


def steps(directory):
    return checkpoint.Checkpoints(directory, 1).steps()


@pytest.fixture(scope="module")
def started(tmp_path_factory, tiny_model):
    """Make a run of two steps."""
    directory = tmp_path_factory.mktemp("started") / "run"
    assert tiny(directory, "--model", tiny_model, "--steps", "2") == 0
    return directory


def test_resumed_run_matches_an_uninterrupted_run_bit_for_bit(tmp_path, tiny_model):
    flags = ["--model", tiny_model, *FLAGS]
    assert tiny(tmp_path / "whole", *flags, "--steps", "5") == 0
    assert tiny(tmp_path / "parts", *flags, "--steps", "2") == 0
    assert again(tmp_path / "parts", "--steps", "5") == 0
    assert left_by(tmp_path / "parts") == left_by(tmp_path / "whole")
    for kind in checkpoint.KINDS:
        whole, parts = (
            load_file(tmp_path / each / "checkpoints" / "step-000005" / f"{kind}.safetensors")
            for each in ("whole", "parts")
        )
        assert whole.keys() == parts.keys() and whole
        assert all(torch.equal(whole[name], parts[name]) for name in whole), kind
    settings = [
        json.loads((tmp_path / x / "settings.json").read_text()) for x in ("whole", "parts")
    ]
    assert settings[0] | {"output_dir": settings[1]["output_dir"]} == settings[1]


def test_lora_checkpoint_has_only_the_adapter(tmp_path, tiny_model):
    flags = ["--model", tiny_model, "--lora-rank", "4", "--beta", "0.1"]
    flags += ["--learning-rate", "0.01"]
    assert tiny(tmp_path / "whole", *flags, "--steps", "4") == 0
    assert tiny(tmp_path / "parts", *flags, "--steps", "2") == 0
    saved = tmp_path / "parts" / "checkpoints" / "step-000002"
    assert all("lora_" in name for name in load_file(saved / "model.safetensors"))
    assert not (saved / "reference.safetensors").exists()
    assert again(tmp_path / "parts", "--steps", "4") == 0
    assert left_by(tmp_path / "parts") == left_by(tmp_path / "whole")


def test_lora_checkpoint_of_another_base_model_raises(tmp_path, tiny_model, capsys):
    """The directory of --model was replaced by other weights of the same shapes."""
    shutil.copytree(tiny_model, tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--steps", "1", "--lora-rank", "4"]
    assert tiny(tmp_path / "run", *flags) == 0
    models.from_scratch()[0].save_pretrained(tmp_path / "model")
    capsys.readouterr()
    assert again(tmp_path / "run", "--steps", "2") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said == (
        f"error: {tmp_path / 'run' / 'checkpoints' / 'step-000001'} is of another model: the "
        f"frozen weights of --model {tmp_path / 'model'} are not those that it was trained on"
    )


def test_distillation_resumes_bit_for_bit_with_its_teacher_only(tmp_path, tiny_model, capsys):
    shutil.copytree(tiny_model, tmp_path / "teacher")
    flags = ["--model", tiny_model, "--teacher", str(tmp_path / "teacher"), "--group-size", "1"]
    flags += ["--distill", "forward", "--learning-rate", "1e-3", "--lora-rank", "4"]
    assert tiny(tmp_path / "whole", *flags, "--steps", "3") == 0
    assert tiny(tmp_path / "parts", *flags, "--steps", "2") == 0
    shutil.copytree(tmp_path / "parts", tmp_path / "another")
    assert again(tmp_path / "parts", "--steps", "3") == 0
    left = left_by(tmp_path / "parts")
    assert left == left_by(tmp_path / "whole")
    assert not any("std" in name for row in left["metrics"] for name in row), "of one completion"
    models.from_scratch()[0].save_pretrained(tmp_path / "teacher")
    capsys.readouterr()
    assert again(tmp_path / "another", "--steps", "3") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said == (
        f"error: {tmp_path / 'another' / 'checkpoints' / 'step-000002'} had another teacher: the "
        f"weights of --teacher {tmp_path / 'teacher'} are not those that it was trained with"
    )


def test_digest_of_sharded_frozen_weights_matches_unsharded():
    """FSDP also shards weights that a model freezes itself."""
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    whole = digest_frozen_weights(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert digest_frozen_weights(model) == whole is not None
        model.bias.data.zero_()
        assert digest_frozen_weights(model) != whole
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model):
    """Return the output of a run of four steps."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert tiny(directory, "--model", tiny_model, "--steps", "4") == 0
    return left_by(directory)


@pytest.mark.parametrize(("owner", "name"), [(train, "collect_rollouts"), (Learner, "step")])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signal_saves(tmp_path, tiny_model, whole, owner, name, number, code, monkeypatch, capsys):
    """A signal drops a step that is sampling and completes a step that is learning."""
    original, calls = getattr(owner, name), []

    def stopped(*arguments):
        found = original(*arguments)
        calls.append(name)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return found

    before = [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopped)
        flags = ["--model", tiny_model, "--steps", "4", "--checkpoint-every", "None"]
        assert tiny(tmp_path / "run", *flags) == code
    saved = {"collect_rollouts": 2, "step": 3}[name]
    assert steps(tmp_path / "run") == [saved]
    said = capsys.readouterr().err
    line = f"python reference/train.py --resume {tmp_path / 'run'}"
    by = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[number]
    assert f"to go on after step {saved}: {line}\n" in said and f"stopped by {by}\n" in said
    when = {"collect_rollouts": "", "step": " after this step"}[name]
    again_stops = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
    assert f"stopping{when}{again_stops}\n" in said
    assert not (tmp_path / "run" / "summary.json").exists()
    assert [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)] == before
    assert again(tmp_path / "run") == 0
    assert left_by(tmp_path / "run") == whole


@pytest.mark.parametrize("moment", ["evaluate", "save_policy"])
def test_sigterm_after_the_last_step_saves_it(tmp_path, tiny_model, whole, moment, monkeypatch):
    original = getattr(train, moment)

    def terminated(*arguments):
        if (tmp_path / "metrics.jsonl").exists():  # the evaluation before the first step is over
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, moment, terminated)
        flags = ["--model", tiny_model, "--steps", "4", "--checkpoint-every", "None"]
        assert tiny(tmp_path, *flags) == 0
    assert steps(tmp_path) == [4] and not (tmp_path / "summary.json").exists()
    assert again(tmp_path) == 0
    assert left_by(tmp_path) == whole


def test_sigterm_after_the_last_evaluation_completes_the_run(
    tmp_path, tiny_model, whole, monkeypatch
):
    def terminated(*_):
        if (tmp_path / "model").exists():
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "plot_dashboard", terminated)
    assert tiny(tmp_path, "--model", tiny_model, "--steps", "4", "--checkpoint-every", "None") == 0
    assert left_by(tmp_path) == whole


def test_sigterm_before_the_first_step_leaves_nothing(tmp_path, monkeypatch, capsys):
    def terminated(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "warm_start", terminated)
    assert tiny(tmp_path / "run") == 0
    assert not (tmp_path / "run").exists()
    assert "stopped by SIGTERM" in capsys.readouterr().err


def test_signal_that_a_reward_catches_stops_after_sampling(tmp_path, tiny_model, whole, capsys):
    source = tmp_path / "catches.py"
    source.write_text(
        "import os, signal\n"
        "calls = []\n"
        "def zero(completions, **_):\n"
        "    calls.append(completions)  # the first call is the trial before the model is loaded\n"
        "    try:\n"
        f"        if len(calls) == 2 and os.path.exists({str(tmp_path / 'now')!r}):\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "    except:\n"
        "        pass\n"
        "    return [0.0] * len(completions)\n"
    )
    flags = ["--model", tiny_model, "--steps", "2", "--reward", f"{source}:zero"]
    assert tiny(tmp_path / "run", *flags) == 0
    (tmp_path / "now").touch()
    assert again(tmp_path / "run", "--steps", "4", "--reward", f"{source}:zero") == 130
    assert steps(tmp_path / "run") == [2]
    assert "to go on after step 2" in capsys.readouterr().err


@pytest.mark.parametrize("moment", ["warm_start", "evaluate"])
def test_signal_before_the_first_step_says_how_to_start_again(
    tmp_path, whole, tiny_model, moment, monkeypatch, capsys
):
    def stopped(*_):
        os.kill(os.getpid(), signal.SIGINT)

    flags = [] if moment == "warm_start" else ["--model", tiny_model]
    with monkeypatch.context() as patch:
        patch.setattr(train, moment, stopped)
        assert tiny(tmp_path / "run", *flags, "--steps", "4") == 130
    assert not (tmp_path / "run").exists()
    said = capsys.readouterr().err
    assert "no step was trained: start with the same command again\nstopped by Ctrl-C\n" in said


def test_signal_in_the_first_step_resumes_from_the_beginning(
    tmp_path, whole, tiny_model, monkeypatch, capsys
):
    def stopped(*_):
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train, "collect_rollouts", stopped)
        assert tiny(tmp_path, "--model", tiny_model, "--steps", "4") == 130
    line = f"no step is saved; to start it again: python reference/train.py --resume {tmp_path}\n"
    assert line in capsys.readouterr().err
    assert again(tmp_path) == 0
    assert f"{tmp_path} has no checkpoint yet: it starts from step 1\n" in capsys.readouterr().out
    assert left_by(tmp_path) == whole


def test_evaluation_that_was_dropped_is_made_up_for(tmp_path, tiny_model, monkeypatch):
    flags = ["--model", tiny_model, "--steps", "3", "--eval-every", "2"]
    assert tiny(tmp_path / "whole", *flags) == 0
    original, calls = train.evaluate, []

    def stopped(*arguments):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", stopped)
        assert tiny(tmp_path / "run", *flags) == 0
    assert steps(tmp_path / "run") == [2]
    assert again(tmp_path / "run") == 0
    assert left_by(tmp_path / "run") == left_by(tmp_path / "whole")


def test_signal_after_an_evaluation_was_written_logs_it_once(tmp_path, tiny_model, monkeypatch):
    flags = ["--model", tiny_model, "--steps", "3", "--eval-every", "2"]
    flags += ["--checkpoint-every", "None"]
    assert tiny(tmp_path / "whole", *flags) == 0
    original = run_log._append

    def stopped(path, text):
        original(path, text)
        if '"step": 2, "eval/' in text:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(run_log, "_append", stopped)
        assert tiny(tmp_path / "run", *flags) == 0
    assert steps(tmp_path / "run") == [2]
    assert again(tmp_path / "run") == 0
    assert left_by(tmp_path / "run") == left_by(tmp_path / "whole")


def test_record_that_a_signal_interrupts_changes_nothing(monkeypatch):
    learner, _ = make_learner()
    state = training_state.TrainingState(learner, random.Random(0), {}, {})
    before = json.dumps([state.state_dict()[name] for name in ("learner", "random")])
    torch_rng = state.tensors()["rng"]["cpu"].clone()
    torch.rand(1), state.order.random(), random.random()

    def stopped(**_):
        raise Stopped(signal.SIGINT)

    monkeypatch.setattr(np.random, "get_state", stopped)
    with pytest.raises(Stopped):
        state.record()
    assert json.dumps([state.state_dict()[name] for name in ("learner", "random")]) == before
    assert torch.equal(state.tensors()["rng"]["cpu"], torch_rng)


def test_damaged_checkpoint_is_skipped_and_replaced(
    tmp_path, tiny_model, whole, capsys, monkeypatch
):
    run = tmp_path / "run"
    flags = ["--model", tiny_model, "--checkpoint-every", "1", "--keep-checkpoints", "9"]
    with monkeypatch.context() as patch:  # as if killed before the end, which leaves one
        patch.setattr(checkpoint.Checkpoints, "prune", lambda self, last, keep: None)
        assert tiny(run, *flags, "--steps", "3") == 0
    damaged = run / "checkpoints" / "step-000003"
    (damaged / "rng.safetensors").write_bytes(b"")
    original = Learner.step

    def terminated(learner, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(learner, *arguments)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", terminated)
        assert again(run, "--steps", "4", "--checkpoint-every", "None") == 0
    said = capsys.readouterr()
    assert f"checkpoint {damaged} cannot be used: rng.safetensors is not what was" in said.err
    assert f"{run} goes on after step 2\n" in said.out and "to go on after step 3" in said.err
    assert again(run) == 0
    assert "cannot be used" not in capsys.readouterr().err
    assert left_by(run) == whole


def test_run_killed_before_its_first_checkpoint_restarts(tmp_path, tiny_model, started):
    run = tmp_path / "run"
    assert tiny(run, "--model", tiny_model, "--steps", "2", "--checkpoint-every", "None") == 0
    assert steps(run) == []
    (run / "metrics.jsonl").write_text('{"step": 9}\n')
    assert again(run) == 0
    assert left_by(run) == left_by(started)


FAILURES = {
    "sampler": (train, "collect_rollouts", RuntimeError("the sampler died"), 4),
    "server": (train, "collect_rollouts", UserError("the server is gone"), 4),
    "memory": (Learner, "step", MemoryError("no memory"), 4),
    "metrics": (run_log, "_append", UserError("the disk is full"), 5),
    "curves": (train, "plot_dashboard", OSError(28, "No space left on device"), 5),
}


@pytest.mark.parametrize("case", FAILURES)
def test_error_saves_a_checkpoint(tmp_path, tiny_model, case, monkeypatch, capsys):
    """An error in step 5. Lines that could not be logged are in the checkpoint."""
    owner, name, error, saved = FAILURES[case]
    flags = ["--model", tiny_model, "--steps", "7", "--print-every", "2", "--dashboard-every", "1"]
    assert tiny(tmp_path / "whole", *flags) == 0
    original = getattr(owner, name)

    def fails(*arguments):
        rows = tmp_path / "run" / "metrics.jsonl"
        logged = rows.read_text().count('"reward"') if rows.exists() else 0
        if logged == (5 if name == "plot_dashboard" else 4):
            raise error
        return original(*arguments)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        if isinstance(error, UserError | OSError):
            assert tiny(tmp_path / "run", *flags) == 2
        else:
            with pytest.raises(type(error)):
                tiny(tmp_path / "run", *flags)
    assert steps(tmp_path / "run") == [saved]
    line = f"to go on after step {saved}: python reference/train.py --resume {tmp_path / 'run'}\n"
    assert line in capsys.readouterr().err
    assert again(tmp_path / "run") == 0
    assert left_by(tmp_path / "run") == left_by(tmp_path / "whole")


def test_error_within_an_update_saves_no_checkpoint(tmp_path, tiny_model, monkeypatch, capsys):
    """Weights that one of two minibatches has changed are those of no step."""
    original, calls = Learner.update, []

    def fails(*arguments):
        calls.append(None)
        if len(calls) == 6:
            raise UserError("in the middle of step 3")
        return original(*arguments)

    flags = ["--model", tiny_model, "--minibatches", "2", "--checkpoint-every", "1"]
    monkeypatch.setattr(Learner, "update", fails)
    assert tiny(tmp_path, *flags) == 2
    assert steps(tmp_path) == [1, 2]
    assert "to go on after step 2" in capsys.readouterr().err


def test_failing_save_after_an_error_does_not_hide_the_error(
    tmp_path, tiny_model, monkeypatch, capsys
):
    def full(*_):
        raise OSError(28, "No space left on device")

    def fails(*arguments):
        if (tmp_path / "metrics.jsonl").read_text().count('"reward"') == 1:
            raise UserError("the reward failed")
        return original(*arguments)

    original = train.collect_rollouts
    monkeypatch.setattr(train, "collect_rollouts", fails)
    monkeypatch.setattr(checkpoint, "save_file", full)
    assert tiny(tmp_path, "--model", tiny_model) == 2
    said = capsys.readouterr().err
    assert "saving after the error failed: cannot write" in said
    assert "error: the reward failed\n" in said


@pytest.mark.parametrize(("cost", "every"), [(0.0, 2), (4.0, 2), (30.0, 7)])
def test_automatic_checkpoints_bound_the_work_that_a_kill_costs(tmp_path, cost, every, monkeypatch):
    """Steps take 50 seconds; at most two minutes are lost, and saving takes at most a tenth."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(training_state, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    saved = []

    def save(self, step, *_):
        saved.append(step)
        clock.now += cost

    monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
    learner, _ = make_learner(steps=100)
    state = training_state.TrainingState(learner, random.Random(0), {}, {})
    for _ in range(30):
        clock.now += 50.0
        state.advance(1)
        state.save_if_due(checkpoint.Checkpoints(tmp_path, 1), 50.0)
    assert saved[0] == 2 and set(np.diff(saved)) == {every}


def test_full_disk_for_a_checkpoint_is_reported_and_training_continues(
    tmp_path, tiny_model, monkeypatch, capsys
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert tiny(tmp_path, "--model", tiny_model, "--steps", "2") == 0
    path = tmp_path / "checkpoints" / "step-000002"
    said = f"no checkpoint of step 2: cannot write {path}: No space left on device; there is none\n"
    assert said in capsys.readouterr().err
    assert (tmp_path / "summary.json").exists()


def test_sigterm_on_a_full_disk_exits_2(tmp_path, tiny_model, monkeypatch, capsys):
    original = Learner.step

    def full(*_):
        raise OSError(28, "No space left on device")

    def terminated(learner, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(learner, *arguments)

    monkeypatch.setattr(Learner, "step", terminated)
    monkeypatch.setattr(checkpoint, "save_file", full)
    assert tiny(tmp_path, "--model", tiny_model) == 2
    path = tmp_path / "checkpoints" / "step-000001"
    assert f"error: cannot write {path}: No space left on device\n" in capsys.readouterr().err


WRONG = {
    "--learning-rate 1": "--learning-rate was 0.0004, not 1.0: these would make another run",
    "--prompts 4 --seed 1": "--prompts was 8, not 4, --seed was 0, not 1: these would make",
    "--task arithmetic --model x": "/model, not x, --task was reverse, not arithmetic: these",
    "--top-p 0.8": "--top-p was None, not 0.8: these",
    "--top-p 0.8 --no-support": "--top-p was None, not 0.8, --no-support was not set: these would",
    "--normalise-each-reward": ": --normalise-each-reward was not set: these would",
    "--steps 1": "has 2 steps behind it; got --steps 1",
    "--chat": "--resume goes on with training: for --chat and --eval-only name --model",
    "--overwrite --output-dir x": "--resume goes on with a run, and --overwrite removes it",
}


@pytest.mark.parametrize("flags", WRONG)
def test_changed_settings_raise(started, flags, monkeypatch, capsys):
    monkeypatch.setattr(train, "load_policy", lambda *_: pytest.fail("a model was loaded"))
    assert again(started, *flags.split()) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ") and WRONG[flags] in said


def test_load_settings(started):
    config = load_settings(started)
    assert config.output_dir == started and config.steps == 2 and config.reward == ()


@pytest.mark.parametrize("name", ["cache_dir", "weights_dir"])
def test_directories_that_a_run_names_are_ignored(tmp_path, started, name):
    found = json.loads((started / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps(found | {name: "/elsewhere"}))
    assert getattr(load_settings(tmp_path), name) is None
    config = parse_command_line(["--resume", str(tmp_path), "--cache-dir", "mine"])
    assert resume.how_to_go_on(config, checkpoint.Checkpoints(tmp_path, 1)).endswith(
        f"--resume {tmp_path} --cache-dir mine"
    )


@pytest.mark.parametrize(
    "flags", [["--top-entropy", "0.2"], ["--loss", "clip_covariance"], ["--kl-cov", "0.1"]]
)
def test_micro_batch_may_not_change_with_a_batch_filter(flags, tmp_path):
    if "--kl-cov" in flags:
        flags = [*flags, "--inner-iterations", "2"]
    start = ["--preset", "tiny", "--output-dir", str(tmp_path)]
    for more, refused in ((flags, True), ([], False)):
        saved = parse_command_line([*start, *more]).as_json()
        (tmp_path / "settings.json").write_text(json.dumps(saved))
        config = parse_command_line(["--resume", str(tmp_path), "--micro-batch", "4"])
        if refused:
            with pytest.raises(UserError, match="--micro-batch was None, not 4: these would make"):
                resume.check_settings_match(config, saved, 0)
        else:
            resume.check_settings_match(config, saved, 0)


def test_code_of_a_run_must_be_named_on_the_command_line(tmp_path, tiny_model, capsys):
    source = tmp_path / "own.py"
    source.write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "def short(prompts, completions, answers):\n    return [0.5] * len(answers)\n"
    )
    reward = ["--reward", f"{source}:short"]
    assert tiny(tmp_path / "run", "--model", tiny_model, "--steps", "1", *reward) == 0
    (tmp_path / "ran").unlink()
    capsys.readouterr()
    assert again(tmp_path / "run", "--steps", "2") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said == (
        f"error: --resume {tmp_path / 'run'}: code is run only where the command line names it; "
        f"if you trust it, add --reward {source}:short"
    )
    assert not (tmp_path / "ran").exists()
    assert again(tmp_path / "run", "--steps", "2", *reward) == 0
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not the directory of a run: settings.json: No such file or directory"),
        ("{", "settings.json is not JSON"),
        ("[]", "settings.json holds no settings"),
        ('{"steps": 3}', "settings.json holds no settings"),
        (
            '{"model": "scratch", "task": "reverse", "colour": 1, "size": 2}',
            "its settings are of another version, and this one has no colour, size",
        ),
    ],
)
def test_directory_without_a_run_raises(tmp_path, text, message, capsys):
    if text is not None:
        (tmp_path / "settings.json").write_text(text)
    assert again(tmp_path) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: --resume {tmp_path}") and message in said


def test_settings_that_a_run_is_older_than_have_their_defaults(tmp_path, started, capsys):
    found = json.loads((started / "settings.json").read_text())
    for name in ("accept_changes", "ema_decay", "kl_cov_coef", "reward", "seed", "support"):
        del found[name]
    (tmp_path / "settings.json").write_text(json.dumps(found))
    config = replace(load_settings(tmp_path), resume=tmp_path)
    assert (config.ema_decay, config.kl_cov_coef, config.seed, config.reward) == (0.9, None, 0, ())
    assert config.support
    capsys.readouterr()
    resume.check_settings_match(config, found, 2)
    assert capsys.readouterr().out == (
        f"{tmp_path} is older than some settings, which have their defaults: --accept-changes "
        "False, --ema-decay 0.9, --kl-cov-coef None, --reward [], --seed 0, --support True\n"
    )
    with pytest.raises(UserError, match=r"--ema-decay was 0\.9, not 0\.5: these would"):
        resume.check_settings_match(replace(config, ema_decay=0.5), found, 2)


def test_state_without_a_reward_baseline_loads():
    learner, _ = make_learner()
    state = learner.state_dict()
    del state["reward_baseline"]
    learner.load_state_dict(state | {"steps": 3})
    assert learner.steps == 3


def test_settings_of_the_wrong_type_raise(tmp_path, started, capsys):
    found = json.loads((started / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps(found | {"steps": "many"}))
    assert again(tmp_path) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "settings.json is damaged" in said


def test_deeply_nested_settings_raise(tmp_path, capsys):
    (tmp_path / "settings.json").write_text("[" * 100_000)
    assert again(tmp_path) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "settings.json is not JSON" in said


def test_suggested_flags_are_quoted(tmp_path):
    start = ["--preset", "tiny", "--output-dir", str(tmp_path)]
    saved = parse_command_line([*start, "--reward", "my file.py:f;g"]).as_json()
    (tmp_path / "settings.json").write_text(json.dumps(saved))
    config = parse_command_line(["--resume", str(tmp_path)])
    with pytest.raises(UserError, match=r"if you trust it, add --reward 'my file\.py:f;g'$"):
        resume.check_settings_match(config, saved, 0)


def test_checkpoint_with_other_weight_shapes_raises(tmp_path, tiny_model, capsys):
    """The directory of --model was replaced by another model."""
    shutil.copytree(tiny_model, tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--steps", "1"]
    assert tiny(tmp_path / "run", *flags) == 0
    config = AutoConfig.from_pretrained(tiny_model)
    config.intermediate_size = 96
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    capsys.readouterr()
    assert again(tmp_path / "run", "--steps", "2") == 2
    error = capsys.readouterr().err
    assert "is of another model: model.layers.0.mlp.gate_proj.weight is [128, 64] in" in error
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_micro_batch_that_was_halved_stays_so(capsys):
    half = MicroBatchSplitter(None)
    half.size, half.halved = 4, True
    told = "micro-batches of 4 questions, since memory did not suffice for more\n"
    for given, expected, said in ((None, 4, told), (8, 4, told), (4, 4, ""), (2, 2, "")):
        later = MicroBatchSplitter(given)
        later.load_state_dict(half.state_dict())
        assert later.size == expected and later.halved
        assert capsys.readouterr().out == said
    later = MicroBatchSplitter(8)
    later.load_state_dict(MicroBatchSplitter(16).state_dict())
    assert later.size == 8 and not later.halved


@pytest.fixture
def torchrun(monkeypatch):
    """Set the environment of a torchrun worker, by default on one node."""

    def setting(**more):
        found = {"RUN_ID": "none", "RESTART_COUNT": "0", "MAX_RESTARTS": "1"} | more
        for name, value in found.items():
            monkeypatch.setenv(f"TORCHELASTIC_{name}", value)

    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    setting()
    return setting


def test_torchrun_restart_resumes_and_first_start_does_not(tmp_path, torchrun, monkeypatch):
    flags = ["--preset", "tiny", "--output-dir", str(tmp_path), "--overwrite"]
    config = parse_command_line(flags)
    goes_on = replace(config, resume=tmp_path, overwrite=False)
    assert resume.resume_after_torchrun_restart(config, SINGLE_PROCESS) == config
    resume.record_torchrun_run(tmp_path)
    assert resume.resume_after_torchrun_restart(config, SINGLE_PROCESS) == config
    torchrun(RESTART_COUNT="1")
    assert resume.resume_after_torchrun_restart(config, SINGLE_PROCESS) == goes_on
    torchrun(RUN_ID="another")
    assert resume.resume_after_torchrun_restart(config, SINGLE_PROCESS) == config
    # Of several nodes each counts its own failures: here another one had it.
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    torchrun()
    assert resume.resume_after_torchrun_restart(config, SINGLE_PROCESS) == goes_on


def test_torchrun_with_a_reused_process_number_is_not_a_restart(tmp_path, torchrun, monkeypatch):
    """In a restarted container the run id and the process number may be the same."""
    config = parse_command_line(["--preset", "tiny", "--output-dir", str(tmp_path), "--overwrite"])
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    resume.record_torchrun_run(tmp_path)
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: 0.0)
    assert resume.resume_after_torchrun_restart(config, SINGLE_PROCESS) == config


def test_setting_the_clock_does_not_hide_a_restart(tmp_path, torchrun, monkeypatch):
    """On Linux both the boot time and the start of a process move with the clock."""
    torchrun(RESTART_COUNT="1")
    config = parse_command_line(["--preset", "tiny", "--output-dir", str(tmp_path), "--overwrite"])
    resume.record_torchrun_run(tmp_path)
    for owner, name in ((psutil.Process, "create_time"), (psutil, "boot_time")):
        before = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *of, before=before: before(*of) + 60)
    assert resume.resume_after_torchrun_restart(config, SINGLE_PROCESS).resume == tmp_path


def test_any_rank_may_recognise_a_restart(tmp_path, torchrun):
    """Rank 0 may be on another node than before."""

    class Pair:
        def all_gather(self, value):
            return [False, value]

    torchrun(RESTART_COUNT="1")
    config = parse_command_line(["--preset", "tiny", "--output-dir", str(tmp_path), "--overwrite"])
    resume.record_torchrun_run(tmp_path)
    assert resume.resume_after_torchrun_restart(config, Pair()).resume == tmp_path


@pytest.mark.slow
def test_killed_and_resumed_runs_match_an_uninterrupted_run(tmp_path):
    alone = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(KILL_RUN), str(tmp_path), "5", "3"]
    subprocess.run(command, check=True, cwd=ROOT, env=alone)
    whole = left_by(tmp_path / "whole")
    assert {row["step"] for row in whole["metrics"]} == set(range(8))
    for number in range(5):
        assert left_by(tmp_path / f"killed-{number}") == whole


@pytest.mark.slow
def test_interrupted_and_resumed_runs_match_an_uninterrupted_run(tmp_path):
    alone = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.helpers.interrupt_run", str(tmp_path), "1", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=alone)
    assert done.returncode == 0, done.stderr
    assert "tiny: 2 runs equal" in done.stdout and "jsonl: 2 runs equal" in done.stdout
