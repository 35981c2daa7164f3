"""Rewards: one number per completion.

To add one, write a function (prompts, completions, answers) -> one number per completion and name
it in a task, or keep it in a file of your own and pass --reward file.py:function.
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
from types import ModuleType

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
    """The rewards by name, each [n] in fp32 and not yet weighted.

    Raises:
        UserError: a reward raises, returns another number of values than n, or a value that is no
            finite number; the message names the reward and the sample.
    """
    samples = list(zip(prompts, completions, answers, strict=True))
    return {name: _score(name, each.function, samples) for name, each in rewards.items()}


def _score(name: str, function: Reward, samples: list[Sample]) -> Tensor:
    try:
        values = _call(function, samples)
    except UserError:
        raise
    except Exception as error:
        sample, first = _first_failure(function, samples) or (samples[:1], error)
        said = " ".join(str(first).split())
        raise UserError(
            f"reward {name!r} raised {type(first).__name__}: {said}, {_where(sample)}"
        ) from first
    if not isinstance(values, list) or len(values) != len(samples):
        got = f"{len(values)} values" if isinstance(values, list) else repr(values)
        raise UserError(
            f"reward {name!r} returned {got}, not one for each of {len(samples)} completions, "
            f"called {_where(samples[:1])}"
        )
    for value, sample in zip(values, samples, strict=True):
        if not _is_finite(value):
            raise UserError(
                f"reward {name!r} gave {value!r}, not a finite number, {_where([sample])}"
            )
    return torch.tensor([float(value) for value in values], dtype=torch.float32)


def _call(function: Reward, samples: list[Sample]):
    """What the function returns for the samples; a tensor, an array or a tuple as a list."""
    columns = [[sample[i] for sample in samples] for i in range(3)]
    values = function(*columns)
    values = values.tolist() if hasattr(values, "tolist") else values
    return list(values) if isinstance(values, tuple) else values


def _first_failure(
    function: Reward, samples: list[Sample]
) -> tuple[list[Sample], Exception] | None:
    """The first sample on which a function that raised for all of them raises alone."""
    for sample in samples:
        try:
            _call(function, [sample])
        except Exception as error:
            return [sample], error
    return None


def _is_finite(value) -> bool:
    """As fp32, where 1e39 is not."""
    try:
        return abs(float(value)) <= torch.finfo(torch.float32).max
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        return False


def _where(samples: list[Sample]) -> str:
    if not samples:
        return "for no completions"
    question, completion, _ = samples[0]
    return f"for the completion {_shown(completion)} to the question {_shown(question)}"


def _shown(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "…")


def load_function(path: str) -> Reward:
    """The function at "package.module.function" or "file.py:function"."""
    is_file = ":" in path
    source, _, name = path.rpartition(":" if is_file else ".")
    if not source or not name:
        raise UserError(f"{path!r} is no reward: give package.module.function or file.py:function")
    if is_file and not Path(source).is_file():
        raise UserError(f"reward {path!r}: there is no file {source}")
    try:
        module = _run_file(Path(source)) if is_file else importlib.import_module(source)
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
    """A task's own rewards and `more`, under the names of their functions.

    Args:
        more: paths for `load_function`, each followed by "=weight" unless that is 1.
        weights: "name=weight" for rewards of the task.
    """
    rewards = dict(own)
    for each in weights:
        name, _, weight = each.rpartition("=")
        if name not in own:
            raise UserError(
                f"--reward-weight {each}: expected name=weight with a name of {', '.join(own)}"
            )
        rewards[name] = WeightedReward(own[name].function, _weight("--reward-weight", each, weight))
    for each in more:
        path, equals, weight = each.rpartition("=")
        path, weight = (path, weight) if equals else (each, "1")
        name = path.rpartition(":" if ":" in path else ".")[2]
        if name in rewards or name == "overlong":  # the penalty's
            raise UserError(f"--reward {each}: there is already a reward named {name!r}")
        rewards[name] = WeightedReward(load_function(path), _weight("--reward", each, weight))
    return rewards


def _weight(flag: str, given: str, weight: str) -> float:
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{flag} {given}: the weight must be a finite number; got {weight!r}")
    return value


def _run_file(path: Path) -> ModuleType:
    # The whole path as name: a file math.py must not take the place of the module math.
    spec = importlib.util.spec_from_file_location(f"reward file {path.resolve()}", path)
    if spec is None or spec.loader is None:
        raise ImportError("its name does not end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


def per_sample(function: Callable[[str, str], float]) -> Reward:
    """The reward that applies (completion, answer) -> number to each sample."""

    @wraps(function)
    def reward(prompts: list[str], completions: list[str], answers: list[str]) -> list[float]:
        return [float(function(c, a)) for c, a in zip(completions, answers, strict=True)]

    return reward


@per_sample
def last_number_is(completion: str, answer: str) -> float:
    """1 if the last number written is the answer."""
    return judge.last_number(completion) == answer


@per_sample
def exact_match(completion: str, answer: str) -> float:
    """1 for the answer and nothing else."""
    return completion.strip() == answer


@per_sample
def bare_number_bonus(completion: str, answer: str) -> float:
    """0.2 for the right number and nothing else.

    A wrong answer earns none of it: rewarded for the form alone, a small model soon answers "1" to
    everything.
    """
    return 0.2 * (completion.strip() == answer)


gsm8k_strict = per_sample(judge.last_line_is)
gsm8k_lenient = per_sample(judge.number_is)
math_verify = per_sample(judge.answer_is)


@per_sample
def think_answer(completion: str, answer: str) -> float:
    """0 to 4, mini-GRPO's reward: 1 each for a pair of <think> tags, a pair of <answer> tags, the
    right answer inside the latter, and the right answer anywhere."""
    thought = 0 <= completion.find("<think>") < completion.rfind("</think>")
    inside = judge.tagged(completion)
    right_inside = inside is not None and judge.mentions(inside, answer)
    return thought + (inside is not None) + right_inside + judge.mentions(completion, answer)


@per_sample
def full_marks(completion: str, answer: str) -> float:
    """1 where `think_answer` gives its 4."""
    return think_answer([""], [completion], [answer]) == [4.0]


@per_sample
def mentioned(completion: str, answer: str) -> float:
    """1 if the answer occurs anywhere."""
    return judge.mentions(completion, answer)
