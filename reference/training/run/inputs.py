"""Digests of what a run reads besides its settings: its questions, and the files of its rewards.

A run that goes on with others would be another run from there on.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from reference.training.config import TrainConfig
from reference.training.tasks.tasks import Task


def digest_inputs(config: TrainConfig, task: Task) -> dict[str, str]:
    """Compute the SHA-256 of the questions and of each reward's file, by the flag that names it.

    Questions are compared as they were read, so that every source of data is covered. Of a reward
    the file of its function counts, and not what this file imports.
    """
    name = f"--task {config.task}" if config.data is None else f"--data {config.data}"
    digest = hashlib.sha256()
    for questions in (task.train, task.held_out):
        for question in questions:
            digest.update(json.dumps(vars(question), default=_describe).encode() + b"\n")
        digest.update(b"\n")
    digests = {name: digest.hexdigest()}
    options = [("--reward", option) for option in config.reward]
    if config.step_reward is not None:
        options.append(("--step-reward", config.step_reward))
    for flag, option in options:
        path = _source_file(option)
        if path is not None and path.is_file():
            digests[f"{flag} {option}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests


def _describe(value: Any) -> str:
    """Describe a value of a column that JSON does not have, without its address in memory."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _source_file(option: str) -> Path | None:
    """Return the file of package.module.function or file.py:function, which =weight may follow."""
    path = option.rpartition("=")[0] or option
    if ":" in path:
        return Path(path.rpartition(":")[0])
    file = getattr(sys.modules.get(path.rpartition(".")[0]), "__file__", None)
    return None if file is None else Path(file)
