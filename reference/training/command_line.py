"""Presets, and the command line over them."""

from __future__ import annotations

import argparse
import inspect
import shutil
import sys
import textwrap
from dataclasses import field, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from grpo_kernels import LossConfig
from reference.training.config import SECTIONS, LossSettings, TrainConfig, in_flags
from reference.training.flag_errors import check_arguments
from reference.training.run.resume import load_settings

PRESETS = {
    "smollm2-135m": TrainConfig(),
    "tiny": TrainConfig(
        preset="tiny",
        model="scratch",
        task="reverse",
        steps=700,
        prompts=32,
        max_new_tokens=7,  # six digits and the end
        learning_rate=4e-4,
        warmup_steps=20,
        print_every=50,
        dashboard_every=100,
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


# Defaults that a task changes, whatever the preset: with one question there is one group per step.
ONE_QUESTION = {"prompts": 1, "group_size": 32, "max_new_tokens": 48, "steps": 24}
TASK_DEFAULTS = {"capital-of-brazil": ONE_QUESTION, "question": ONE_QUESTION}

CHAT_TEMPERATURE = 0.7  # the default of --temperature under --chat

# The flags of --help, those that most people change first.
FIRST = (
    *("model", "lora_rank", "gradient_checkpointing"),
    *("task", "data", "reward"),
    *("steps", "prompts", "group_size", "max_new_tokens", "temperature", "sampler"),
    *("teacher",),
    *("loss", "beta"),
    *("learning_rate", "micro_batch"),
    *("eval_only", "chat"),
    *("seed", "output_dir", "resume"),
)


def parse_command_line(arguments: list[str] | None = None) -> TrainConfig:
    """Return the settings of --preset, or of the run to resume, with the other flags on top."""
    import tyro

    arguments = sys.argv[1:] if arguments is None else arguments
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("-h", "--help", nargs="?", const="first")
    first.add_argument("--preset", nargs="?", default="smollm2-135m")
    first.add_argument("--task", nargs="?")
    first.add_argument("--teacher", nargs="?")
    first.add_argument("--teacher-coef", "--teacher_coef", nargs="?", default="None")
    first.add_argument("--resume", nargs="?", type=Path)
    first.add_argument("--chat", nargs="?", const=True)
    early = first.parse_known_args(arguments)[0]
    if early.help is None:
        check_arguments(arguments, get_type_hints(TrainConfig))
    defaults = PRESETS.get(early.preset, TrainConfig())
    if early.task in TASK_DEFAULTS:
        defaults = replace(defaults, task=early.task, **TASK_DEFAULTS[early.task])
    if early.teacher is not None and early.teacher_coef == "None":  # it has a loss of its own
        defaults = replace(defaults, loss=TrainConfig.loss)
    if early.help is not None and early.help != "all":
        print(_first_help(defaults))
        raise SystemExit(0)
    if early.resume is not None:
        defaults = load_settings(early.resume)
    if early.chat:
        defaults = replace(defaults, temperature=CHAT_TEMPERATURE)
    sections = _flags(TrainConfig, ["preset"], defaults)
    for name, kind in SECTIONS.items():
        flags = _flags(kind, [setting.name for setting in fields(kind)], defaults)
        section = make_dataclass(kind.__name__, flags, namespace={"__doc__": kind.__doc__})
        sections.append((name, tyro.conf.OmitArgPrefixes[section], field(default_factory=section)))
    about = inspect.getdoc(TrainConfig)
    given = arguments if early.help is None else ["--help"]
    parsed = vars(tyro.cli(make_dataclass("Flags", sections), args=given, description=about))
    chosen = {name: value for section in SECTIONS for name, value in vars(parsed[section]).items()}
    return TrainConfig(preset=parsed["preset"], **chosen)


def _first_help(defaults: TrainConfig) -> str:
    """Describe the flags in FIRST, each with its default and the first sentence of its help."""
    lines = [
        "usage: python reference/train.py [--flag value ...]",
        "",
        f"Flags that most people change first, with the defaults of --preset {defaults.preset}.",
        "--help all describes every flag; the README has examples.",
    ]
    rows = {"preset": {"preset": ", ".join(PRESETS) + ": the defaults of the other flags."}}
    for section, kind in SECTIONS.items():
        rows[section] = {name: x for name, x in _help_texts(kind).items() if name in FIRST}
    rows["loss"].pop("loss")
    rows["loss"] = {"loss": ", ".join(LossConfig.objectives())} | rows["loss"]
    width = min(shutil.get_terminal_size().columns, 100)
    for section, texts in rows.items():
        lines += ["", section] if texts else []
        for name, text in texts.items():
            default = getattr(defaults, name)
            value = "" if default is False or default == () else f" {default}"
            flag = f"  --{name.replace('_', '-')}{value}"
            sentence = text.partition(". ")[0].removesuffix(".")
            lines += textwrap.wrap(
                f"{flag:27} {sentence}",
                width,
                subsequent_indent=" " * 28,
                break_on_hyphens=False,
            )
    return "\n".join(lines)


def _flags(kind: type, names: list[str], defaults: TrainConfig) -> list[tuple[str, Any, Any]]:
    """Return dataclass fields for a section of --help all, with defaults of the preset."""
    import tyro

    types, texts = get_type_hints(kind), _help_texts(kind)
    flags = []
    for name in names:
        annotated = Annotated[types[name], tyro.conf.arg(help=texts[name])]
        flags.append((name, annotated, field(default=getattr(defaults, name))))
    return flags


def _help_texts(kind: type) -> dict[str, str]:
    """Return the help texts of a section: the docstrings of its fields, each on one line."""
    import docstring_parser

    documented = LossConfig if kind is LossSettings else kind
    params = docstring_parser.parse_from_object(documented).params
    texts = {param.arg_name: " ".join(str(param.description).split()) for param in params}
    if kind is LossSettings:
        texts = {name: in_flags(text) for name, text in texts.items()}
        texts["max_completion_length"] += " None: --max-new-tokens."
        texts["nll_coef"] = (
            "Coefficient of the mean of -logprob over the tokens of the correct completions (VAPO, "
            "arXiv:2504.05118)."
        )
        texts["completions_per_prompt"] += " None: --group-size, the only value here."
        texts["loss"] = "One of the above."
        texts["kl_estimator"] = (  # the exact sums over the vocabulary are no choices here
            "Estimate of that KL on the sampled tokens; the README compares their gradients."
        )
    return texts
