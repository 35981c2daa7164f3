"""Presets, and the command line over them."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from grpo_kernels import LossConfig
from reference.training.config import SECTIONS, LossSettings, TrainConfig, in_flags
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
    """Return the settings of --preset, or of the run to resume, with the other flags on top."""
    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="smollm2-135m")
    first.add_argument("--resume", type=Path)
    early = first.parse_known_args(arguments)[0]
    defaults = PRESETS[early.preset] if early.resume is None else load_settings(early.resume)
    sections = _flags(TrainConfig, ["preset"], defaults)
    for name, kind in SECTIONS.items():
        flags = _flags(kind, [setting.name for setting in fields(kind)], defaults)
        section = make_dataclass(kind.__name__, flags, namespace={"__doc__": kind.__doc__})
        sections.append((name, tyro.conf.OmitArgPrefixes[section], field(default_factory=section)))
    about = inspect.getdoc(TrainConfig)
    parsed = vars(tyro.cli(make_dataclass("Flags", sections), args=arguments, description=about))
    chosen = {name: value for section in SECTIONS for name, value in vars(parsed[section]).items()}
    return TrainConfig(preset=parsed["preset"], **chosen)


def _flags(kind: type, names: list[str], defaults: TrainConfig) -> list[tuple[str, Any, Any]]:
    """Return dataclass fields for a section of --help, with the preset's values as defaults.

    Help texts are the docstrings of the fields, joined to one line: tyro keeps line breaks.
    """
    import docstring_parser
    import tyro

    types = get_type_hints(kind)
    documented = LossConfig if kind is LossSettings else kind
    params = docstring_parser.parse_from_object(documented).params
    texts = {param.arg_name: " ".join(str(param.description).split()) for param in params}
    if kind is LossSettings:
        texts = {name: in_flags(text) for name, text in texts.items()}
        texts["max_completion_length"] += " None: --max-new-tokens."
        texts["loss"] = "One of the above."
        texts["kl_estimator"] = (  # the exact sums over the vocabulary are no choices here
            "Estimate of that KL on the sampled tokens; the README compares their gradients."
        )
    flags = []
    for name in names:
        annotated = Annotated[types[name], tyro.conf.arg(help=texts[name])]
        flags.append((name, annotated, field(default=getattr(defaults, name))))
    return flags
