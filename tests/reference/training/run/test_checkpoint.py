"""Checkpoints are complete or absent, and damaged ones are reported."""

import errno
import os
import pickle

import pytest
import torch
from safetensors import SafetensorError

from reference.training.errors import UserError
from reference.training.run import checkpoint
from reference.training.run.checkpoint import Checkpoints


def save(checkpoints: Checkpoints, step: int):
    tensors = {"model": {"w": torch.full((3,), float(step))}, "reference": {}}
    return checkpoints.save(step, {"step": step}, tensors)


@pytest.fixture
def saved(tmp_path):
    """Return the checkpoints of a run that has those of steps 2 and 4."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 2)
    save(checkpoints, 4)
    return checkpoints


def test_latest_reads_what_was_saved(saved):
    found = saved.latest()
    assert found.state["step"] == 4 and found.state["lines"]["metrics.jsonl"] == 24
    assert torch.equal(found.tensors("model")["w"], torch.full((3,), 4.0))
    assert found.tensors("reference") == {}


def test_save_removes_the_oldest_and_leftovers(saved):
    (saved.directory / "step-000003.partial").mkdir()  # of a run that was killed
    save(saved, 6)
    assert sorted(path.name for path in saved.directory.iterdir()) == ["step-000004", "step-000006"]
    saved.prune(6, keep=1)
    assert saved.steps() == [6]


def test_save_of_an_earlier_step_removes_later_ones(saved):
    save(saved, 3)
    assert saved.steps() == [2, 3]


def test_latest_of_a_run_without_checkpoints_is_none(tmp_path):
    assert Checkpoints(tmp_path, 1).latest() is None


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "model.safetensors is not what was written (its SHA-256 differs)": lambda at: flip_a_bit(
        at / "model.safetensors"
    ),
    "state.json is not what was written (its SHA-256 differs)": lambda at: os.truncate(
        at / "state.json", 5
    ),
    "model.safetensors is missing": lambda at: (at / "model.safetensors").unlink(),
    "more.pt is not in the manifest": lambda at: (at / "more.pt").write_bytes(pickle.dumps(0)),
    "FileNotFoundError": lambda at: (at / "manifest.json").unlink(),
    "JSONDecodeError": lambda at: (at / "manifest.json").write_text("{"),
    "AttributeError": lambda at: (at / "manifest.json").write_text("[]"),
    "RecursionError": lambda at: (at / "manifest.json").write_text("[" * 100_000),
    "metrics.jsonl is shorter than it was": lambda at: os.truncate(
        at.parents[1] / "metrics.jsonl", 12
    ),
}


@pytest.mark.parametrize(("message", "damage"), DAMAGE.items(), ids=DAMAGE)
def test_damaged_checkpoint_is_reported_and_skipped(tmp_path, message, damage, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 2)
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 3}\n')
    newest = save(checkpoints, 4)
    damage(newest)
    assert checkpoints.latest().state["step"] == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"checkpoint {newest} cannot be used: {message}")


def test_other_format_is_rejected(saved, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "FORMAT", 3)
    with pytest.raises(UserError, match="none of its 2 checkpoints can be used"):
        saved.latest()
    assert "its format is 2, and not this version's 3" in capsys.readouterr().err


def test_damaged_checkpoint_is_replaced(saved):
    flip_a_bit(saved.directory / "step-000004" / "model.safetensors")
    save(saved, 4)
    assert saved.latest().state["step"] == 4


def test_damaged_checkpoint_does_not_count_as_kept(saved):
    flip_a_bit(saved.directory / "step-000004" / "model.safetensors")
    assert saved.latest().state["step"] == 2
    save(saved, 6)
    assert saved.steps() == [2, 6]


def test_prune_keeps_an_undamaged_checkpoint(saved):
    flip_a_bit(saved.directory / "step-000004" / "model.safetensors")
    saved.latest()
    saved.prune(5, keep=1)
    assert saved.latest().state["step"] == 2


def test_replaced_checkpoint_counts_as_kept(saved):
    flip_a_bit(saved.directory / "step-000004" / "model.safetensors")
    saved.latest()
    save(saved, 4)
    save(saved, 6)
    assert saved.steps() == [4, 6]


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_rust(*_):
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("owner", "name", "fault"),
    [
        (checkpoint, "save_file", full_in_rust),
        (checkpoint, "_flush", full),
        (checkpoint.Path, "mkdir", full),
        (checkpoint.Path, "write_text", full),
        (checkpoint.Path, "rename", full),
    ],
    ids=["tensors", "flush", "mkdir", "json", "rename"],
)
def test_full_disk_leaves_earlier_checkpoints(saved, owner, name, fault, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fault)
        with pytest.raises(UserError, match=r"^cannot write .*step-000006: .*No space left"):
            save(saved, 6)
    assert {path.name for path in saved.directory.iterdir()} <= {"step-000002", "step-000004"}
    assert saved.latest().state["step"] == 4


def test_no_more_than_keep_checkpoints_take_space_during_a_save(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "_digest", lambda path: seen.append(saved.steps()) or "")
    seen = []
    save(saved, 6)
    assert seen and all(steps == [4] for steps in seen)


def test_files_have_the_mode_of_new_files(saved, tmp_path):
    mode = (tmp_path / "metrics.jsonl").stat().st_mode
    files = [path for path in saved.directory.rglob("*") if path.is_file()]
    assert len(files) == 6 and {path.stat().st_mode for path in files} == {mode}


def test_restore_logs_appends_what_could_not_be_written(saved):
    state = {"step": 6, "unwritten": {"metrics.jsonl": '{"step": 5}\n', "completions.txt": "é\n"}}
    saved.save(6, state, {})
    for _ in range(2):  # also after a kill in the middle of it
        saved.restore_logs(saved.latest())
        lines = (saved.run / "metrics.jsonl").read_text().splitlines()
        assert lines == ['{"step": 1}', '{"step": 2}', '{"step": 5}']
        assert (saved.run / "completions.txt").read_text() == "é\n"


def test_restore_logs_removes_later_lines(saved):
    with (saved.run / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 5}\n{"st')
    (saved.run / "completions.txt").write_text("step 5")
    saved.restore_logs(saved.latest())
    assert (saved.run / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert not (saved.run / "completions.txt").exists()
    saved.restore_logs(None)
    assert not (saved.run / "metrics.jsonl").exists()


def test_latest_unpickles_nothing(saved, monkeypatch):
    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("unpickled"))
    assert saved.latest().tensors("model").keys() == {"w"}
    files = {path.suffix for path in saved.directory.rglob("*") if path.is_file()}
    assert files == {".json", ".safetensors"}
