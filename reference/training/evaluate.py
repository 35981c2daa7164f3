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
    """Measure greedy accuracy on the held-out questions, and pass@k with --pass-at.

    Questions without a ground truth are left out. If none has one, the mean reward is measured.
    """
    questions = task.held_out[: config.eval_questions]
    judged = [q for q in questions if q.answer is not None and task.lenient is not None]
    device = policy.device
    devices = [] if device.type == "cpu" else [device]
    # Training does not depend on how often it is evaluated.
    with torch.random.fork_rng(devices, device_type=device.type):
        if judged:
            questions = judged
            metrics = accuracy(policy, task, questions)
            shown = {name: f"{value:.1%}" for name, value in metrics.items()}
        else:
            metrics = {"reward": mean_reward(policy, task, questions)}
            shown = {"mean reward": f"{metrics['reward']:.3g}"}
        if judged and config.pass_at is not None:
            estimates = pass_at(policy, task, questions, config.pass_at, config.temperature)
            metrics |= estimates
            shown |= {name: f"{value:.1%}" for name, value in estimates.items()}
    text = ", ".join(f"{name} {value}" for name, value in shown.items())
    print(f"{len(questions)} held-out questions: {text}")
    return metrics | {"questions": len(questions)}


def accuracy(
    policy: Policy, task: Task, questions: Sequence[Question], temperature: float = 0.0
) -> dict[str, float]:
    """Return the share of right completions, "strict" and "lenient", from one per question."""
    right = judge(policy, questions, 1, temperature, task.accuracy)
    return {name: sum(values) / len(questions) for name, values in right.items()}


def mean_reward(policy: Policy, task: Task, questions: Sequence[Question]) -> float:
    """Return the mean reward of greedy completions, one per question; NaN if none applies."""

    def total(questions: Sequence[Question], texts: Sequence[str]) -> dict[str, Tensor]:
        return {"reward": total_reward(task.rewards, score(task.rewards, questions, texts))}

    values = judge(policy, questions, 1, 0.0, total)["reward"]
    return torch.tensor(values).nanmean().item()


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
