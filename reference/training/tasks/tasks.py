"""Tasks: questions with answers to train on and to evaluate, and rewards.

To add a task, write a function that returns a Task, call it in `make_task` and name it in TASKS.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from reference.training.config import TrainConfig
from reference.training.errors import UserError, did_you_mean
from reference.training.tasks import answers, data, rewards
from reference.training.tasks.data import HELD_OUT
from reference.training.tasks.questions import Question
from reference.training.tasks.rewards import Reward, WeightedReward, call

GYM = "reasoning-gym/"
THINK_ANSWER = (
    "Think about the question first, between <think> and </think>. "
    "Then give the answer and nothing else between <answer> and </answer>."
)
WORKED_EXAMPLE = [
    {"role": "user", "content": "What is the colour of the sky?"},
    {
        "role": "assistant",
        "content": "<think>On a clear day the sky is blue.</think>\n<answer>blue</answer>",
    },
]
HASHES = "Reason step by step. Then end with a line of its own: #### and the number that answers."

# The values of --task; jsonl is another name of data.
TASKS = ("arithmetic", "reverse", "gsm8k", "data", "jsonl", "capital-of-brazil", "question")
TASKS += (GYM + "<generator>",)


@dataclass(frozen=True)
class Task:
    """Questions, rewards and measures of accuracy.

    Attributes:
        train, held_out: they share no question, unless the task has only one.
        strict, lenient: called like rewards, 1 for a correct completion, else 0. Strict also
            requires the right form: a completion that is correct for strict is correct for lenient.
            None if no question has a ground truth.
        system: the system prompt.
        reward_max: the largest sum of the rewards, if they are graded: then it is evaluated too.
        eval_samples: completions that are sampled of each held-out question to evaluate. None: one
            greedy completion.
        summary: a line to print, on where the questions come from.
    """

    train: list[Question]
    held_out: list[Question]
    rewards: dict[str, WeightedReward]
    strict: Reward | None
    lenient: Reward | None
    system: str | None = None
    reward_max: float | None = None
    eval_samples: int | None = None
    summary: str | None = None

    @property
    def of_reward_max(self) -> str:
        """Text to print after a reward: " of 4", or nothing."""
        return "" if self.reward_max is None else f" of {self.reward_max:g}"

    def accuracy(self, questions: Sequence[Question], texts: Sequence[str]) -> dict[str, Tensor]:
        """Return "strict" and "lenient" of each completion, [n]; NaN without a ground truth.

        Without any ground truth in the task there is no accuracy.
        """
        measures = {"strict": self.strict, "lenient": self.lenient}
        return {
            name: torch.tensor(
                [math.nan if x is None else float(x) for x in call(measure, name, questions, texts)]
            )
            for name, measure in measures.items()
            if measure is not None
        }


def load_task(config: TrainConfig) -> Task:
    """Make --task, with the rewards of the command line; each is called once, to find mistakes."""
    options = {
        "data": config.data,
        "prompt_column": config.prompt_column,
        "answer_column": config.answer_column,
        "question": config.question,
        "answer": config.answer,
    }
    task = make_task(config.task, config.seed, settings=config.task_settings(), **options)
    system = task.system if config.system is None else config.system
    chosen = rewards.choose_rewards(task.rewards, config.reward, config.reward_weight)
    if task.summary is not None:
        print(task.summary)
    if not chosen:
        raise UserError(
            f"--task {config.task}: no row has a ground truth to reward: name its column with "
            "--answer-column, or a reward with --reward"
        )
    if config.pass_at is not None and task.lenient is None:
        raise UserError(f"--pass-at {config.pass_at} needs ground truths: no row has one")
    rewards.score(chosen, *example(task, config.group_size))
    is_changed = config.reward or config.reward_weight or config.overlong_buffer
    reward_max = None if is_changed else task.reward_max
    return replace(task, rewards=chosen, system=system, reward_max=reward_max)


def example(task: Task, count: int) -> tuple[list[Question], list[str]]:
    """Return a question for `count` completions, and these: the ground truth if there is one."""
    question = task.train[0]
    return [question] * count, [question.answer or "This is a completion."] * count


def make_task(
    name: str,
    seed: int,
    *,
    data: str | Path | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    question: str | None = None,
    answer: str | None = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Task:
    """Make the task of a name; a generator of reasoning-gym has settings."""
    if name not in TASKS and not name.startswith(GYM):
        known = ", ".join(TASKS)
        raise UserError(f"--task {name}: expected one of {known}{did_you_mean(name, TASKS)}")
    reads_data = name in ("data", "jsonl", "gsm8k")
    required = {"data": {"data"}, "jsonl": {"data"}, "question": {"question", "answer"}}
    allowed = {"data", "prompt_column", "answer_column"} if reads_data else required.get(name, ())
    given: dict[str, Any] = {
        "data": data,
        "prompt_column": prompt_column,
        "answer_column": answer_column,
        "question": question,
        "answer": answer,
    }
    for option, value in given.items():
        flag = "--" + option.replace("_", "-")
        if value is None and option in required.get(name, ()):
            raise UserError(f"--task {name} needs {flag}")
        if value is not None and option not in allowed:
            hint = "; did you mean --task data?" if option == "data" else ""
            raise UserError(f"--task {name} has no use for {flag}; got {value}{hint}")
        if isinstance(value, str) and not value.strip():
            raise UserError(f"{flag} is empty")
    columns = (prompt_column, answer_column)
    if name.startswith(GYM):
        return reasoning_gym(name.removeprefix(GYM), seed, settings)
    if settings:
        raise UserError(f"--task {name} has no use for --task-option")
    makers: dict[str, Callable[[], Task]] = {
        "arithmetic": lambda: arithmetic(seed),
        "reverse": lambda: reverse(seed),
        "gsm8k": lambda: gsm8k(data, seed, *columns),
        "data": lambda: own_data(given["data"], seed, *columns),
        "jsonl": lambda: own_data(given["data"], seed, *columns),
        "capital-of-brazil": lambda: one_question("What is the capital of Brazil?", "Brasília"),
        "question": lambda: one_question(given["question"], given["answer"]),
    }
    return makers[name]()


def arithmetic(seed: int) -> Task:
    """Make sums of two numbers from 1 to 30; the last number of the completion counts.

    Strict is "7 + 5 = 12" or "12" and nothing else. The untrained SmolLM2-135M, asked for just the
    number, was right in 4 of 64 samples, and in none of them by the number alone.
    """
    questions = [
        Question(f"What is {a} + {b}? Write the calculation in one line.", str(a + b))
        for a in range(1, 31)
        for b in range(1, 31)
    ]
    return Task(
        *data.split(questions, seed),
        rewards={
            "correct": WeightedReward(rewards.last_number_is),
            "bare_sum": WeightedReward(rewards.bare_sum, 0.2),
        },
        strict=rewards.bare_sum,
        lenient=rewards.last_number_is,
    )


def reverse(seed: int) -> Task:
    """Make six digits to write backwards; the whole completion counts.

    It is evaluated on samples: greedy completions are right long before sampled ones, and GRPO
    trains the policy that samples.
    """
    numbers = random.Random(seed).sample(range(10**6), HELD_OUT + 50_000)
    questions = [Question(f"{n:06d}=", f"{n:06d}"[::-1]) for n in numbers]
    return Task(
        train=questions[HELD_OUT:],
        held_out=questions[:HELD_OUT],
        rewards={"exact": WeightedReward(rewards.exact_match)},
        strict=rewards.exact_match,
        lenient=rewards.exact_match,
        eval_samples=1,
    )


def gsm8k(
    path: str | Path | None,
    seed: int,
    prompt_column: str | None = None,
    answer_column: str | None = None,
) -> Task:
    """Load word problems; the right number gives 1, and "####" before it on the last line 0.2."""
    found = data.gsm8k(path, seed, prompt_column, answer_column)
    return Task(
        found.train,
        found.held_out,
        rewards={
            "correct": WeightedReward(rewards.gsm8k_lenient),
            "format": WeightedReward(rewards.gsm8k_strict, 0.2),
        },
        strict=rewards.gsm8k_strict,
        lenient=rewards.gsm8k_lenient,
        system=HASHES,
        summary=found.summary,
    )


def own_data(
    path: str | Path,
    seed: int,
    prompt_column: str | None = None,
    answer_column: str | None = None,
) -> Task:
    """Load the user's questions; the final answer of the completion counts, if it is known."""
    found = data.read(path, seed, prompt_column, answer_column)
    questions = (*found.train, *found.held_out)
    has_answers = any(question.answer is not None for question in questions)
    return Task(
        found.train,
        found.held_out,
        rewards={"correct": WeightedReward(rewards.math_verify)} if has_answers else {},
        strict=rewards.exact_match if has_answers else None,
        lenient=rewards.math_verify if has_answers else None,
        summary=found.summary,
    )


def one_question(question: str, answer: str) -> Task:
    """Make a task of one question with mini-GRPO's reward, for <think> and <answer> tags too.

    A worked example comes before the question: without one, SmolLM2-135M never writes a tag. The
    held-out question is the trained one, so samples of it show what was learned.
    """
    prompt = [*WORKED_EXAMPLE, {"role": "user", "content": question.strip()}]
    only = [Question(prompt, answer.strip())]
    return Task(
        train=only,
        held_out=only,
        rewards={"think_answer": WeightedReward(rewards.think_answer)},
        strict=rewards.full_marks,
        lenient=rewards.mentioned,
        system=THINK_ANSWER,
        reward_max=4.0,
        eval_samples=64,
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
