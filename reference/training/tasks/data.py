"""Questions to train on and held out: of --data, GSM8K and reasoning-gym."""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from reference.training.errors import UserError, did_you_mean, import_package, one_line
from reference.training.tasks import answers as judge
from reference.training.tasks import rows as sources
from reference.training.tasks.questions import (
    ANSWER_COLUMNS,
    PROMPT_COLUMNS,
    RESERVED,
    Question,
    make_question,
)

HELD_OUT = 128
GSM8K = "openai/gsm8k:main"
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


@dataclass(frozen=True)
class Questions:
    """Questions to train on and held out.

    Attributes:
        summary: how many rows were read, dropped, kept and held out.
    """

    train: list[Question]
    held_out: list[Question]
    summary: str | None = None


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


def read(
    data: str | Path,
    seed: int,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    final: Callable[[str], str] = str.strip,
) -> Questions:
    """Read --data (see `rows.load`), and split it if it has no test split.

    Questions of the test split are removed from those to train on.

    Args:
        prompt_column: None: the first of PROMPT_COLUMNS that a row has.
        answer_column: None: the first of ANSWER_COLUMNS that the data have, if any.
        final: extracts the final answer from an answer text, or raises a ValueError.
    """
    prompt_columns = PROMPT_COLUMNS if prompt_column is None else (prompt_column,)
    answer_columns = ANSWER_COLUMNS if answer_column is None else (answer_column,)
    source = sources.load(str(data), as_text={*prompt_columns, *answer_columns})
    rows = [*source.train, *(source.held_out or [])]
    names = list(dict.fromkeys(name for row in rows for name in row.columns))
    _expect_column("--prompt-column", prompt_columns, names, data)
    if answer_column is not None:
        _expect_column("--answer-column", answer_columns, names, data)
    answer_column = next((name for name in answer_columns if name in names), None)
    questions = [make_question(row, names, prompt_columns, answer_column, final) for row in rows]

    if source.held_out is None:
        train, held_out = split(questions, seed)
        in_both = 0
    else:
        count = len(source.train)
        train, held_out = _distinct(questions[:count]), _distinct(questions[count:])
        count = len(train)
        train = _distinct(train, without=held_out)
        in_both = count - len(train)
    duplicates = len(rows) - len(train) - len(held_out) - in_both
    parts = [f"{len(rows):,} rows read", f"{duplicates:,} dropped as duplicates"]
    if in_both:
        parts.append(f"{in_both:,} dropped because they are in the test split too")
    parts.append(f"{len(train):,} kept to train on and {len(held_out):,} held out")
    summary = f"{data}: {', '.join(parts)}"
    if not train or not held_out:
        raise UserError(
            f"--data {summary}; expected at least one of each, without a test split at least five "
            "different questions"
        )
    unknown = sum(question.answer is None for question in (*train, *held_out))
    if unknown:
        summary += f"; {unknown:,} without a ground truth"
    for name in RESERVED:
        if name in names and name not in (*prompt_columns, answer_column):
            summary += f"; rewards receive something else as {name}, not that column"
    return Questions(train, held_out, summary)


def _expect_column(flag: str, wanted: Sequence[str], names: Sequence[str], data: Any) -> None:
    """Raise a UserError if there are columns, but none of those that are wanted."""
    if names and not set(wanted) & set(names):
        hint = next(filter(None, (did_you_mean(name, names) for name in wanted)), "; choose one")
        raise UserError(
            f"{flag}: {data} has no column {' or '.join(wanted)}, but {', '.join(names)}{hint}"
        )


def gsm8k(
    data: str | Path | None,
    seed: int,
    prompt_column: str | None = None,
    answer_column: str | None = None,
) -> Questions:
    """Load GSM8K from the hub, or from files with the same layout."""
    if data is None:
        import_package(
            "datasets",
            '--task gsm8k needs the package datasets: pip install -e ".[tasks]"; '
            f"or --data: {sources.LAYOUT}",
        )
    try:
        questions = read(data or GSM8K, seed, prompt_column, answer_column, gsm8k_answer)
        if all(question.answer is None for question in (*questions.train, *questions.held_out)):
            raise UserError(f"{data or GSM8K} has no column {' or '.join(ANSWER_COLUMNS)}")
        return questions
    except UserError as error:
        if data is not None:
            raise
        raise UserError(
            f'--task gsm8k: {error}; each row is {{"question": ..., "answer": "... #### 18"}}'
        ) from None


def gsm8k_answer(solution: str) -> str:
    """Extract the number after "####", without thousands separators; or take a bare number."""
    answer = solution.rpartition("####")[2].strip().removeprefix("$")
    if not judge.is_number(answer):
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
        f'--task reasoning-gym/{name} needs the package reasoning-gym: pip install -e ".[tasks]"',
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
