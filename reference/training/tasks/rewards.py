"""Rewards: functions that give each completion a number, or None where they do not apply.

A reward is called by keyword, as in TRL, with those of these lists that its signature names, or all
if it takes **kwargs. Each has one entry per completion:

    prompts       the text, or the messages if the prompt is a conversation
    completions   the text, or [{"role": "assistant", "content": text}] for a conversation
    answer        the ground truth, None if there is none; `answers` is another name of it
    <column>      the entry of any other column of the data, None in a row without it

To add a reward, write such a function and name it in a task, or put it into a file of your own and
pass --reward file.py:function.
"""

from __future__ import annotations

import ast
import asyncio
import copy
import importlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference.training.errors import UserError, did_you_mean, near_path
from reference.training.tasks import answers as judge
from reference.training.tasks.questions import Question

Reward = Callable[..., Sequence[float | None]]
_SUM = re.compile(r"(?:([0-9]{1,9}) ?\+ ?([0-9]{1,9}) ?= ?)?([0-9]{1,9})\.?")
Completion = str | list[dict[str, str]]


@dataclass(frozen=True)
class WeightedReward:
    function: Reward
    weight: float = 1.0


def score(
    rewards: Mapping[str, WeightedReward], questions: Sequence[Question], texts: Sequence[str]
) -> dict[str, Tensor]:
    """Compute the rewards of completions by name, each [n] in fp32, unweighted, NaN for None.

    Args:
        questions: the question of each completion.
        texts: the completions.
    """
    samples = list(zip(questions, texts, strict=True))
    scores = {}
    for name, reward in rewards.items():
        who = f"reward {name!r}"
        try:
            values = call(reward.function, who, questions, texts)
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # exit() in a completion that is run as code
            # Name the first sample on which the function raises alone.
            failed, cause = samples[0], error
            for question, text in samples:
                try:
                    call(reward.function, who, [question], [text])
                except (Exception, SystemExit) as error_alone:
                    failed, cause = (question, text), error_alone
                    break
            message = " ".join(str(cause).split())
            raise UserError(
                f"{who} raised {type(cause).__name__}: {message}, {_describe(*failed)}"
            ) from cause
        if not isinstance(values, list) or len(values) != len(samples):
            got = f"{len(values)} values" if isinstance(values, list) else _short(values)
            raise UserError(
                f"{who} returned {got}, not one for each of {len(samples)} completions, "
                f"called {_describe(*samples[0])}"
            )
        # A float of a tensor that requires gradients would be a warning.
        values = [x.detach() if isinstance(x, Tensor) else x for x in values]
        for value, sample in zip(values, samples, strict=True):
            try:
                is_finite = value is None or abs(float(value)) <= torch.finfo(torch.float32).max
            except (TypeError, ValueError, ArithmeticError, RuntimeError):
                is_finite = False
            if not is_finite:
                raise UserError(
                    f"{who} gave {_short(value)}, not a finite number, {_describe(*sample)}"
                )
        numbers = [math.nan if value is None else float(value) for value in values]
        scores[name] = torch.tensor(numbers, dtype=torch.float32)
    return scores


def total_reward(rewards: Mapping[str, WeightedReward], by_name: Mapping[str, Tensor]) -> Tensor:
    """Return the weighted sum [n] of the rewards that apply; NaN if none does."""
    each = torch.stack([reward.weight * by_name[name] for name, reward in rewards.items()])
    return torch.where(each.isnan().all(0), math.nan, each.nansum(0))


