"""The directory of a run. Files are written under another name and renamed, so none is partial.

settings.json      the settings
metrics.jsonl      a line per step and per evaluation
completions.txt    sampled completions
events.out.*       the metrics again, for TensorBoard
curves.png         the curves
checkpoints/       the states from which the run can be resumed
model/             the model after the last step
weights/           what a server reads the weights from, during the run only
summary.json       accuracy before and after
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from reference.training.config import TrainConfig
from reference.training.distributed import SINGLE_PROCESS, Ranks, full_state_dict
from reference.training.errors import UserError, one_line
from reference.training.model import lora
from reference.training.model.load import OPENING_FILE
from reference.training.model.policy import Policy

# The files of a run beside settings.json: --overwrite removes nothing else.
FILES = ("metrics.jsonl", "completions.txt", "curves.png", "summary.json")
FILES += ("torchrun", "events.out.tfevents.*", "*.partial", "partial-*")
FOLDERS = ("checkpoints", "model", "model.partial", "model.before.partial", "weights", "wandb")
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def lock_run_dir(config: TrainConfig, ranks: Ranks = SINGLE_PROCESS) -> Iterator[Path]:
    """Make the directory of this run and lock it against other processes.

    A directory made here is removed if the run writes nothing but its settings into it. The ranks
    but the first get temporary directories.
    """
    if not ranks.is_first:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    given = config.resume or config.output_dir
    is_new = given is None or not given.exists()
    directory = make_run_directory(config)
    try:
        with ExitStack() as stack:
            with suppress(ImportError):  # Windows has no such lock
                import fcntl

                handle = os.open(directory, os.O_RDONLY)  # the lock ends with the process
                stack.callback(os.close, handle)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(
                        f"another process trains in {directory}: wait for it or end it"
                    ) from None
                except OSError:  # the file system has no locks
                    pass
            settings = directory / "settings.json"
            is_unused = not settings.exists()
            try:
                if is_unused:  # so that the run can be resumed from its first moment on
                    save_json(settings, config.as_json())
                yield directory
            finally:
                names = {path.name for path in directory.glob("*")}
                if is_unused and names <= {settings.name}:
                    settings.unlink(missing_ok=True)
                    if is_new:
                        with suppress(OSError):  # a mount point, or another process wrote a file
                            directory.rmdir()
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(f"cannot write to {error.filename or directory}: {reason(error)}") from None


def make_run_directory(config: TrainConfig) -> Path:
    """Make the directory of --resume, or --output-dir, or a new runs/<model>-<task>-seed<seed>."""
    given = directory = config.resume or config.output_dir
    if given is not None and config.resume is None and given.is_dir() and any(given.iterdir()):
        if not config.overwrite:
            raise UserError(
                f"--output-dir {given} is not empty: name a new one, or leave the flag out; or go "
                f"on with its run by --resume {given}, or replace it by --overwrite"
            )
        if not (given / "settings.json").is_file():
            raise UserError(f"--overwrite: {given} is not empty, and not the directory of a run")
        model = Path(config.model)
        if model.is_dir() and model.resolve().is_relative_to(given.resolve()):
            raise UserError(
                f"--overwrite removes the run in {given}, and --model {config.model} lies in it: "
                "move the model, or name another --output-dir"
            )
    if given is not None and (config.resume or config.overwrite):
        flag = "--resume" if config.resume else "--overwrite"
        for path in given.rglob("*"):
            # wandb replaces the links that it makes and does not follow them.
            if path.is_symlink() and given / "wandb" not in path.parents:
                raise UserError(
                    f"{flag}: {path} is a symbolic link, and may lead out of the run: remove it"
                )
    try:
        if directory is None:
            model = "tiny" if config.model == "scratch" else Path(config.model).name
            stem = Path("runs") / f"{model}-{config.task}-seed{config.seed}"
            stem.parent.mkdir(exist_ok=True)
            number = 1
            while directory is None:
                path = stem if number == 1 else Path(f"{stem}-{number}")
                with suppress(FileExistsError):
                    path.mkdir(parents=True)  # only one of two processes can make it
                    directory = path
                number += 1
        else:
            directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise UserError(
            f"cannot write to the output directory {directory or 'runs'}: {reason(error)}"
        ) from None
    return directory


def clear(directory: Path, settings: dict) -> None:
    """Remove the files of a run, and nothing else, and write the settings of its successor.

    If the process is killed meanwhile, the directory is still that of a run.
    """
    for name in FOLDERS:
        shutil.rmtree(directory / name, ignore_errors=True)
    for path in (path for name in FILES for path in directory.glob(name) if path.is_file()):
        path.unlink()
    save_json(directory / "settings.json", settings)


@contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """Turn an error of writing into a UserError that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from None


def reason(error: OSError | SafetensorError) -> str:
    return getattr(error, "strerror", None) or one_line(error)


def save_model(
    directory: Path,
    model,
    tokenizer,
    weights: Mapping[str, Tensor] | None = None,
    opening: Sequence[Mapping[str, str]] = (),
) -> Path:
    """Write <directory>/model in the format of Hugging Face, completely or not at all.

    `weights` replace the model's own, which may be sharded. The config is that of the file from
    which the model was loaded. `opening` holds the messages with which a chat starts.
    """
    target = directory / "model"
    partial = directory / "model.partial"
    config = model.config
    try:
        model.config = getattr(model, "config_of_file", config)
        with report_write_errors(target):
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
            model.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
            if opening:
                save_json(partial / OPENING_FILE, list(opening))
            copy_mode(partial / "config.json")
            previous = directory / "model.before.partial"
            shutil.rmtree(previous, ignore_errors=True)
            if target.exists():
                target.rename(previous)
            partial.rename(target)
            shutil.rmtree(previous, ignore_errors=True)
    finally:
        model.config = config
        shutil.rmtree(partial, ignore_errors=True)
    return target


def save_policy(directory: Path, policy: Policy, steps: int) -> None:
    """Write <directory>/model after so many steps. Every rank must call this."""
    weights = full_state_dict(policy.model)
    if policy.ranks.is_first:
        opening = list(policy.opening)
        if policy.system is not None and (not opening or opening[0]["role"] != "system"):
            opening = [{"role": "system", "content": policy.system}, *opening]
        model = lora.merged(policy.model)
        saved = save_model(directory, model, policy.tokenizer, weights, opening)
        print(f"\nthe model after {steps} steps: {saved}")


def copy_mode(file: Path) -> None:
    """Give the files beside this one its mode: safetensors lets only the owner read its files."""
    for path in file.parent.iterdir():
        if path.is_file():
            shutil.copymode(file, path)


def save_json(path: Path, content: dict | list) -> None:
    """Write a JSON file completely or not at all; raise a UserError if it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    try:
        with report_write_errors(path):
            with partial.open("w", encoding="utf-8") as file:
                file.write(json.dumps(content, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())  # otherwise a power cut may leave it empty
            partial.rename(path)
    finally:
        with suppress(OSError):  # the file system may have become read-only
            partial.unlink()
