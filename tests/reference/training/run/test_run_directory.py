"""The run directory: locks, --overwrite, symbolic links, and disks that are full."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from reference import train
from reference.training import warm_start as supervised
from reference.training.command_line import parse_command_line
from reference.training.errors import UserError
from reference.training.model import load as models
from reference.training.model.policy import Policy
from reference.training.run import run_directory
from reference.training.run import run_log as runlog
from tests.helpers.training_runs import tiny


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(Policy, "load", lambda *_, **__: pytest.fail("a model was loaded"))


pytestmark = pytest.mark.usefixtures("one_thread")


def no_such_model(*_, **__):
    raise UserError("no model")


@pytest.mark.parametrize("left", [[], ["settings.json"]], ids=["empty", "in its first phase"])
def test_locked_directory_is_refused(tmp_path, left, no_model, capsys):
    for name in left:
        (tmp_path / name).write_text("{}")
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        assert tiny(tmp_path, "--overwrite") == 2
    finally:
        os.close(handle)
    (said,) = capsys.readouterr().err.splitlines()
    assert said == f"error: another process trains in {tmp_path}: wait for it or end it"
    assert [path.name for path in tmp_path.iterdir()] == left


def test_failed_start_removes_only_what_it_created(tmp_path, monkeypatch):
    monkeypatch.setattr(Policy, "load", no_such_model)
    (tmp_path / "mine").mkdir()
    for name in ("mine", "new"):
        assert tiny(tmp_path / name) == 2
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_full_disk_at_the_start_leaves_nothing(tmp_path, no_model, monkeypatch, capsys):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_directory.os, "fsync", full)
    assert tiny(tmp_path / "run") == 2
    path = tmp_path / "run" / "settings.json"
    assert capsys.readouterr().err == f"error: cannot write {path}: No space left on device\n"
    assert not (tmp_path / "run").exists()


def test_failing_rmdir_does_not_hide_the_error(tmp_path, monkeypatch, capsys):
    def busy(_):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Policy, "load", no_such_model)
    monkeypatch.setattr(run_directory.Path, "rmdir", busy)
    assert tiny(tmp_path / "run") == 2
    assert capsys.readouterr().err == "error: no model\n"


def test_refused_resume_keeps_a_run_without_checkpoints(tmp_path, no_model):
    config = parse_command_line(["--preset", "tiny", "--output-dir", str(tmp_path)])
    run_directory.save_json(tmp_path / "settings.json", config.as_json())
    assert train.main(["--resume", str(tmp_path), "--seed", "1"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


@pytest.fixture
def old_run(tmp_path):
    """A directory with the files of finished and of killed runs, and with other files."""
    for name in ("metrics.jsonl", "settings.json", "events.out.tfevents.1", "notes.txt"):
        (tmp_path / name).write_text("{}")
    folders = ["checkpoints/step-000002", "model", "model.partial", "model.before.partial"]
    for name in (*folders, "mine", "mine.partial"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text(name)
    return tmp_path


def test_overwrite_removes_only_files_of_runs(old_run):
    run_directory.clear(old_run, {"seed": 7})
    names = ["mine", "mine.partial", "notes.txt", "settings.json"]
    assert sorted(path.name for path in old_run.iterdir()) == names
    assert json.loads((old_run / "settings.json").read_text()) == {"seed": 7}


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (run_directory.shutil, "rmtree"),
        (run_directory.Path, "unlink"),
        (run_directory.Path, "rename"),
    ],
)
def test_killed_overwrite_can_be_repeated(old_run, owner, name, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            run_directory.clear(old_run, {})
    config = parse_command_line(["--preset", "tiny", "--output-dir", str(old_run), "--overwrite"])
    assert run_directory.make_run_directory(config) == old_run
    run_directory.clear(old_run, {})
    assert not (old_run / "metrics.jsonl").exists()


def test_overwrite_refuses_to_remove_its_own_model(old_run, no_model, capsys):
    model = old_run / "mine" / ".." / "model"
    assert tiny(old_run, "--overwrite", "--model", str(model)) == 2
    assert capsys.readouterr().err == (
        f"error: --overwrite removes the run in {old_run}, and --model {model} lies in it: move "
        "the model, or name another --output-dir\n"
    )
    assert (old_run / "model" / "file").exists()


LINKS = ["completions.txt", "settings.json.partial", "model.partial", "checkpoints"]
LINKS += ["mine/below", "wandb"]


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("by", ["--resume", "--overwrite"])
def test_symbolic_links_in_a_run_are_refused(by, name, tmp_path, no_model, capsys):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (run / "mine").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "file").write_text("kept")
    config = parse_command_line(["--preset", "tiny", "--output-dir", str(run)])
    run_directory.save_json(run / "settings.json", config.as_json())
    (run / name).symlink_to(elsewhere)
    if by == "--resume":
        assert train.main(["--resume", str(run)]) == 2
    else:
        assert tiny(run, "--overwrite") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said == (
        f"error: {by}: {run / name} is a symbolic link, and may lead out of the run: remove it"
    )
    assert [path.name for path in elsewhere.iterdir()] == ["file"]


def test_symbolic_links_of_wandb_are_allowed(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "latest-run").symlink_to("run-1")
    config = parse_command_line(["--preset", "tiny", "--output-dir", str(tmp_path), "--overwrite"])
    assert run_directory.make_run_directory(config) == tmp_path


def test_overwrite_happens_after_the_model_is_loaded(tmp_path, monkeypatch):
    def start(*arguments):
        log = arguments[-1]
        assert not (tmp_path / "metrics.jsonl").exists()
        log.evaluation(0, {"strict": 0.5})
        return {}

    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("old")
    monkeypatch.setattr(models, "from_scratch", lambda: refuse())

    def refuse():
        assert (tmp_path / "metrics.jsonl").read_text() == "old"
        raise UserError("no model")

    assert tiny(tmp_path, "--overwrite") == 2
    assert (tmp_path / "metrics.jsonl").read_text() == "old"
    monkeypatch.undo()
    monkeypatch.setattr(train, "train", start)
    monkeypatch.setattr(supervised, "TARGET", 0.0)
    assert tiny(tmp_path, "--overwrite") == 0
    assert "strict" in (tmp_path / "metrics.jsonl").read_text()
    config = parse_command_line(["--resume", str(tmp_path)])
    assert config.preset == "tiny" and not config.overwrite


def test_files_of_a_saved_model_have_the_mode_of_new_files(tmp_path, scratch):
    previous = os.umask(0o027)
    try:
        saved = run_directory.save_model(tmp_path, *scratch)
    finally:
        os.umask(previous)
    modes = {path.name: path.stat().st_mode & 0o777 for path in saved.iterdir()}
    assert "model.safetensors" in modes and set(modes.values()) == {0o640}


def test_full_disk_names_the_log_file(tmp_path):
    log = runlog.RunLog(tmp_path, {}, tensorboard=False)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        UserError, match=r"^cannot write .*metrics\.jsonl: No space left on device$"
    ):
        log.step({"step": 1})


def test_partial_write_is_an_error(tmp_path, monkeypatch):
    class Half:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, data):
            return len(data) // 2

    log = runlog.RunLog(tmp_path, {}, tensorboard=False)
    monkeypatch.setattr(runlog.Path, "open", lambda *_, **__: Half())
    with pytest.raises(UserError, match=r"metrics\.jsonl: No space left on device$"):
        log.step({"step": 1})


def test_full_disk_anywhere_is_a_user_error(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(supervised, "TARGET", 0.0)
    monkeypatch.setattr(train, "plot_dashboard", full)
    assert tiny(tmp_path) == 2
    (said,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert said == f"error: cannot write to {tmp_path}: No space left on device"


def test_read_only_file_system_is_a_user_error(tmp_path, monkeypatch):
    """Such a file system refuses even to remove a file that does not exist."""

    def refuse(self, *_, **__):
        raise OSError(30, "Read-only file system", str(self))

    for name in ("open", "unlink"):
        monkeypatch.setattr(Path, name, refuse)
    path = tmp_path / "summary.json"
    with pytest.raises(UserError, match=f"^cannot write {path}: Read-only file system"):
        run_directory.save_json(path, {})