def call(
    function: Callable[..., Any], who: str, questions: Sequence[Question], texts: Sequence[str]
) -> Any:
    """Call a reward with the lists that its signature names; turn tensor or tuple into a list.

    A coroutine is run to its end.

    The lists are copies: a function that changes them changes no question.

    Args:
        who: what error messages call the function.
    """
    ground_truths = [question.answer for question in questions]
    names = {name: None for question in questions for name in question.columns}
    inputs = {
        "answers": ground_truths,
        **{name: [question.columns.get(name) for question in questions] for name in names},
        "prompts": [question.prompt for question in questions],
        "completions": [
            text if isinstance(question.prompt, str) else [{"role": "assistant", "content": text}]
            for question, text in zip(questions, texts, strict=True)
        ],
        "answer": ground_truths,
    }
    parameters = inspect.signature(function).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        for parameter in parameters:
            is_required = parameter.default is parameter.empty
            if is_required and parameter.kind is not parameter.VAR_POSITIONAL:
                if parameter.name not in inputs:
                    hint = did_you_mean(parameter.name, inputs)
                    known = ", ".join(name for name in inputs if name != "answers")
                    raise UserError(
                        f"{who} has the parameter {parameter.name!r}, but a reward receives "
                        f"{known}{hint}"
                    )
        wanted = {parameter.name for parameter in parameters}
        inputs = {name: values for name, values in inputs.items() if name in wanted}
    values: Any = function(**copy.deepcopy(inputs))
    if inspect.iscoroutine(values):
        values = asyncio.run(values)
    values = values.tolist() if hasattr(values, "tolist") else values
    return list(values) if isinstance(values, tuple) else values


def _describe(question: Question, text: str) -> str:
    return f"for the completion {_short(text)} to the question {_short(question.text)}"


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else shown[:200] + "…"


def load_function(path: str) -> Callable[..., Any]:
    """Import the function at "package.module.function" or "file.py:function"."""
    names_file_only = path.endswith(".py")
    is_file = names_file_only or ":" in path
    source, _, name = path.rpartition(":" if is_file else ".")
    if names_file_only:
        source = path
    elif not source or not name:
        raise UserError(f"{path!r} is no reward: give package.module.function or file.py:function")
    if is_file and not Path(source).is_file():
        raise UserError(f"reward {path!r}: there is no file {source}{near_path(Path(source))}")
    if names_file_only:
        functions = []
        with suppress(ValueError, SyntaxError):
            tree = ast.parse(Path(path).read_bytes())
            functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        public = [name for name in functions if not name.startswith("_")] or ["function"]
        choices = " or ".join(f"{path}:{name}" for name in public)
        raise UserError(f"reward {path!r}: name a function of the file, {choices}")
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
    except (Exception, SystemExit) as error:
        raise UserError(
            f"reward {path!r}: importing {source} raised {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [known for known, value in vars(module).items() if callable(value)]
        near = did_you_mean(name, functions)
        raise UserError(f"reward {path!r}: {source} has no function {name!r}{near}")
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
    """Make a reward of a function (completion, answer) -> number; without an answer it is None."""

    # Not functools.wraps: it would give the reward the signature of `function`.
    def reward(
        prompts: list[Any], completions: list[Completion], answer: list[str | None]
    ) -> list[float | None]:
        return [
            None if truth is None else float(function(text_of(completion), truth))
            for completion, truth in zip(completions, answer, strict=True)
        ]

    reward.__name__, reward.__doc__ = function.__name__, function.__doc__
    return reward


def text_of(completion: Completion) -> str:
    """Return the text of a completion, which rewards receive as a text or as messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


@per_sample
def last_number_is(completion: str, answer: str) -> float:
    """1 if the last number in the completion is the answer."""
    return judge.last_number(completion) == answer


@per_sample
def exact_match(completion: str, answer: str) -> float:
    """1 if the completion is the answer and nothing else."""
    return completion.strip() == answer


@per_sample
def bare_sum(completion: str, answer: str) -> float:
    """1 if the completion is the right number, or a sum that has this result, and nothing else.

    A wrong number gets nothing: a small model that is rewarded for the form alone soon writes "1"
    for every question.
    """
    found = _SUM.fullmatch(completion.strip())
    if found is None:
        return 0.0
    first, second, result = found.groups()
    return float(result == answer and (first is None or int(first) + int(second) == int(result)))


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


def full_marks(
    prompts: list[Any], completions: list[Completion], answer: list[str | None]
) -> list[float | None]:
    """1 if `think_answer` is 4."""
    marks = think_answer(prompts, completions, answer)
    return [None if mark is None else float(mark == 4) for mark in marks]
