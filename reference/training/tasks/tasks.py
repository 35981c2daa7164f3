"""Tasks: questions with answers to train on and to evaluate, and rewards.

To add a task, write a function that returns a Task, call it in `make_task` and name it in TASKS.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from reference.training.config import TrainConfig
from reference.training.errors import UserError
from reference.training.tasks import answers, data, rewards
from reference.training.tasks.data import HELD_OUT
from reference.training.tasks.questions import Question
from reference.training.tasks.rewards import Reward, WeightedReward

GYM = "reasoning-gym/"
THINK_ANSWER = (
    "Think about the question first, between <think> and </think>. "
    "Then give the answer and nothing else between <answer> and </answer>."
)
HASHES = "Reason step by step. Then end with a line of its own: #### and the number that answers."

# The values of --task.
TASKS = ("arithmetic", "reverse", "gsm8k", "jsonl", "capital-of-brazil", "question")
TASKS += (GYM + "<generator>",)


@dataclass(frozen=True)
class Task:
    """Questions, rewards and measures of accuracy.

    The prompts that rewards, `strict` and `lenient` receive are the texts of the questions.

    Attributes:
        train, held_out: they share no question, unless the task has only one.
        strict, lenient: 1 for a correct completion, else 0. Strict also requires the right form: a
            completion that is correct for strict is correct for lenient.
        system: the system prompt.
    """

    train: list[Question]
    held_out: list[Question]
    rewards: dict[str, WeightedReward]
    strict: Reward
    lenient: Reward
    system: str | None = None


def load_task(config: TrainConfig) -> Task:
    """Make --task, with the rewards and the weights of the command line."""
    options = {"data": config.data, "question": config.question, "answer": config.answer}
    task = make_task(config.task, config.seed, settings=config.task_settings(), **options)
    system = task.system if config.system is None else config.system
    chosen = rewards.choose_rewards(task.rewards, config.reward, config.reward_weight)
    return replace(task, rewards=chosen, system=system)


def make_task(
    name: str,
    seed: int,
    *,
    data: Path | None = None,
    question: str | None = None,
    answer: str | None = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Task:
    """Make the task of a name; a generator of reasoning-gym has settings."""
    if name not in TASKS and not name.startswith(GYM):
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--task {name}: expected one of {', '.join(TASKS)}{hint}")
    required = {"jsonl": {"data"}, "question": {"question", "answer"}}.get(name, set())
    allowed = required | ({"data"} if name == "gsm8k" else set())
    given: dict[str, Any] = {"data": data, "question": question, "answer": answer}
    for option, value in given.items():
        if value is None and option in required:
            raise UserError(f"--task {name} needs --{option}")
        if value is not None and option not in allowed:
            raise UserError(f"--task {name} has no use for --{option}; got {value}")
        if isinstance(value, str) and not value.strip():
            raise UserError(f"--{option} is empty")
    if name.startswith(GYM):
        return reasoning_gym(name.removeprefix(GYM), seed, settings)
    if settings:
        raise UserError(f"--task {name} has no use for --task-option")
    makers: dict[str, Callable[[], Task]] = {
        "arithmetic": lambda: arithmetic(seed),
        "reverse": lambda: reverse(seed),
        "gsm8k": lambda: gsm8k(data, seed),
        "jsonl": lambda: jsonl(given["data"], seed),
        "capital-of-brazil": lambda: one_question("What is the capital of Brazil?", "Brasília"),
        "question": lambda: one_question(given["question"], given["answer"]),
    }
    return makers[name]()


def arithmetic(seed: int) -> Task:
    """Make sums of two numbers from 1 to 30; the last number of the completion counts."""
    questions = [
        Question(f"What is {a} + {b}? Answer with just the number.", str(a + b))
        for a in range(1, 31)
        for b in range(1, 31)
    ]
    return Task(
        *data.split(questions, seed),
        rewards={
            "correct": WeightedReward(rewards.last_number_is),
            "bare_number": WeightedReward(rewards.bare_number_bonus),
        },
        strict=rewards.exact_match,
        lenient=rewards.last_number_is,
    )


def reverse(seed: int) -> Task:
    """Make six digits to write backwards; the whole completion counts."""
    numbers = random.Random(seed).sample(range(10**6), HELD_OUT + 50_000)
    questions = [Question(f"{n:06d}=", f"{n:06d}"[::-1]) for n in numbers]
    return Task(
        train=questions[HELD_OUT:],
        held_out=questions[:HELD_OUT],
        rewards={"exact": WeightedReward(rewards.exact_match)},
        strict=rewards.exact_match,
        lenient=rewards.exact_match,
    )


def gsm8k(path: Path | None, seed: int) -> Task:
    """Load word problems; the right number gives 1, and "####" before it on the last line 0.2."""
    return Task(
        *data.gsm8k(path, seed),
        rewards={
            "correct": WeightedReward(rewards.gsm8k_lenient),
            "format": WeightedReward(rewards.gsm8k_strict, 0.2),
        },
        strict=rewards.gsm8k_strict,
        lenient=rewards.gsm8k_lenient,
        system=HASHES,
    )


def jsonl(path: Path, seed: int) -> Task:
    """Load the user's questions; the final answer of the completion counts."""
    return Task(
        *data.read(path, seed),
        rewards={"correct": WeightedReward(rewards.math_verify)},
        strict=rewards.exact_match,
        lenient=rewards.math_verify,
    )


def one_question(question: str, answer: str) -> Task:
    """Make a task of one question with mini-GRPO's reward, for <think> and <answer> tags too."""
    only = [Question(question.strip(), answer.strip())]
    return Task(
        train=only,
        held_out=only,
        rewards={"think_answer": WeightedReward(rewards.think_answer)},
        strict=rewards.full_marks,
        lenient=rewards.mentioned,
        system=THINK_ANSWER,
    )


def reasoning_gym(name: str, seed: int, settings: Mapping[str, Any]) -> Task:
    """Make the questions of a generator of reasoning-gym, rewarded by its verifier.

    The verifier gets the text in <answer> tags, or else the whole completion, and may give partial
    credit. Full credit is correct. Lenient also tries the last line and the last number.
    """
    (train, held_out), verify = data.reasoning_gym(name, seed, settings)

    def reward_of(score: Callable[[str, str], float]) -> Reward:
        return lambda prompts, completions: list(map(score, prompts, completions))

    def partial_credit(prompt: str, completion: str) -> float:
        tagged = answers.tagged(completion)
        return verify(prompt, completion.strip() if tagged is None else tagged)

    def strict(prompt: str, completion: str) -> float:
        return float(verify(prompt, completion.strip()) == 1)

    def lenient(prompt: str, text: str) -> float:
        parts = (answers.tagged(text), answers.last_line(text), answers.last_number(text))
        candidates = [text.strip(), *(part for part in parts if part is not None)]
        return float(any(verify(prompt, candidate) == 1 for candidate in candidates))

    verifier = {"verifier": WeightedReward(reward_of(partial_credit))}
    return Task(train, held_out, verifier, reward_of(strict), reward_of(lenient))
