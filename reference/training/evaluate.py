"""Accuracy and pass@k on held-out questions, and a chat with the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import comb

import torch

from reference.training.config import TrainConfig
from reference.training.distributed import SINGLE_PROCESS
from reference.training.errors import UserError
from reference.training.model.policy import Policy
from reference.training.tasks.questions import Question
from reference.training.tasks.rewards import call
from reference.training.tasks.tasks import Task

BATCH = 64  # completions sampled at once


def evaluate(policy: Policy, task: Task, config: TrainConfig) -> dict[str, float]:
    """Measure greedy accuracy on the held-out questions, and pass@k with --pass-at."""
    questions = task.held_out[: config.eval_questions]
    device = policy.device
    devices = [] if device.type == "cpu" else [device]
    # Training does not depend on how often it is evaluated.
    with torch.random.fork_rng(devices, device_type=device.type):
        metrics = accuracy(policy, task, questions)
        if config.pass_at is not None:
            metrics |= pass_at(policy, task, questions, config.pass_at, config.temperature)
    shown = ", ".join(f"{name} {value:.1%}" for name, value in metrics.items())
    print(f"{len(questions)} held-out questions: {shown}")
    return metrics | {"questions": len(questions)}


def accuracy(
    policy: Policy, task: Task, questions: Sequence[Question], temperature: float = 0.0
) -> dict[str, float]:
    """Return the share of right completions, "strict" and "lenient", from one per question."""
    counts = count_right(policy, task, questions, 1, temperature)
    return {name: sum(values) / len(questions) for name, values in counts.items()}


def pass_at(
    policy: Policy, task: Task, questions: Sequence[Question], samples: int, temperature: float
) -> dict[str, float]:
    """Estimate pass@k for k = 1, 2, 4, ... up to `samples` by the lenient accuracy.

    With c of n samples right, the unbiased estimate for a question is 1 - C(n - c, k) / C(n, k)
    (arXiv:2107.03374).
    """
    counts = count_right(policy, task, questions, samples, temperature)["lenient"]
    ks = [1 << i for i in range(samples.bit_length()) if 1 << i < samples] + [samples]
    return {
        f"pass@{k}": sum(1 - comb(samples - c, k) / comb(samples, k) for c in counts) / len(counts)
        for k in ks
    }


def count_right(
    policy: Policy, task: Task, questions: Sequence[Question], samples: int, temperature: float
) -> dict[str, list[int]]:
    """Count the right ones among the samples of each question; ranks share the questions."""
    ranks = policy.ranks
    if ranks.size > 1:  # ranks sample independently of each other
        policy = replace(policy, ranks=SINGLE_PROCESS)
    own, size = ranks.shard(questions), max(1, BATCH // samples)
    counts: dict[str, list[int]] = {"strict": [], "lenient": []}
    with ranks.unsharded(policy.model):
        for batch in (own[start : start + size] for start in range(0, len(own), size)):
            texts = policy.sample(batch, samples, temperature).texts
            repeated = [question for question in batch for _ in range(samples)]
            for name, function in (("strict", task.strict), ("lenient", task.lenient)):
                right = [int(value) for value in call(function, name, repeated, texts)]
                counts[name] += [sum(right[i : i + samples]) for i in range(0, len(right), samples)]
        by_rank = ranks.all_gather(counts)
    return {name: [n for rank in by_rank for n in rank[name]] for name in counts}


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
    except (EOFError, KeyboardInterrupt):
        write("")  # the line after the prompt
    except UnicodeError as error:
        raise UserError(f"--chat cannot read its input: {error}") from None
