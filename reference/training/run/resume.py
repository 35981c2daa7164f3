"""Resuming a run: its settings are the defaults, and few of them may change."""

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
from reference.training.errors import UserError, near_path
from reference.training.run.checkpoint import Checkpoint, Checkpoints
from reference.training.run.graceful_shutdown import NOTHING_TRAINED
from reference.training.update.micro_batches import compares_tokens

TORCHRUN_FILE = "torchrun"  # in the directory of a run: the torchrun process that started it

# These settings decide when a run ends, what it writes and how it uses memory, not its numbers.
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
    "weights_dir",
    "sampler_timeout",
    "max_sampler_difference",
    "resume",
    "accept_changes",
    "overwrite",
}
# Settings of a directory that somebody else made must not choose what code runs nor where a model
# is written.
CODE = ("reward", "step_reward")
COMMAND_LINE_ONLY = (*CODE, "cache_dir", "weights_dir")


# A run has the default of a setting that did not exist when it was started.
DEFAULTS = TrainConfig().as_json()


def load_settings(run: Path) -> TrainConfig:
    """Load the settings of a run, except the code and the --cache-dir that they name."""
    settings = DEFAULTS | _read_settings(run)
    types = get_type_hints(TrainConfig)
    unknown = sorted(settings.keys() - types.keys())
    if unknown:
        raise UserError(
            f"--resume {run}: its settings are of another version, and this one has no "
            f"{', '.join(unknown)}"
        )
    for field in fields(TrainConfig):
        value = settings[field.name]
        if field.name in COMMAND_LINE_ONLY:
            settings[field.name] = field.default
        elif isinstance(value, list):
            settings[field.name] = tuple(value)
        elif isinstance(value, str) and types[field.name] == Path | None:
            settings[field.name] = Path(value)
    try:
        return TrainConfig(**settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"--resume {run}: settings.json is damaged: {error}") from None


def _read_settings(run: Path) -> dict[str, Any]:
    path = run / "settings.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        near = "" if run.exists() else near_path(run)
        raise UserError(
            f"--resume {run} is not the directory of a run: {path.name}: {error.strerror}{near}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--resume {run}: {path} is not JSON: {error}") from None
    if not isinstance(settings, dict) or not settings.keys() >= {"model", "task"}:
        raise UserError(f"--resume {run}: {path} holds no settings")
    return settings


def find_checkpoint(
    config: TrainConfig, checkpoints: Checkpoints, inputs: Mapping[str, str]
) -> Checkpoint | None:
    """Find the checkpoint from which to resume; None if the run is new or has none yet.

    Args:
        inputs: digests of what the run reads now.
    """
    if config.resume is None:
        return None
    checkpoint = checkpoints.latest()
    if checkpoint is None:
        check_settings_match(config, _read_settings(config.resume), 0)
        print(f"{config.resume} has no checkpoint yet: it starts from step 1")
    else:
        check_settings_match(config, checkpoint.state["settings"], checkpoint.state["step"])
        saved = checkpoint.state.get("inputs", {})  # older runs have none
        changed = [name for name in saved if saved[name] != inputs.get(name)]
        if changed and not config.accept_changes:
            raise UserError(
                f"--resume {config.resume}: {' and '.join(changed)} changed after it was started, "
                "which would make another run of it; restore it, start anew from its model with "
                "--model, or go on all the same with --accept-changes"
            )
    return checkpoint


def check_settings_match(config: TrainConfig, saved: dict[str, Any], step: int) -> None:
    """Raise a UserError if settings that decide the numbers of a run were changed.

    Settings that it does not have are printed.
    """
    new, missing = config.as_json(), DEFAULTS.keys() - saved.keys()
    saved = DEFAULTS | saved
    code = {name: saved[name] for name in CODE if saved.get(name) and not new[name]}
    if code:
        raise UserError(
            f"--resume {config.resume}: code is run only where the command line names it; if you "
            f"trust it, add {shlex.join(_flags(code))}"
        )
    may_change = MAY_CHANGE
    if compares_tokens(config.loss_config()):
        may_change = MAY_CHANGE - {"micro_batch"}
    changes = ", ".join(
        _describe_change(name, saved[name], new[name])
        for name in new
        if name not in may_change and new[name] != saved[name]
    )
    if changes:
        raise UserError(
            f"--resume {config.resume}: {changes}: these would make another run of it; leave them "
            "out, or start anew from its model with --model"
        )
    if config.steps < step:
        raise UserError(
            f"--resume {config.resume} has {step} steps behind it; got --steps {config.steps}"
        )
    if missing:
        given = ", ".join(
            f"--{name.replace('_', '-')} {DEFAULTS[name]}" for name in sorted(missing)
        )
        print(f"{config.resume} is older than some settings, which have their defaults: {given}")


def _describe_change(name: str, old: Any, new: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(new, bool):  # as the flag that changed it
        return f"--{flag} was not set" if new else f"--no-{flag} was not set"
    return f"--{flag} was {old}, not {new}"


def resume_after_torchrun_restart(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """Return a config that resumes the run if torchrun has restarted all ranks after a failure.

    The directory of a run names the torchrun process that started the first rank. That process
    outlives a restart. Any rank may recognise it, since the first rank may be on another node now.
    On one node a restart count of 0 means a first start. Of several nodes each counts only its own
    failures.
    """
    if config.resume is not None or _torchrun_process() is None:
        return config
    if config.output_dir is None:
        if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
            raise UserError("torchrun --max-restarts needs --output-dir: a restart goes on there")
        return config
    note = config.output_dir / TORCHRUN_FILE
    on_one_node = os.environ.get("GROUP_WORLD_SIZE") == "1"
    is_first = on_one_node and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    known = not is_first and note.is_file() and note.read_text() == _torchrun_process()
    if not any(ranks.all_gather(known)):
        return config
    return replace(config, resume=config.output_dir, overwrite=False)


def record_torchrun_run(run: Path) -> None:
    """Write the torchrun process, if any, into the directory: its restarts resume the run."""
    process = _torchrun_process()
    if process is not None:
        (run / TORCHRUN_FILE).write_text(process)


def _torchrun_process() -> str | None:
    """Identify the torchrun process that started this one; process numbers alone are reused."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    # Both times move when the clock is set, their difference does not.
    started = psutil.Process(os.getppid()).create_time() - psutil.boot_time()
    name = f"{os.environ['TORCHELASTIC_RUN_ID']} {socket.gethostname()} {os.getppid()}"
    return f"{name} {started:.2f}"


def how_to_go_on(config: TrainConfig, checkpoints: Checkpoints) -> str:
    """Return the command that resumes the run, and after which step."""
    settings, steps = config.as_json(), checkpoints.steps()
    if not checkpoints.run.exists():  # it was new, and nothing was written into it
        return NOTHING_TRAINED
    flags = _flags({name: settings[name] for name in COMMAND_LINE_ONLY if settings[name]})
    command = ["python", "reference/train.py", "--resume", str(checkpoints.run), *flags]
    when = f"to go on after step {steps[-1]}" if steps else "no step is saved; to start it again"
    return f"{when}: {shlex.join(command)}"


def _flags(settings: Mapping[str, Any]) -> list[str]:
    flags = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        flags += [flag, *(value if isinstance(value, list) else [value])]
    return flags
