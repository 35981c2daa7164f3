"""Sets of defaults by name, and the command line over them."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from reference.training.config import SECTIONS, TrainConfig
from reference.training.run.resume import load_settings

PRESETS = {
    "smollm2-135m": TrainConfig(),
    "tiny": TrainConfig(
        preset="tiny",
        model="scratch",
        task="reverse",
        steps=400,
        prompts=16,
        max_new_tokens=7,  # six digits and the end
        learning_rate=3e-4,
        warmup_steps=0,
        print_every=50,
        dashboard_every=100,
        checkpoint_every=100,
        threads=1,  # matrices this small lose up to 20 times when shared between threads
    ),
    "llama-3.2-1b": TrainConfig(
        preset="llama-3.2-1b",
        model="llama-3.2-1b",
        task="gsm8k",
        steps=500,
        prompts=16,
        max_new_tokens=320,
        loss="dapo",
        learning_rate=1e-6,
        warmup_steps=10,
        micro_batch=4,
        gradient_checkpointing=True,
        eval_every=50,
        eval_questions=200,
        mask_truncated=True,
    ),
}


def parse_command_line(arguments: list[str] | None = None) -> TrainConfig:
    """The preset named in the arguments, or the run to resume, overridden by the other flags."""
    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="smollm2-135m")
    first.add_argument("--resume", type=Path)
    early = first.parse_known_args(arguments)[0]
    defaults = PRESETS[early.preset] if early.resume is None else load_settings(early.resume)
    panels = _flags(TrainConfig, ["preset"], defaults)
    for name, kind in SECTIONS.items():
        flags = _flags(kind, [each.name for each in fields(kind)], defaults)
        panel = make_dataclass(kind.__name__, flags, namespace={"__doc__": kind.__doc__})
        panels.append((name, tyro.conf.OmitArgPrefixes[panel], field(default_factory=panel)))
    about = inspect.getdoc(TrainConfig)
    found = vars(tyro.cli(make_dataclass("Flags", panels), args=arguments, description=about))
    chosen = {name: value for panel in SECTIONS for name, value in vars(found[panel]).items()}
    return TrainConfig(preset=found["preset"], **chosen)


def _flags(kind: type, names: list[str], defaults: TrainConfig) -> list[tuple[str, Any, Any]]:
    """Fields of a class for a panel of --help, their texts on one line: tyro keeps line breaks."""
    import docstring_parser
    import tyro

    types = get_type_hints(kind)
    texts = {x.arg_name: x.description for x in docstring_parser.parse_from_object(kind).params}
    flags = []
    for name in names:
        text = tyro.conf.arg(help=" ".join(texts[name].split()))
        flags.append((name, Annotated[types[name], text], field(default=getattr(defaults, name))))
    return flags
