"""Checkpoints: where a run stands, in files that a kill at any moment leaves whole.

    <run>/checkpoints/step-000016/
        model.safetensors         the weights that train
        optimizer.safetensors     AdamW's moments of each of them
        reference.safetensors     the KL's frozen model, where it is a copy
        rng.safetensors           the state of PyTorch's generators
        state.json                everything else
        manifest.json             size and SHA-256 of the others, written last

All is written to step-000016.partial, flushed to the disk and renamed. Nothing is pickled: reading
one runs no code, whoever wrote it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from reference.training.errors import UserError
from reference.training.run.run_directory import report_write_errors

FORMAT = 2
LINES = ("metrics.jsonl", "completions.txt")  # which a resumed run cuts back, and writes on
KINDS = ("model", "optimizer", "reference", "rng")
# What reading a file of ours raises where it is another's, or damaged.
NOT_AS_WRITTEN = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


class Damaged(Exception):
    """A checkpoint that is not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """One that was found whole."""

    path: Path
    state: dict[str, Any]

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """Those of a kind, by name, on the CPU; none where it has none of that kind."""
        path = self.path / f"{kind}.safetensors"
        return load_file(path) if path.exists() else {}


class Checkpoints:
    """Those of one run, of which the last few are kept.

    Args:
        run: its directory.
        keep: how many, at least 1.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self.run, self.keep = run, keep
        self.directory = run / "checkpoints"
        self._damaged: set[int] = set()

    def save(
        self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]
    ) -> Path:
        """Write one, whole or not at all, and then remove the oldest.

        Args:
            state: what JSON can say.
            tensors: by kind and name.

        Raises:
            UserError: the disk is full, or does not take it for another reason; those of before
                are as they were.
        """
        target = self.directory / f"step-{step:06d}"
        partial = target.with_name(target.name + ".partial")
        try:
            with report_write_errors(target):
                _remove(partial)
                partial.mkdir(parents=True)
                for kind in (kind for kind in KINDS if tensors.get(kind)):
                    save_file(dict(tensors[kind]), partial / f"{kind}.safetensors")
                content = {"format": FORMAT, "lines": self._sizes_of_lines(), **state}
                (partial / "state.json").write_text(json.dumps(content), encoding="utf-8")
                _write_manifest(partial)
                if target.exists():  # damaged, or it would have been resumed
                    _remove(target)
                partial.rename(target)
                _flush(self.directory)
        finally:
            _remove(partial)
        self._damaged.discard(step)
        self.prune(step, self.keep)
        return target

    def latest(self) -> Checkpoint | None:
        """The newest that is whole; a line for each that is not. None where there is none at all.

        Raises:
            UserError: there are some, and none can be used.
        """
        found = self.steps()
        for step in reversed(found):
            path = self.directory / f"step-{step:06d}"
            try:
                return self._read(path)
            except Damaged as damage:
                self._damaged.add(step)
                print(f"checkpoint {path} cannot be used: {damage}", file=sys.stderr)
        if found:
            raise UserError(
                f"--resume {self.run}: none of its {len(found)} checkpoints can be used; start "
                "anew with another --output-dir"
            )
        return None

    def steps(self) -> list[int]:
        """After which steps there is one, ascending."""
        names = (path.name.removeprefix("step-") for path in self.directory.glob("step-*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def prune(self, last: int, keep: int) -> None:
        """Leave the newest up to the step `last`: of later ones none was resumed.

        Those that `latest` found damaged are in nobody's place.
        """
        steps = self.steps()
        kept = [step for step in steps if step <= last and step not in self._damaged][-keep:]
        for step in steps:
            if step not in kept:
                _remove(self.directory / f"step-{step:06d}")
        for left in self.directory.glob("*.partial"):  # by a run that was killed
            _remove(left)

    def truncate_logs(self, checkpoint: Checkpoint | None) -> None:
        """Take back what the run wrote after the checkpoint, without one all of it."""
        for name in LINES:
            path = self.run / name
            size = 0 if checkpoint is None else checkpoint.state["lines"][name]
            if size == 0:
                path.unlink(missing_ok=True)
            else:
                os.truncate(path, size)

    def _read(self, path: Path) -> Checkpoint:
        try:
            state, sizes = _verified(path), self._sizes_of_lines()
            if state["format"] != FORMAT:
                raise Damaged(f"its format is {state['format']}, and not this version's {FORMAT}")
            for name in LINES:
                if sizes[name] < state["lines"][name]:
                    raise Damaged(f"{name} is shorter than it was")
        except NOT_AS_WRITTEN as error:
            raise Damaged(f"{type(error).__name__}: {error}") from None
        return Checkpoint(path, state)

    def _sizes_of_lines(self) -> dict[str, int]:
        sizes = {}
        for name in LINES:
            path = self.run / name
            if path.exists():
                _flush(path)
            sizes[name] = path.stat().st_size if path.exists() else 0
        return sizes


def _write_manifest(directory: Path) -> None:
    """Name every file with its size and digest, and flush all of them to the disk."""
    files = {}
    for path in sorted(directory.iterdir()):
        _flush(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    manifest = directory / "manifest.json"
    manifest.write_text(json.dumps(files, indent=2) + "\n", encoding="utf-8")
    _flush(manifest)
    _flush(directory)


def _verified(directory: Path) -> dict[str, Any]:
    """Its state, once every file is what the manifest says."""
    files = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    there = {path.name for path in directory.iterdir()} - {"manifest.json"}
    if there != files.keys():
        odd = sorted(there ^ files.keys())[0]
        raise Damaged(f"{odd} is {'not in the manifest' if odd in there else 'missing'}")
    for name, expected in files.items():
        path = directory / name
        if path.stat().st_size != expected["bytes"] or _digest(path) != expected["sha256"]:
            raise Damaged(f"{name} is not what was written (its SHA-256 differs)")
    return json.loads((directory / "state.json").read_text(encoding="utf-8"))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Onto the disk: a rename that outlives a power cut must not come before what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(directory: Path) -> None:
    """Under a name of no checkpoint first, so that a kill leaves no half of one."""
    if directory.suffix != ".partial" and directory.exists():
        aside = directory.with_name(directory.name + ".old.partial")
        shutil.rmtree(aside, ignore_errors=True)
        directory = directory.rename(aside)
    shutil.rmtree(directory, ignore_errors=True)
