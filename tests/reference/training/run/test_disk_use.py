"""The disk space of a run is stated before it is needed."""

import re
import shutil
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from reference import train
from reference.training.run import disk_use
from tests.helpers.training_runs import tiny


@pytest.mark.parametrize("flags", [[], ["--beta", "0.1"], ["--lora-rank", "4"]], ids=" ".join)
def test_stated_disk_use_is_that_of_the_run(tmp_path, tiny_model, flags, monkeypatch, capsys):
    monkeypatch.setattr(train, "plot_dashboard", lambda *_: None)
    monkeypatch.setattr(disk_use, "format_size", lambda size: f"{size:.0f} bytes")
    assert tiny(tmp_path, "--model", tiny_model, *flags, "--steps", "1") == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("disk: ")]
    needed, checkpoint, model, _ = (int(x) for x in re.findall(r"(\d+) bytes", line))
    assert needed == 2 * checkpoint + model

    def written(directory):
        tensors = [x for path in directory.glob("*.safetensors") for x in load_file(path).items()]
        return sum(x.nbytes for name, x in tensors if name not in ("cpu", "cuda"))

    assert checkpoint == pytest.approx(written(tmp_path / "checkpoints" / "step-000001"), rel=0.01)
    assert model == pytest.approx(written(tmp_path / "model"), rel=0.01 if not flags else 0.2)


def test_full_disk_warns(tmp_path, tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    monkeypatch.setattr(train, "train", lambda *_: {})
    assert tiny(tmp_path, "--model", tiny_model) == 0
    said = capsys.readouterr().out
    assert "; 10 kB free\nWARNING: the disk is too small for this run" in said


def test_files_of_a_complete_run(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    assert disk_use.describe_files(tmp_path) == f"in {tmp_path}: summary.json"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "state").write_bytes(b"1" * 2000)
    assert disk_use.describe_files(tmp_path) == (
        f"in {tmp_path}: checkpoints, summary.json\n"
        f"2 kB of it in checkpoints: only --resume {tmp_path} --steps MORE needs them"
    )


def test_size_of_counts_the_files_below(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"123")
    (tmp_path / "c").write_bytes(b"4567")
    assert disk_use.size_of(tmp_path) == 7


@pytest.mark.parametrize(
    ("size", "text"), [(900, "1 kB"), (2.5e6, "2.5 MB"), (1.63e9, "1.6 GB"), (4e12, "4000.0 GB")]
)
def test_format_size(size, text):
    assert disk_use.format_size(size) == text
