"""Sources of questions: JSONL files, GSM8K and reasoning-gym."""

from __future__ import annotations

import difflib
import json
import math
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from reference.training.errors import UserError, import_package, one_line
from reference.training.tasks import answers
from reference.training.tasks.questions import Question

HELD_OUT = 128
GSM8K = "openai/gsm8k"
LAYOUT = (
    "--data wants a directory with train.jsonl and test.jsonl, or one .jsonl file, which is split"
)
GYM_QUESTIONS = 1000
# reasoning-gym makes item i from the seed plus i: seeds must differ by more than the sizes.
GYM_SEED_STRIDE = 1_000_000
# The verifiers of these pass the completion to Python's eval, or to SymPy's parser, which calls it.
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


Split = tuple[list[Question], list[Question]]  # to train on, held out
Verifier = Callable[[str, str], float]  # (question, answer) -> 0 to 1


def split(questions: Iterable[Question], seed: int) -> Split:
    """Shuffle, and hold out the first 128 questions, at most a fifth of all."""
    shuffled = _distinct(questions)
    random.Random(seed).shuffle(shuffled)
    count = min(HELD_OUT, len(shuffled) // 5)
    return shuffled[count:], shuffled[:count]


def _distinct(questions: Iterable[Question], without: Iterable[Question] = ()) -> list[Question]:
    """Keep the first of several questions with the same prompt, and none that is in `without`."""
    excluded = {question.key for question in without}
    by_key: dict[str, Question] = {}
    for question in questions:
        by_key.setdefault(question.key, question)
    return [question for key, question in by_key.items() if key not in excluded]


def read(data: Path, seed: int, final: Callable[[str], str] = str.strip) -> Split:
    """Read and split a JSONL file, or read train.jsonl and test.jsonl of a directory.

    Questions of the test file are removed from the training file.

    Args:
        final: extracts the final answer from an answer text, or raises a ValueError.
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
    """Read one question per line: {"prompt": ..., "answer": ...}, or "question" for "prompt"."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; {LAYOUT}") from None
    questions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{place}: expected an object; got {line.strip()[:80]}")
        text, answer = row.get("prompt", row.get("question")), row.get("answer")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f'{place}: expected a text under "prompt" or "question"; got {text!r}')
        if isinstance(answer, (int, float)) and not isinstance(answer, bool):
            answer = str(answer) if math.isfinite(answer) else answer
        if not isinstance(answer, str) or not answer.strip():
            raise UserError(f'{place}: expected a text or a number under "answer"; got {answer!r}')
        try:
            questions.append(Question(text, final(answer)))
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
    return questions


def gsm8k(data: Path | None, seed: int) -> Split:
    """Load GSM8K from the hub, or from files with the same layout."""
    if data is not None:
        return read(data, seed, gsm8k_answer)
    datasets = import_package(
        "datasets",
        '--task gsm8k needs the package datasets: pip install "grpo_kernels[tasks]"; '
        f"or --data: {LAYOUT}",
    )
    try:
        splits = datasets.load_dataset(GSM8K, "main")
    except Exception as error:  # no connection, no such set, a broken cache: each its own type
        raise UserError(
            f"--task gsm8k: {GSM8K} could not be had from the hub ({one_line(error)}); without "
            f'it, {LAYOUT}; each line is {{"question": ..., "answer": "... #### 18"}}'
        ) from None
    train, held_out = (
        [Question(row["question"], gsm8k_answer(row["answer"])) for row in splits[name]]
        for name in ("train", "test")
    )
    return _distinct(train, without=held_out), _distinct(held_out)


def gsm8k_answer(solution: str) -> str:
    """Extract the number after "####", without thousands separators; or take a bare number."""
    answer = solution.rpartition("####")[2].strip().removeprefix("$")
    if not answers.is_number(answer):
        raise ValueError(f'expected a number, after "####" in a solution; got {answer[-80:]!r}')
    return answer.replace(",", "")


def reasoning_gym(
    name: str, seed: int, settings: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Split, Verifier]:
    """Make the questions of a generator of reasoning-gym, and its verifier.

    The held-out questions come from another seed. They are at most a fifth of the distinct training
    questions, from which they are removed.
    """
    gym = import_package(
        "reasoning_gym",
        f"--task reasoning-gym/{name} needs the package reasoning-gym: "
        'pip install "grpo_kernels[tasks]"',
    )
    known = gym.factory.DATASETS
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.4)
        near = f"near it: {', '.join(near)}" if near else f"it has {', '.join(sorted(known))}"
        raise UserError(f"reasoning-gym has no generator {name!r}; {near}")
    if name in GYM_RUNS_COMPLETIONS:
        raise UserError(
            f"reasoning-gym/{name}: its verifier runs completions as Python code on this machine"
        )

    first = GYM_SEED_STRIDE * seed
    entries: dict[str, tuple[dict, Any]] = {}  # by question, with the generator that verifies it
    splits = []
    try:
        for size, offset in ((GYM_QUESTIONS, 0), (HELD_OUT, GYM_SEED_STRIDE // 2)):
            generator = gym.create_dataset(name, size=size, seed=first + offset, **settings)
            questions = []
            for entry in generator:
                # An entry may name no answer if several are right.
                questions.append(Question(entry["question"], entry["answer"] or ""))
                entries[entry["question"]] = entry, generator
            splits.append(_distinct(questions))
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(
            f"reasoning-gym/{name} does not work with the settings {dict(settings)}: "
            f"{one_line(error)}"
        ) from None
    train, held_out = splits
    held_out = held_out[: len(train) // 5]
    if not held_out:
        raise UserError(f"reasoning-gym/{name} has only {len(train)} different questions")

    def verify(question: str, answer: str) -> float:
        entry, generator = entries[question]
        try:
            return float(generator.score_answer(answer, entry))
        except Exception:  # prime_factorization, for one, raises ValueError at "hello"
            return 0.0

    return (_distinct(train, without=held_out), held_out), verify
