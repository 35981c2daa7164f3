"""The directory of a run. Files are written beside their place and renamed: all in it are whole.

settings.json      the settings
metrics.jsonl      a line per step and per evaluation
completions.txt    sampled completions
curves.png         the curves
checkpoints/       where the run can be resumed
model/             the model, after the last step
summary.json       the end
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from reference.training.config import TrainConfig
from reference.training.distributed import SINGLE_PROCESS, Ranks, full_state_dict, is_sharded
from reference.training.errors import UserError, one_line
from reference.training.model.policy import Policy

# What a run leaves beside settings.json: --overwrite removes nothing else.
FILES = ("metrics.jsonl", "completions.txt", "curves.png", "summary.json")
FILES += ("torchrun", "events.out.tfevents.*", "*.partial", "partial-*")
FOLDERS = ("checkpoints", "model", "model.partial", "model.before.partial", "wandb")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def lock_run_dir(config: TrainConfig, ranks: Ranks = SINGLE_PROCESS) -> Iterator[Path]:
    """The directory of this run, which no other process takes while this lasts.

    A run that never began takes back what was made here. Only the first rank's is kept: what the
    others write goes into directories that are removed.

    Raises:
        UserError: it belongs to another run, cannot be written, or the disk is full.
    """
    if not ranks.is_first:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    given = config.resume or config.output_dir
    is_new = given is None or not given.exists()
    directory = make_run_directory(config)
    try:
        with _locked(directory), _begun(directory, config, is_new):
            yield directory
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(f"cannot write to {error.filename or directory}: {reason(error)}") from None


@contextmanager
def _begun(directory: Path, config: TrainConfig, is_new: bool) -> Iterator[None]:
    """With settings in it, so that the run can be resumed from its first moment on."""
    settings = directory / "settings.json"
    if settings.exists():
        yield
        return
    try:
        save_json(settings, config.as_json())
        yield
    finally:
        if directory.is_dir() and {path.name for path in directory.iterdir()} <= {settings.name}:
            settings.unlink(missing_ok=True)
            if is_new:
                with suppress(OSError):  # a mount, or a new file of another
                    directory.rmdir()


def make_run_directory(config: TrainConfig) -> Path:
    """--resume's; or --output-dir, new or empty or with --overwrite another run's; without either
    the first free runs/<model>-<task>-seed<seed>[-n].

    Raises:
        UserError: the directory has something in it, or leads out of itself, or cannot be written.
    """
    given = config.resume or config.output_dir
    if given is not None and config.resume is None and given.is_dir() and any(given.iterdir()):
        if not config.overwrite:
            raise UserError(
                f"--output-dir {given} is not empty: name a new one, or leave the flag out; or go "
                f"on with its run by --resume {given}, or replace it by --overwrite"
            )
        if not (given / "settings.json").is_file():
            raise UserError(f"--overwrite: {given} is not empty, and not the directory of a run")
        _check_model_stays(config.model, given)
    if config.resume or config.overwrite:
        _check_no_links(given, "--resume" if config.resume else "--overwrite")
    directory = given
    try:
        if given is None:
            directory = _first_free(config)
        else:
            directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise UserError(
            f"cannot write to the output directory {directory or 'runs'}: {reason(error)}"
        ) from None
    return directory


def _check_model_stays(model: str, directory: Path) -> None:
    """Raise a UserError where --overwrite might remove what the run starts from."""
    if Path(model).is_dir() and Path(model).resolve().is_relative_to(directory.resolve()):
        raise UserError(
            f"--overwrite removes the run in {directory}, and --model {model} lies in it: move the "
            "model, or name another --output-dir"
        )


def _check_no_links(directory: Path, flag: str) -> None:
    """Raise a UserError where a directory from elsewhere would have files outside it written.

    Those in wandb/ are made by that package, which replaces them and does not follow them.
    """
    for path in directory.rglob("*"):
        if path.is_symlink() and directory / "wandb" not in path.parents:
            raise UserError(
                f"{flag}: {path} is a symbolic link, and may lead out of the run: remove it"
            )


def _first_free(config: TrainConfig) -> Path:
    model = "tiny" if config.model == "scratch" else Path(config.model).name
    stem = Path("runs") / f"{model}-{config.task}-seed{config.seed}"
    stem.parent.mkdir(exist_ok=True)
    number = 1
    while True:
        directory = stem if number == 1 else Path(f"{stem}-{number}")
        try:
            directory.mkdir(parents=True)  # which of two processes only one can do
        except FileExistsError:
            number += 1
        else:
            return directory


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Alone in it; the lock goes with the process, however that ends. Windows has no such lock."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process trains in {directory}: wait for it or end it"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def clear(directory: Path, settings: dict) -> None:
    """Remove what a run leaves, and nothing else; the settings are replaced by its successor's.

    A kill at any moment leaves the directory of a run.
    """
    for name in FOLDERS:
        shutil.rmtree(directory / name, ignore_errors=True)
    for path in (path for name in FILES for path in directory.glob(name) if path.is_file()):
        path.unlink()
    save_json(directory / "settings.json", settings)


@contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """Where it fails, a UserError that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from None


def reason(error: OSError | SafetensorError) -> str:
    return getattr(error, "strerror", None) or one_line(error)


def save_model(
    directory: Path, model, tokenizer, weights: Mapping[str, Tensor] | None = None
) -> Path:
    """Write <directory>/model in the format of Hugging Face, whole or not at all.

    Args:
        weights: in the place of the model's own, which may be shards.

    Raises:
        UserError: the disk is full, or does not take it for another reason.
    """
    target = directory / "model"
    partial = directory / "model.partial"
    try:
        with report_write_errors(target):
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
            model.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
            before = directory / "model.before.partial"
            shutil.rmtree(before, ignore_errors=True)
            if target.exists():
                target.rename(before)
            partial.rename(target)
            shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def save_policy(directory: Path, policy: Policy, steps: int) -> None:
    """Write <directory>/model after so many steps. Every rank must call this."""
    weights = full_state_dict(policy.model) if is_sharded(policy.model) else None
    if policy.ranks.is_first:
        saved = save_model(directory, policy.model_to_save(), policy.tokenizer, weights)
        print(f"\nthe model after {steps} steps: {saved}")


def save_json(path: Path, content: dict) -> None:
    """Raises a UserError where the disk does not take it."""
    partial = path.with_name(path.name + ".partial")
    try:
        with report_write_errors(path):
            with partial.open("w", encoding="utf-8") as file:
                file.write(json.dumps(content, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())  # or a power cut may leave it empty
            partial.rename(path)
    finally:
        with suppress(OSError):  # such as on a file system that has become read-only
            partial.unlink()
