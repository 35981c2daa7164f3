"""Tasks: questions with one right answer each, the held-out ones apart, and rewards.

To add a task, write a function seed -> Task and name it in TASKS.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

HELD_OUT = 128


@dataclass(frozen=True)
class Question:
    text: str
    answer: str


@dataclass(frozen=True)
class Task:
    """`held_out` and `train` share no question.

    `correct` says whether a completion counts as accurate; `rewards` maps a name to a function
    (completion, answer) -> float, and the reward of a completion is the sum over them.
    """

    train: list[Question]
    held_out: list[Question]
    correct: Callable[[str, str], bool]
    rewards: dict[str, Callable[[str, str], float]]


def arithmetic(seed: int) -> Task:
    """Sums of two numbers from 1 to 30; the last number of the reply counts."""
    questions = [
        Question(f"What is {a} + {b}? Answer with just the number.", str(a + b))
        for a in range(1, 31)
        for b in range(1, 31)
    ]
    random.Random(seed).shuffle(questions)
    return Task(
        train=questions[HELD_OUT:],
        held_out=questions[:HELD_OUT],
        correct=last_number_is,
        rewards={
            "correct": lambda completion, answer: float(last_number_is(completion, answer)),
            "bare_number": bare_number_bonus,
        },
    )


def reverse(seed: int) -> Task:
    """Six digits to write backwards; only the whole answer counts."""
    numbers = random.Random(seed).sample(range(10**6), HELD_OUT + 50_000)
    questions = [Question(f"{n:06d}=", f"{n:06d}"[::-1]) for n in numbers]
    return Task(
        train=questions[HELD_OUT:],
        held_out=questions[:HELD_OUT],
        correct=exact_match,
        rewards={"exact": lambda completion, answer: float(exact_match(completion, answer))},
    )


TASKS: dict[str, Callable[[int], Task]] = {"arithmetic": arithmetic, "reverse": reverse}

_NUMBER = re.compile(r"(?:(?<![\w)])-)?\d[\d,]*(?:\.\d+)?")


def last_number_is(completion: str, answer: str) -> bool:
    """Whether the last number written in the completion is the answer.

    "1,024" is one number, "12.5" is not 5, and the sign of "7-5" is not part of a number.
    """
    numbers = _NUMBER.findall(completion)
    return bool(numbers) and numbers[-1].replace(",", "") == answer


def exact_match(completion: str, answer: str) -> bool:
    return completion.strip() == answer


def bare_number_bonus(completion: str, answer: str) -> float:
    """0.2 for the right number and nothing else.

    A wrong answer earns none of it: rewarded for the form alone, a small model soon answers "1" to
    everything.
    """
    return 0.2 * exact_match(completion, answer)
