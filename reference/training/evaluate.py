"""How good a policy is: accuracy on held-out questions, pass@k, and a conversation with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import comb

from reference.training.distributed import ALONE
from reference.training.model.policy import Policy
from reference.training.tasks.tasks import Question, Task

BATCH = 64  # answers at a time


def accuracy(
    policy: Policy, task: Task, questions: Sequence[Question], temperature: float = 0.0
) -> dict[str, float]:
    """The share of questions answered right, "strict" and "lenient", with one answer each."""
    counts = right_answers(policy, task, questions, 1, temperature)
    return {name: sum(each) / len(questions) for name, each in counts.items()}


def pass_at(
    policy: Policy, task: Task, questions: Sequence[Question], samples: int, temperature: float
) -> dict[str, float]:
    """pass@k for k = 1, 2, 4, ... up to `samples`, of the lenient accuracy.

    The unbiased estimate 1 - C(n - c, k) / C(n, k) from c right ones of n samples of a question
    (arXiv:2107.03374), averaged over questions.
    """
    counts = right_answers(policy, task, questions, samples, temperature)["lenient"]
    ks = [1 << i for i in range(samples.bit_length()) if 1 << i < samples] + [samples]
    return {
        f"pass@{k}": sum(1 - comb(samples - c, k) / comb(samples, k) for c in counts) / len(counts)
        for k in ks
    }


def right_answers(
    policy: Policy, task: Task, questions: Sequence[Question], samples: int, temperature: float
) -> dict[str, list[int]]:
    """How many of the samples of each question are right; each rank asks its share."""
    ranks = policy.ranks
    if ranks.size > 1:  # each goes through its share at its own pace
        policy = replace(policy, ranks=ALONE)
    with ranks.whole(policy.model):
        found = ranks.gathered(_right(policy, task, ranks.share(questions), samples, temperature))
    return {name: [n for each in found for n in each[name]] for name in found[0]}


def _right(
    policy: Policy, task: Task, questions: Sequence[Question], samples: int, temperature: float
) -> dict[str, list[int]]:
    counts = {"strict": [], "lenient": []}
    size = max(1, BATCH // samples)
    for start in range(0, len(questions), size):
        batch = questions[start : start + size]
        texts = policy.sample(batch, samples, temperature).texts
        repeated = [question for question in batch for _ in range(samples)]
        inputs = ([q.text for q in repeated], texts, [q.answer for q in repeated])
        for name, function in (("strict", task.strict), ("lenient", task.lenient)):
            right = [int(value) for value in function(*inputs)]
            counts[name] += [sum(right[i : i + samples]) for i in range(0, len(right), samples)]
    return counts


def chat(
    policy: Policy,
    temperature: float,
    max_new_tokens: int,
    ask: Callable[[str], str],
    say: Callable = print,
) -> None:
    """A conversation, until an empty line or the end of the input."""
    say("Talk to the model; an empty line ends.")
    messages = [] if policy.system is None else [{"role": "system", "content": policy.system}]
    while True:
        try:
            text = ask("you> ").strip()
        except EOFError:
            return
        if not text:
            return
        messages.append({"role": "user", "content": text})
        reply = policy.chat_reply(messages, temperature, max_new_tokens)
        messages.append({"role": "assistant", "content": reply})
        say(f"model> {reply}")
