"""The directory of a run. Files are written beside their place and renamed: all in it are whole."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from reference.config import TrainConfig
from reference.errors import UserError


def make_run_directory(config: TrainConfig) -> Path:
    """--output-dir, new or empty; without it the first free runs/<model>-<task>-seed<seed>[-n].

    Raises:
        UserError: the directory has something in it, or cannot be written.
    """
    if config.output_dir is None:
        model = "tiny" if config.model == "scratch" else Path(config.model).name
        stem = Path("runs") / f"{model}-{config.task}-seed{config.seed}"
        candidates = [stem, *(Path(f"{stem}-{n}") for n in range(2, 10_000))]
        directory = next(path for path in candidates if not path.exists())
    else:
        directory = config.output_dir
        if directory.is_dir() and any(directory.iterdir()):
            raise UserError(
                f"--output-dir {directory} is not empty: name a new one, or leave the flag out"
            )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise UserError(
            f"cannot write to the output directory {directory}: {error.strerror}"
        ) from None
    return directory


def remove_if_empty(directory: Path) -> None:
    """Take back the directory of a run that never began."""
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def append_json_line(path: Path, row: dict) -> None:
    """Add one JSON object to a .jsonl file, in one write."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def save_model(directory: Path, model, tokenizer) -> Path:
    """Write <directory>/model in the format of Hugging Face, whole or not at all."""
    target = directory / "model"
    partial = directory / "model.partial"
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def save_json(path: Path, content: dict) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.rename(path)
