"""Sets of defaults by name, and the command line over them."""

from __future__ import annotations

import argparse

from reference.config import TrainConfig

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
    """The preset named in the arguments, overridden by the other flags."""
    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="smollm2-135m")
    preset = first.parse_known_args(arguments)[0].preset
    return tyro.cli(TrainConfig, args=arguments, default=PRESETS[preset])
