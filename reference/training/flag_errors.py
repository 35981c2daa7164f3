"""Errors in the command line, as one line that names the flag that was probably meant."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from grpo_kernels.validation import nearest
from reference.training.errors import UserError, did_you_mean

# Flags, and their names in TRL, verl, OpenRLHF and other trainers.
OTHER_NAMES = {
    "--advantage": "adv-estimator advantage-estimator scale-rewards",
    "--answer-column": "answer-field answer-key label-key",
    "--async-rollout": "async async-mode async-training fully-async off-policy-steps one-step-off",
    "--autocast": "bf16 dtype fp16 mixed-precision precision torch-dtype",
    "--beta": "init-kl-coef kl kl-coef kl-coeff kl-loss-coef",
    "--cache-dir": "hf-home",
    "--checkpoint-every": "save-every save-freq save-interval save-steps",
    "--data": "data-path dataset dataset-name dataset-path train-data train-file train-files",
    "--dual-clip": "clip-ratio-c",
    "--entropy-coef": "ent-coef entropy-bonus entropy-coeff",
    "--epsilon-high": "clip-high clip-ratio-high",
    "--epsilon-low": "clip-low clip-ratio-low",
    "--epsilon-low and --epsilon-high": "clip clip-eps clip-range clip-ratio cliprange eps eps-clip"
    " epsilon",
    "--eval-every": "eval-freq eval-interval eval-steps test-freq",
    "--group-size": "g group k n n-samples n-samples-per-prompt num-generations"
    " num-return-sequences num-samples rollout-n rollouts samples-per-prompt",
    "--inner-iterations": "iterations mu num-iterations ppo-epochs update-epochs",
    "--kl-estimator": "kl-loss-type kl-penalty kl-type",
    "--learning-rate": "actor-learning-rate lr lrate",
    "--lora-rank": "lora lora-dim lora-r use-lora use-peft",
    "--loss": "algo algorithm loss-fn loss-mode loss-type objective",
    "--aggregation": "loss-agg-mode",
    "--max-grad-norm": "clip-grad clip-grad-norm grad-clip gradient-clipping",
    "--max-new-tokens": "generate-max-len max-length max-response-length max-tokens"
    " response-length",
    "--micro-batch": "gradient-accumulation-steps micro-batch-size micro-train-batch-size"
    " ppo-micro-batch-size",
    "--minibatches": "mini-batch-size num-minibatches ppo-mini-batch-size",
    "--model": "base-model checkpoint model-id model-name model-name-or-path model-path pretrain",
    "--output-dir": "o out output output-path run-dir save-dir save-path",
    "--print-every": "log-every log-interval logging-steps",
    "--prompt-column": "input-key prompt-field prompt-key",
    "--prompts": "b batch batch-size bs generation-batch-size per-device-train-batch-size"
    " prompts-per-step questions rollout-batch-size train-batch-size",
    "--ratio-level": "importance-sampling-level",
    "--resume": "continue resume-from resume-from-checkpoint",
    "--reward": "reward-fn reward-func reward-funcs reward-function rewards",
    "--sampler URL": "server-url vllm-server-base-url vllm-server-host vllm-url",
    "--sampler vllm": "use-vllm vllm",
    "--sampler-timeout": "vllm-server-timeout",
    "--seed": "random-seed",
    "--steps": "epoch epochs iters max-iters max-steps n-epochs num-epochs num-steps"
    " num-train-epochs total-epochs total-steps",
    "--system": "system-prompt",
    "--task": "env environment",
    "--temperature": "temp",
    "--top-entropy": "top-entropy-quantile",
    "--vllm-memory": "gpu-memory-utilization vllm-gpu-memory-utilization",
    "--wandb": "report-to use-wandb",
    "--warmup-steps": "lr-warmup-steps warmup warmup-ratio",
    "--help all": "help-all help-full",
}
# Flags of other trainers without a counterpart here.
ABSENT = {
    "frequency-penalty presence-penalty repetition-penalty": "a penalty would make the sampler "
    "another policy than the one that the loss reads",
    "lr-schedule lr-scheduler lr-scheduler-type scheduler": "the learning rate is constant after "
    "--warmup-steps",
    "optim optimizer weight-decay": "the optimiser is AdamW without weight decay",
    "max-prompt-length prompt-length": "prompts are used whole",
    "gpus n-gpus n-gpus-per-node ngpus num-gpus num-processes": "torchrun --nproc-per-node starts "
    "several processes",
    "config config-file": "all settings are flags",
}


def check_arguments(arguments: Sequence[str], types: Mapping[str, Any]) -> None:
    """Raise a UserError at the first argument that is no flag, or no value of its flag.

    tyro would print a box of many lines.

    Args:
        arguments: a token that begins with a dash and a letter is a flag, as in tyro.
        types: of the settings, by name.
    """
    flags = {name.replace("_", "-"): kind for name, kind in types.items()}
    flags |= {f"no-{name}": kind for name, kind in flags.items() if kind is bool}
    meant = {other: flag for flag, names in OTHER_NAMES.items() for other in names.split()}
    meant |= {name: f"--{name}" for name in flags}
    by_value = {  # --dapo is --loss dapo
        choice.replace("_", "-"): f"--{name} {choice}"
        for name, kind in flags.items()
        for choice in _choices(kind)
    }
    for token, values in _group(arguments):
        if token[:2] == "--" and (name := token[2:].replace("_", "-")) in flags:
            _check_values(token, flags[name], values)
            continue
        # verl's actor_rollout_ref.actor.optim.lr=1e-6
        name = token.lstrip("-").replace("_", "-").rpartition(".")[2]
        said = f"there is no flag {token}" if token.startswith("-") else f"{token!r} is no flag"
        for others, reason in ABSENT.items():
            if name in others.split():
                raise UserError(f"{said}: {reason}")
        long_names = [other for other in meant if len(other) > 3]  # bias is not bs
        near = [meant[other] for other in nearest(name, long_names)]
        found = meant.get(name) or by_value.get(name) or next(iter(near), None)
        hint = "--help all lists every flag" if found is None else f"did you mean {found}?"
        raise UserError(f"{said}; {hint}")


def _group(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """List each flag with its values. A value before every flag counts as a flag."""
    groups: list[tuple[str, list[str]]] = []
    for token in arguments:
        is_number = re.fullmatch(r"-(inf|infinity|nan)", token)
        if groups and (is_number or not re.match(r"--?[A-Za-z]", token)):
            groups[-1][1].append(token)
        else:
            flag, equals, value = token.partition("=")
            groups.append((flag, [value] if equals else []))
    return groups


def _choices(kind: Any) -> list[str]:
    """List the values of a Literal, or of a Literal or None."""
    options = (kind, *get_args(kind))
    return [x for option in options if get_origin(option) is Literal for x in get_args(option)]


def _check_values(flag: str, kind: Any, values: list[str]) -> None:
    """Raise a UserError unless the values of a flag are of its type."""
    if kind is bool:
        if values:
            raise UserError(f"{flag} is on or off and takes no value; got {shlex.join(values)}")
        return
    options = (kind, *get_args(kind))  # of int | None too
    if any(get_origin(option) is tuple for option in options):
        return
    is_text = {str, Path} & {*options}
    if not values:
        dash = f"; one that begins with - is written {flag}=-..." if is_text else ""
        raise UserError(f"{flag} needs a value{dash}")
    choices = _choices(kind)
    if len(values) > 1:
        quoted = f": write {flag} {shlex.quote(' '.join(values))}" if is_text else ""
        raise UserError(f"{flag} takes one value; got {' '.join(values)}{quoted}")
    (value,) = values
    if NoneType in options and value == "None":
        return
    if value in choices:
        return
    if choices and not {int, float} & {*options}:
        expected = f"{flag} {value}: expected one of {', '.join(choices)}"
        raise UserError(expected + did_you_mean(value, choices))
    for number, name in ((int, "an integer"), (float, "a number")):
        if number in options:
            try:
                number(value)
            except ValueError:
                others = [*choices, *(["None"] if NoneType in options else [])]
                expected = " or ".join([name, *others])
                raise UserError(f"{flag} must be {expected}; got {value}") from None
