"""Checkpoints are whole or not there, and what is wrong with one is said."""

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
def two(tmp_path):
    """Those of the steps 2 and 4."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 2)
    save(checkpoints, 4)
    return checkpoints


def test_the_newest_is_read_as_it_was_written(two):
    found = two.latest()
    assert found.state["step"] == 4 and found.state["lines"]["metrics.jsonl"] == 24
    assert torch.equal(found.tensors("model")["w"], torch.full((3,), 4.0))
    assert found.tensors("reference") == {}


def test_the_last_ones_are_kept_and_nothing_else(two):
    (two.directory / "step-000003.partial").mkdir()  # of a run that was killed
    save(two, 6)
    assert sorted(path.name for path in two.directory.iterdir()) == ["step-000004", "step-000006"]
    two.prune(6, keep=1)
    assert two.steps() == [6]


def test_one_of_an_earlier_step_takes_the_place_of_later_ones(two):
    save(two, 3)
    assert two.steps() == [2, 3]


def test_a_run_without_any_has_none(tmp_path):
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
def test_a_damaged_one_is_named_and_the_one_before_it_used(tmp_path, message, damage, capsys):
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


def test_another_format_is_not_guessed_at(two, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "FORMAT", 3)
    with pytest.raises(UserError, match="none of its 2 checkpoints can be used"):
        two.latest()
    assert "its format is 2, and not this version's 3" in capsys.readouterr().err


def test_a_damaged_one_is_replaced_when_its_step_comes_again(two):
    flip_a_bit(two.directory / "step-000004" / "model.safetensors")
    save(two, 4)
    assert two.latest().state["step"] == 4


def test_a_damaged_one_is_not_kept_in_the_place_of_a_whole_one(two):
    flip_a_bit(two.directory / "step-000004" / "model.safetensors")
    assert two.latest().state["step"] == 2
    save(two, 6)
    assert two.steps() == [2, 6]


def test_where_the_last_one_could_not_be_saved_the_end_of_a_run_leaves_a_whole_one(two):
    flip_a_bit(two.directory / "step-000004" / "model.safetensors")
    two.latest()
    two.prune(5, keep=1)
    assert two.latest().state["step"] == 2


def test_one_that_was_replaced_is_damaged_no_more(two):
    flip_a_bit(two.directory / "step-000004" / "model.safetensors")
    two.latest()
    save(two, 4)
    save(two, 6)
    assert two.steps() == [4, 6]


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
def test_a_full_disk_leaves_those_of_before(two, owner, name, fault, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fault)
        with pytest.raises(UserError, match=r"^cannot write .*step-000006: .*No space left"):
            save(two, 6)
    assert sorted(path.name for path in two.directory.iterdir()) == ["step-000002", "step-000004"]
    assert two.latest().state["step"] == 4


def test_lines_written_later_are_taken_back(two):
    with (two.run / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 5}\n{"st')
    (two.run / "completions.txt").write_text("step 5")
    two.truncate_logs(two.latest())
    assert (two.run / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert not (two.run / "completions.txt").exists()
    two.truncate_logs(None)
    assert not (two.run / "metrics.jsonl").exists()


def test_reading_one_unpickles_nothing(two, monkeypatch):
    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("unpickled"))
    assert two.latest().tensors("model").keys() == {"w"}
    files = {path.suffix for path in two.directory.rglob("*") if path.is_file()}
    assert files == {".json", ".safetensors"}
