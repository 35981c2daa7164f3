"""Accuracy, mean reward and pass@k on held-out questions, and a chat with the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import comb

import torch
from torch import Tensor

from reference.training.config import TrainConfig
from reference.training.distributed import SINGLE_PROCESS
from reference.training.errors import UserError
from reference.training.model.policy import Policy
from reference.training.run.graceful_shutdown import Stopped
from reference.training.tasks.questions import Question
from reference.training.tasks.rewards import score, total_reward
from reference.training.tasks.tasks import Task

BATCH = 64  # completions sampled at once


def evaluate(policy: Policy, task: Task, config: TrainConfig) -> dict[str, float]:
    """Measure accuracy on the held-out questions, and pass@k with --pass-at.

    Each question gets one greedy completion, or as many sampled ones as the task says. Questions
    without a ground truth are left out. The mean reward is measured if none has one, and of a
    graded reward.
    """
    questions = task.held_out[: config.eval_questions]
    judged = [q for q in questions if q.answer is not None and task.lenient is not None]
    questions = judged or questions
    is_sampled = task.eval_samples is not None
    samples, temperature = task.eval_samples or 1, config.temperature if is_sampled else 0.0

    def measure(questions: Sequence[Question], texts: Sequence[str]) -> dict[str, Tensor]:
        values = {}
        if not judged or task.reward_max is not None:
            by_name = score(task.rewards, questions, texts)
            values["reward"] = total_reward(task.rewards, by_name)
        return values | (task.accuracy(questions, texts) if judged else {})

    device = policy.device
    devices = [] if device.type == "cpu" else [device]
    # Training does not depend on how often it is evaluated, nor evaluation on the training before.
    with torch.random.fork_rng(devices, device_type=device.type):
        torch.manual_seed(config.seed)
        if is_sampled and policy.ranks.size > 1:  # every rank draws what a single process would
            alone = replace(policy, ranks=SINGLE_PROCESS)
            with policy.ranks.unsharded(policy.model):
                metrics = mean_values(alone, questions, samples, temperature, measure)
        else:
            metrics = mean_values(policy, questions, samples, temperature, measure)
        if judged and config.pass_at is not None:
            metrics |= pass_at(policy, task, questions, config.pass_at, config.temperature)
    shown = {name: f"{value:.1%}" for name, value in metrics.items() if name != "reward"}
    if "reward" in metrics:
        shown = {"mean reward": f"{metrics['reward']:.3g}{task.of_reward_max}"} | shown
    text = ", ".join(f"{name} {value}" for name, value in shown.items())
    metrics["questions"] = len(questions)
    what = f"{len(questions)} held-out questions"
    if is_sampled:
        metrics["completions"] = samples * len(questions)
        what = f"{metrics['completions']} sampled completions"
    print(f"{what}: {text}")
    return metrics


def mean_values(
    policy: Policy,
    questions: Sequence[Question],
    samples: int,
    temperature: float,
    measure: Callable[[Sequence[Question], Sequence[str]], Mapping[str, Tensor]],
) -> dict[str, float]:
    """Average what `judge` returns, without NaN."""
    values = judge(policy, questions, samples, temperature, measure)
    return {
        name: torch.tensor(x, dtype=torch.float64).nanmean().item() for name, x in values.items()
    }


def pass_at(
    policy: Policy, task: Task, questions: Sequence[Question], samples: int, temperature: float
) -> dict[str, float]:
    """Estimate pass@k for k = 1, 2, 4, ... up to `samples` by the lenient accuracy.

    With c of n samples right, the unbiased estimate for a question is 1 - C(n - c, k) / C(n, k)
    (arXiv:2107.03374).
    """
    right = judge(policy, questions, samples, temperature, task.accuracy)["lenient"]
    counts = [int(sum(right[i : i + samples])) for i in range(0, len(right), samples)]
    ks = [1 << i for i in range(samples.bit_length()) if 1 << i < samples] + [samples]
    return {
        f"pass@{k}": sum(1 - comb(samples - c, k) / comb(samples, k) for c in counts) / len(counts)
        for k in ks
    }


def judge(
    policy: Policy,
    questions: Sequence[Question],
    samples: int,
    temperature: float,
    measure: Callable[[Sequence[Question], Sequence[str]], Mapping[str, Tensor]],
) -> dict[str, list[float]]:
    """Measure `samples` completions of each question; ranks share the questions.

    Args:
        measure: takes the question and the text of each completion, returns values [n] by name.
    """
    ranks = policy.ranks
    if ranks.size > 1:  # ranks sample independently of each other
        policy = replace(policy, ranks=SINGLE_PROCESS)
    own, size = ranks.shard(questions), max(1, BATCH // samples)
    values: dict[str, list[float]] = {}
    with ranks.unsharded(policy.model):
        for batch in (own[start : start + size] for start in range(0, len(own), size)):
            texts = policy.sample(batch, samples, temperature).texts
            repeated = [question for question in batch for _ in range(samples)]
            for name, measured in measure(repeated, texts).items():
                values.setdefault(name, []).extend(measured.tolist())
        by_rank = ranks.all_gather(values)
    names = next(filter(None, by_rank), {})  # a rank without questions has none
    return {name: [x for rank in by_rank for x in rank.get(name, [])] for name in names}


def chat(
    policy: Policy,
    temperature: float,
    max_new_tokens: int,
    read: Callable[[str], str],
    write: Callable[[str], None] = print,
) -> None:
    """Chat after the policy's opening until an empty line, the end of the input or Ctrl-C."""
    write("Talk to the model; an empty line ends.")
    messages = list(policy.opening)
    if policy.system is not None:
        messages.insert(0, {"role": "system", "content": policy.system})
    try:
        while text := read("you> ").strip():
            text.encode()  # raises for a byte that was no character
            messages.append({"role": "user", "content": text})
            reply = policy.chat_reply(messages, temperature, max_new_tokens)
            messages.append({"role": "assistant", "content": reply})
            write(f"model> {reply}")
    except (EOFError, Stopped):
        write("")  # the line after the prompt
    except UnicodeError as error:
        raise UserError(f"--chat cannot read its input: {error}") from None
