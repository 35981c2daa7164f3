"""Checkpoints that are complete or absent, even if the process is killed while one is written.

    <run>/checkpoints/step-000016/
        model.safetensors         the weights that train
        optimizer.safetensors     AdamW's moments of these weights
        reference.safetensors     the reference policy, if it is a copy
        rng.safetensors           the state of PyTorch's generators
        state.json                everything else
        manifest.json             size and SHA-256 of the other files, written last

The files are written to step-000016.partial, flushed to the disk and renamed. Nothing is pickled,
so reading a checkpoint runs no code, whoever wrote it.
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
from reference.training.run.run_directory import copy_mode, report_write_errors

FORMAT = 2
LOGS = ("metrics.jsonl", "completions.txt")  # a resumed run truncates them and appends
KINDS = ("model", "optimizer", "reference", "rng")
# Reading a file that is damaged, or written by another program, raises one of these.
READ_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


class Damaged(Exception):
    """The files of a checkpoint are not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on the disk."""

    path: Path
    state: dict[str, Any]

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """Load the tensors of one of KINDS by name, on the CPU; it may have none."""
        path = self.path / f"{kind}.safetensors"
        return load_file(path) if path.exists() else {}


class Checkpoints:
    """The newest `keep` checkpoints of the run in a directory."""

    def __init__(self, run: Path, keep: int) -> None:
        self.run, self.keep = run, keep
        self.directory = run / "checkpoints"
        self._damaged: set[int] = set()

    def save(
        self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]
    ) -> Path:
        """Write a checkpoint completely or not at all.

        The oldest is removed before, so that no more than `keep` take space; one stays until the
        new one is complete.
        """
        target = self.directory / f"step-{step:06d}"
        partial = target.with_name(target.name + ".partial")
        try:
            with report_write_errors(target):
                self.prune(step, max(1, self.keep - 1))
                _remove(partial)
                partial.mkdir(parents=True)
                for kind in (kind for kind in KINDS if tensors.get(kind)):
                    save_file(dict(tensors[kind]), partial / f"{kind}.safetensors")
                content = {"format": FORMAT, "lines": self._flush_logs(), **state}
                (partial / "state.json").write_text(json.dumps(content), encoding="utf-8")
                copy_mode(partial / "state.json")
                files = {}
                for path in sorted(partial.iterdir()):
                    _flush(path)
                    files[path.name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
                manifest = partial / "manifest.json"
                manifest.write_text(json.dumps(files, indent=2) + "\n", encoding="utf-8")
                _flush(manifest)
                _flush(partial)
                if target.exists():  # a damaged one: the run would have been resumed from it
                    _remove(target)
                partial.rename(target)
                _flush(self.directory)
        finally:
            _remove(partial)
        self._damaged.discard(step)
        self.prune(step, self.keep)
        return target

    def latest(self) -> Checkpoint | None:
        """Find the newest undamaged checkpoint, if any, and print a line for each damaged one."""
        steps = self.steps()
        for step in reversed(steps):
            path = self.directory / f"step-{step:06d}"
            try:
                return self._read(path)
            except Damaged as damage:
                self._damaged.add(step)
                print(f"checkpoint {path} cannot be used: {damage}", file=sys.stderr)
        if steps:
            raise UserError(
                f"--resume {self.run}: none of its {len(steps)} checkpoints can be used; start "
                "anew with another --output-dir"
            )
        return None

    def steps(self) -> list[int]:
        """List the steps that have a checkpoint, ascending."""
        names = (path.name.removeprefix("step-") for path in self.directory.glob("step-*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def prune(self, last: int, keep: int) -> None:
        """Remove all checkpoints but the newest `keep` up to the step `last`.

        Later ones belong to an earlier attempt. A damaged checkpoint takes the place of no other.
        """
        steps = self.steps()
        kept = [step for step in steps if step <= last and step not in self._damaged][-keep:]
        for step in steps:
            if step not in kept:
                _remove(self.directory / f"step-{step:06d}")
        for leftover in self.directory.glob("*.partial"):  # of a run that was killed
            _remove(leftover)

    def restore_logs(self, checkpoint: Checkpoint | None) -> None:
        """Make the logs those of the checkpoint; without a checkpoint, remove them."""
        state = {} if checkpoint is None else checkpoint.state
        for name in LOGS:
            path = self.run / name
            size = state["lines"][name] if state else 0
            if size == 0:
                path.unlink(missing_ok=True)
            else:
                os.truncate(path, size)
            text = state.get("unwritten", {}).get(name)
            if text:
                with report_write_errors(path), path.open("ab") as file:
                    file.write(text.encode("utf-8", errors="backslashreplace"))

    def _read(self, path: Path) -> Checkpoint:
        """Verify every file, the format and the logs, and raise Damaged if one is not right."""
        try:
            files = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            present = {file.name for file in path.iterdir()} - {"manifest.json"}
            if present != files.keys():
                name = sorted(present ^ files.keys())[0]
                raise Damaged(
                    f"{name} is {'not in the manifest' if name in present else 'missing'}"
                )
            for name, expected in files.items():
                actual = {"bytes": (path / name).stat().st_size, "sha256": _digest(path / name)}
                if actual != expected:
                    raise Damaged(f"{name} is not what was written (its SHA-256 differs)")
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            sizes = self._flush_logs()
            if state["format"] != FORMAT:
                raise Damaged(f"its format is {state['format']}, and not this version's {FORMAT}")
            for name in LOGS:
                if sizes[name] < state["lines"][name]:
                    raise Damaged(f"{name} is shorter than it was")
        except READ_ERRORS as error:
            raise Damaged(f"{type(error).__name__}: {error}") from None
        return Checkpoint(path, state)

    def _flush_logs(self) -> dict[str, int]:
        """Flush the logs to the disk and return their sizes in bytes."""
        sizes: dict[str, int] = {name: 0 for name in LOGS}
        for path in (self.run / name for name in LOGS):
            if path.exists():
                _flush(path)
                sizes[path.name] = path.stat().st_size
        return sizes


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Flush a file or directory to the disk.

    After a power cut a rename may have survived, so the content has to be there before it.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(directory: Path) -> None:
    """Remove a directory under a name that is no checkpoint's, so that a kill leaves no half."""
    if directory.suffix != ".partial" and directory.exists():
        aside = directory.with_name(directory.name + ".old.partial")
        shutil.rmtree(aside, ignore_errors=True)
        directory = directory.rename(aside)
    shutil.rmtree(directory, ignore_errors=True)
