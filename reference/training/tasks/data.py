"""Questions that are not made by a line of code: JSONL files, GSM8K, reasoning-gym."""

from __future__ import annotations

import difflib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from reference.training.errors import UserError, one_line
from reference.training.tasks import answers

HELD_OUT = 128
GSM8K = "openai/gsm8k"
LAYOUT = (
    "--data wants a directory with train.jsonl and test.jsonl, or one .jsonl file, which is split"
)
GYM_QUESTIONS = 1000
# reasoning-gym's item i is made from the seed plus i: seeds must lie further apart than sizes.
GYM_SEEDS = 1_000_000
# Their verifiers hand the completion to Python's eval, or to SymPy's parser, which evaluates too.
GYM_RUNS_COMPLETIONS = frozenset(
    {
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)


@dataclass(frozen=True)
class Question:
    text: str
    answer: str


Split = tuple[list[Question], list[Question]]  # to train on, held out
Verifier = Callable[[str, str], float]  # (question, answer) -> 0 to 1


def split(questions: Iterable[Question], seed: int) -> Split:
    """The first 128 after a seeded shuffle are held out, of a small set at most a fifth."""
    shuffled = _distinct(questions)
    random.Random(seed).shuffle(shuffled)
    count = min(HELD_OUT, len(shuffled) // 5)
    return shuffled[count:], shuffled[:count]


def _distinct(questions: Iterable[Question], without: Iterable[Question] = ()) -> list[Question]:
    """In their order; of several with the same text the first."""
    seen = {question.text for question in without}
    return [q for q in questions if q.text not in seen and not seen.add(q.text)]


def read(data: Path, seed: int, final: Callable[[str], str] = str.strip) -> Split:
    """The questions of a JSONL file, split, or of a directory's train.jsonl and test.jsonl.

    A question of the test file is not trained on, even where the training file repeats it.

    Args:
        final: the answer to compare with, from the answer as it is written; ValueError if it has
            none.
    """
    if data.is_dir():
        held_out = _distinct(read_jsonl(data / "test.jsonl", final))
        train = _distinct(read_jsonl(data / "train.jsonl", final), without=held_out)
    else:
        train, held_out = split(read_jsonl(data, final), seed)
    if not train or not held_out:
        raise UserError(
            f"--data {data}: {len(train)} questions to train on and {len(held_out)} held out; "
            "expected at least one of each, in one file at least five different questions"
        )
    return train, held_out


def read_jsonl(path: Path, final: Callable[[str], str] = str.strip) -> list[Question]:
    """One question per line: {"prompt": ..., "answer": ...}, or "question" for "prompt"."""
    questions = []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    questions.append(_question(line, f"{path}:{number}", final))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; {LAYOUT}") from None
    return questions


def _question(line: str, place: str, final: Callable[[str], str]) -> Question:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected an object; got {line.strip()[:80]}")
    text = row.get("prompt", row.get("question"))
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{place}: expected a text under "prompt" or "question"; got {text!r}')
    answer = row.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool) and math.isfinite(answer):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise UserError(f'{place}: expected a text or a number under "answer"; got {answer!r}')
    try:
        return Question(text, final(answer))
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None


def gsm8k(data: Path | None, seed: int) -> Split:
    """GSM8K from the model hub, or from files of its layout."""
    if data is not None:
        return read(data, seed, gsm8k_answer)
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            '--task gsm8k needs the package datasets: pip install "grpo_kernels[tasks]"; '
            f"or --data: {LAYOUT}"
        ) from None
    try:
        parts = load_dataset(GSM8K, "main")
    except Exception as error:  # no connection, no such set, a broken cache: each its own type
        raise UserError(
            f"--task gsm8k: {GSM8K} could not be had from the hub ({one_line(error)}); without "
            f'it, {LAYOUT}; each line is {{"question": ..., "answer": "... #### 18"}}'
        ) from None
    train, held_out = (
        [Question(row["question"], gsm8k_answer(row["answer"])) for row in parts[name]]
        for name in ("train", "test")
    )
    return _distinct(train, without=held_out), _distinct(held_out)


def gsm8k_answer(solution: str) -> str:
    """The number after "####", without thousands separators; a bare number is its own answer."""
    answer = solution.rpartition("####")[2].strip().removeprefix("$")
    if not answers.is_number(answer):
        raise ValueError(f'expected a number, after "####" in a solution; got {answer[-80:]!r}')
    return answer.replace(",", "")


def reasoning_gym(
    name: str, seed: int, settings: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Split, Verifier]:
    """Questions of a generator with its settings, and its verifier.

    The held-out questions come from another seed, at most a fifth as many as there are different
    ones to train on, and are taken out of those.

    Raises:
        UserError: reasoning-gym has no such generator, or it needs other settings, or its verifier
            runs completions as code.
    """
    gym = _gym_with(name)
    first = GYM_SEEDS * seed
    try:
        to_train = gym.create_dataset(name, size=GYM_QUESTIONS, seed=first, **settings)
        to_ask = gym.create_dataset(name, size=HELD_OUT, seed=first + GYM_SEEDS // 2, **settings)
        known = [[(entry, each) for entry in each] for each in (to_train, to_ask)]
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(
            f"reasoning-gym/{name} does not work with the settings {dict(settings)}: "
            f"{one_line(error)}"
        ) from None
    trained, asked = (_distinct(_gym_question(entry) for entry, _ in each) for each in known)
    held_out = asked[: len(trained) // 5]
    if not held_out:
        raise UserError(f"reasoning-gym/{name} has only {len(trained)} different questions")

    of_question = {entry["question"]: (entry, each) for entry, each in itertools.chain(*known)}

    def verify(question: str, answer: str) -> float:
        entry, gym_set = of_question[question]
        try:
            return float(gym_set.score_answer(answer, entry))
        except Exception:  # prime_factorization, for one, raises ValueError at "hello"
            return 0.0

    return (_distinct(trained, without=held_out), held_out), verify


def _gym_question(entry: dict) -> Question:
    """Where several answers are right, an entry may name none."""
    return Question(entry["question"], entry["answer"] or "")


def _gym_with(name: str) -> ModuleType:
    try:
        import reasoning_gym as gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise UserError(
            f"--task reasoning-gym/{name} needs the package reasoning-gym: "
            'pip install "grpo_kernels[tasks]"'
        ) from None
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=5, cutoff=0.4)
        near = f"near it: {', '.join(near)}" if near else f"it has {', '.join(sorted(DATASETS))}"
        raise UserError(f"reasoning-gym has no generator {name!r}; {near}")
    if name in GYM_RUNS_COMPLETIONS:
        raise UserError(
            f"reasoning-gym/{name}: its verifier runs completions as Python code on this machine"
        )
    return gym
