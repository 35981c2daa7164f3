"""Going on with a run: its settings are the defaults, and few of them may change."""

from __future__ import annotations

import json
import os
import shlex
import socket
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import psutil

from reference.training.config import TrainConfig
from reference.training.distributed import Ranks
from reference.training.errors import UserError
from reference.training.run.checkpoint import Checkpoint, Checkpoints

RESTARTS = "torchrun"  # in the directory of a run: who may go on with it unasked

# Where a run ends, what it prints and keeps, and how it fits into memory: not what it computes.
MAY_CHANGE = {
    "steps",
    "print_every",
    "dashboard_every",
    "eval_every",
    "tensorboard",
    "wandb",
    "cache_dir",
    "checkpoint_every",
    "keep_checkpoints",
    "micro_batch",
    "parallel",
    "gradient_checkpointing",
    "threads",
    "resume",
    "overwrite",
}
# A directory from elsewhere must choose neither what is run as code nor where a model is written.
CODE = ("reward", "step_reward")
NOT_FROM_THERE = (*CODE, "cache_dir")
# Filters that compare the tokens of a micro-batch with each other.
RANKING = ("top_entropy", "clip_cov", "kl_cov")


def load_settings(run: Path) -> TrainConfig:
    """Those of the run in that directory, but for the code and the --cache-dir that it names.

    Raises:
        UserError: there is no run, or what it says is not of this version.
    """
    found, types = _read(run), get_type_hints(TrainConfig)
    odd = sorted(found.keys() ^ types.keys())
    if odd:
        raise UserError(
            f"--resume {run}: its settings are of another version: {', '.join(odd)} not in both"
        )
    defaults = {each.name: each.default for each in fields(TrainConfig)}
    found |= {name: defaults[name] for name in NOT_FROM_THERE}
    try:
        return TrainConfig(**{name: _typed(value, types[name]) for name, value in found.items()})
    except (TypeError, ValueError) as error:
        raise UserError(f"--resume {run}: settings.json is damaged: {error}") from None


def _read(run: Path) -> dict[str, Any]:
    path = run / "settings.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--resume {run} is not the directory of a run: {path.name}: {error.strerror}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--resume {run}: {path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"--resume {run}: {path} holds no settings")
    return found


def _typed(value: Any, kind: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if isinstance(value, str) and kind == Path | None else value


def find_checkpoint(config: TrainConfig, checkpoints: Checkpoints) -> Checkpoint | None:
    """Where the run goes on: None where it begins, or was ended before its first checkpoint.

    Raises:
        UserError: no checkpoint can be used, or the settings would make another run of it.
    """
    if config.resume is None:
        return None
    found = checkpoints.latest()
    if found is None:
        check_settings_match(config, _read(config.resume), 0)
    else:
        check_settings_match(config, found.state["settings"], found.state["step"])
    return found


def check_settings_match(config: TrainConfig, saved: Mapping[str, Any], step: int) -> None:
    """Raise a UserError where settings would make another run of one that was saved after `step`.

    Args:
        saved: its settings, as `TrainConfig.as_json` gives them.
    """
    now = config.as_json()
    named = [name for name in CODE if saved.get(name) and not now[name]]
    if named:
        again = shlex.join(_flags({name: saved[name] for name in named}))
        raise UserError(
            f"--resume {config.resume}: code is run only where the command line names it; if you "
            f"trust it, add {again}"
        )
    loss = config.loss_fields()
    ranks_tokens = any(loss.get(name) is not None for name in RANKING)
    may_change = MAY_CHANGE - {"micro_batch"} if ranks_tokens else MAY_CHANGE
    changed = [name for name in now if name not in may_change and now[name] != saved.get(name)]
    if changed:
        told = ", ".join(
            f"--{_flag(name)} was {saved.get(name)}, not {now[name]}" for name in changed
        )
        raise UserError(
            f"--resume {config.resume}: {told}: these would make another run of it; leave them "
            "out, or start anew from its model with --model"
        )
    if config.steps < step:
        raise UserError(
            f"--resume {config.resume} has {step} steps behind it; got --steps {config.steps}"
        )


def resume_after_torchrun_restart(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """Where torchrun has started all ranks anew, because one died: go on with their run.

    The run left a note of the torchrun process that had started its first rank. That one outlives
    a restart; any rank may know it, since the first may be on another node by now. On one node a
    count of 0 restarts is a first start all the same; of several each counts its own failures only.

    Raises:
        UserError: nothing would say where that is.
    """
    if config.resume is not None or _torchrun() is None:
        return config
    if config.output_dir is None:
        if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
            raise UserError("torchrun --max-restarts needs --output-dir: a restart goes on there")
        return config
    note = config.output_dir / RESTARTS
    on_one_node = os.environ.get("GROUP_WORLD_SIZE") == "1"
    is_first = on_one_node and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    known = not is_first and note.is_file() and note.read_text() == _torchrun()
    if not any(ranks.all_gather(known)):
        return config
    return replace(config, resume=config.output_dir, overwrite=False)


def record_torchrun_run(run: Path) -> None:
    """The run in this directory is of this torchrun, if any, whose restarts go on with it."""
    name = _torchrun()
    if name is not None:
        (run / RESTARTS).write_text(name)


def _torchrun() -> str | None:
    """Its name, and the process that has started this one, whose number alone may come again."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    began = psutil.Process(os.getppid()).create_time() - psutil.boot_time()  # no clock in it
    name = f"{os.environ['TORCHELASTIC_RUN_ID']} {socket.gethostname()} {os.getppid()}"
    return f"{name} {began:.2f}"


def resume_command(config: TrainConfig, directory: Path) -> str:
    """The line that goes on with the run."""
    settings = config.as_json()
    own = {name: settings[name] for name in NOT_FROM_THERE if settings[name]}
    return shlex.join(["python", "reference/train.py", "--resume", str(directory), *_flags(own)])


def _flags(settings: Mapping[str, Any]) -> list[str]:
    flags = []
    for name, value in settings.items():
        flags += [f"--{_flag(name)}", *(value if isinstance(value, list) else [value])]
    return flags


def _flag(name: str) -> str:
    return name.replace("_", "-")
