"""Rewards: functions (prompts, completions, answers) -> one number per completion.

To add a reward, write such a function and name it in a task, or put it into a file of your own and
pass --reward file.py:function.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference.training.errors import UserError
from reference.training.tasks import answers as judge

Reward = Callable[[list[str], list[str], list[str]], list[float]]
Sample = tuple[str, str, str]  # prompt, completion, answer


@dataclass(frozen=True)
class WeightedReward:
    function: Reward
    weight: float = 1.0


def score(
    rewards: Mapping[str, WeightedReward],
    prompts: list[str],
    completions: list[str],
    answers: list[str],
) -> dict[str, Tensor]:
    """Compute the rewards by name, each [n] in fp32 and unweighted."""
    samples = list(zip(prompts, completions, answers, strict=True))
    scores = {}
    for name, reward in rewards.items():
        try:
            values = _call(reward.function, samples)
        except UserError:
            raise
        except Exception as error:
            # Name the first sample on which the function raises alone.
            failed, cause = samples[0], error
            for sample in samples:
                try:
                    _call(reward.function, [sample])
                except Exception as error_alone:
                    failed, cause = sample, error_alone
                    break
            message = " ".join(str(cause).split())
            raise UserError(
                f"reward {name!r} raised {type(cause).__name__}: {message}, {_describe(failed)}"
            ) from cause
        if not isinstance(values, list) or len(values) != len(samples):
            got = f"{len(values)} values" if isinstance(values, list) else repr(values)
            raise UserError(
                f"reward {name!r} returned {got}, not one for each of {len(samples)} completions, "
                f"called {_describe(samples[0])}"
            )
        for value, sample in zip(values, samples, strict=True):
            try:
                is_finite = abs(float(value)) <= torch.finfo(torch.float32).max
            except (TypeError, ValueError, ArithmeticError, RuntimeError):
                is_finite = False
            if not is_finite:
                raise UserError(
                    f"reward {name!r} gave {value!r}, not a finite number, {_describe(sample)}"
                )
        scores[name] = torch.tensor([float(value) for value in values], dtype=torch.float32)
    return scores


def _call(function: Reward, samples: list[Sample]):
    """Call a reward; turn a tensor, an array or a tuple into a list."""
    columns = [[sample[i] for sample in samples] for i in range(3)]
    values: Any = function(*columns)
    values = values.tolist() if hasattr(values, "tolist") else values
    return list(values) if isinstance(values, tuple) else values


def _describe(sample: Sample) -> str:
    question, completion, _ = (
        repr(text if len(text) <= 200 else text[:200] + "…") for text in sample
    )
    return f"for the completion {completion} to the question {question}"


def load_function(path: str) -> Callable[..., Any]:
    """Import the function at "package.module.function" or "file.py:function"."""
    is_file = ":" in path
    source, _, name = path.rpartition(":" if is_file else ".")
    if not source or not name:
        raise UserError(f"{path!r} is no reward: give package.module.function or file.py:function")
    if is_file and not Path(source).is_file():
        raise UserError(f"reward {path!r}: there is no file {source}")
    try:
        if is_file:
            # The whole path is the name: a file math.py must not replace the module math.
            path_name = f"reward file {Path(source).resolve()}"
            spec = importlib.util.spec_from_file_location(path_name, source)
            if spec is None or spec.loader is None:
                raise ImportError("its name does not end in .py")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # dataclasses look up their own module there
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
    except Exception as error:
        raise UserError(
            f"reward {path!r}: importing {source} raised {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"reward {path!r}: {source} has no function {name!r}")
    return function


def choose_rewards(
    own: Mapping[str, WeightedReward], more: Sequence[str], weights: Sequence[str]
) -> dict[str, WeightedReward]:
    """Combine a task's own rewards with `more`, which have the names of their functions.

    Args:
        more: paths for `load_function`, each followed by "=weight" unless that is 1.
        weights: "name=weight" for rewards of the task.
    """
    rewards = dict(own)
    for option in weights:
        name, _, weight = option.rpartition("=")
        if name not in own:
            raise UserError(
                f"--reward-weight {option}: expected name=weight with a name of {', '.join(own)}"
            )
        weight = _parse_weight(f"--reward-weight {option}", weight)
        rewards[name] = WeightedReward(own[name].function, weight)
    for option in more:
        path, equals, weight = option.rpartition("=")
        path, weight = (path, weight) if equals else (option, "1")
        name = path.rpartition(":" if ":" in path else ".")[2]
        if name in rewards or name == "overlong":  # the name of the penalty
            raise UserError(f"--reward {option}: there is already a reward named {name!r}")
        weight = _parse_weight(f"--reward {option}", weight)
        rewards[name] = WeightedReward(load_function(path), weight)
    return rewards


def _parse_weight(flag: str, weight: str) -> float:
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{flag}: the weight must be a finite number; got {weight!r}")
    return value


def per_sample(function: Callable[[str, str], float]) -> Reward:
    """Make a reward of a function (completion, answer) -> number."""

    @wraps(function)
    def reward(prompts: list[str], completions: list[str], answers: list[str]) -> list[float]:
        return [float(function(c, a)) for c, a in zip(completions, answers, strict=True)]

    return reward


@per_sample
def last_number_is(completion: str, answer: str) -> float:
    """1 if the last number in the completion is the answer."""
    return judge.last_number(completion) == answer


@per_sample
def exact_match(completion: str, answer: str) -> float:
    """1 if the completion is the answer and nothing else."""
    return completion.strip() == answer


@per_sample
def bare_number_bonus(completion: str, answer: str) -> float:
    """0.2 if the completion is the right number and nothing else.

    A wrong number gets nothing: a small model that is rewarded for the form alone soon writes "1"
    for every question.
    """
    return 0.2 * (completion.strip() == answer)


gsm8k_strict = per_sample(judge.last_line_is)
gsm8k_lenient = per_sample(judge.number_is)
math_verify = per_sample(judge.answer_is)
mentioned = per_sample(judge.mentions)


@per_sample
def think_answer(completion: str, answer: str) -> float:
    """0 to 4, the reward of mini-GRPO.

    1 each for a pair of <think> tags, a pair of <answer> tags, the right answer between the latter,
    and the right answer anywhere.
    """
    thought = 0 <= completion.find("<think>") < completion.rfind("</think>")
    inside = judge.tagged(completion)
    right_inside = inside is not None and judge.mentions(inside, answer)
    return thought + (inside is not None) + right_inside + judge.mentions(completion, answer)


def full_marks(prompts: list[str], completions: list[str], answers: list[str]) -> list[float]:
    """1 if `think_answer` is 4."""
    return [float(marks == 4) for marks in think_answer(prompts, completions, answers)]
