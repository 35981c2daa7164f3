"""Accuracy, pass@k and the chat."""

import io
import signal
from dataclasses import replace
from itertools import combinations, cycle
from types import SimpleNamespace

import pytest
import torch

from reference.training import evaluate
from reference.training.command_line import parse_command_line
from reference.training.distributed import SINGLE_PROCESS
from reference.training.errors import UserError
from reference.training.model.policy import SampledCompletions
from reference.training.run.graceful_shutdown import Stopped
from reference.training.tasks.questions import Question
from reference.training.tasks.rewards import WeightedReward
from reference.training.tasks.tasks import Task


class ScriptedPolicy:
    """A policy whose first n completions of question n are right."""

    model, ranks, system, opening = None, SINGLE_PROCESS, "Be brief.", ()

    def __init__(self):
        self.batches = []

    def sample(self, questions, samples, temperature):
        self.batches.append(len(questions) * samples)
        texts = ["right" if i < int(q.text) else "wrong" for q in questions for i in range(samples)]
        return SampledCompletions(None, None, texts)

    def chat_reply(self, messages, temperature, max_new_tokens):
        return f"{len(messages)} messages, last {messages[-1]['content']}"


def lenient(prompts, completions, answers):
    return [float(c == a) for c, a in zip(completions, answers, strict=True)]


def strict(prompts, completions, answers):
    return [
        float(p == "4" and c == a) for p, c, a in zip(prompts, completions, answers, strict=True)
    ]


def task(numbers):
    questions = [Question(str(n), "right") for n in numbers]
    return Task(questions, questions, {}, strict, lenient)


def test_accuracy_is_computed_in_batches():
    policy, held_out = ScriptedPolicy(), task([0, 1, 4, 0] * 40)
    found = evaluate.mean_values(policy, held_out.held_out, 1, 0.0, held_out.accuracy)
    assert found == {"strict": 0.25, "lenient": 0.5}
    assert policy.batches == [64, 64, 32]


@pytest.mark.parametrize("right", [0, 1, 3, 6])
def test_pass_at_k_matches_enumeration(right):
    held_out = task([right])
    found = evaluate.pass_at(ScriptedPolicy(), held_out, held_out.held_out, 6, 1.0)
    assert list(found) == ["pass@1", "pass@2", "pass@4", "pass@6"]
    for k in (1, 2, 4, 6):
        picks = list(combinations(range(6), k))
        expected = sum(any(i < right for i in pick) for pick in picks) / len(picks)
        assert found[f"pass@{k}"] == pytest.approx(expected)


@pytest.fixture
def scripted():
    policy = ScriptedPolicy()
    policy.device = torch.device("cpu")
    return policy


def test_evaluation_leaves_out_questions_without_a_ground_truth(scripted, capsys):
    held_out = task([4, 0])
    held_out.held_out.append(Question("4", None))
    config = parse_command_line(["--preset", "tiny", "--pass-at", "2"])
    found = evaluate.evaluate(scripted, held_out, config)
    assert found == {"strict": 0.5, "lenient": 0.5, "pass@1": 0.5, "pass@2": 0.5, "questions": 2}
    assert "2 held-out questions: strict 50.0%, lenient 50.0%, pass@1" in capsys.readouterr().out


def test_evaluation_without_ground_truths_is_the_mean_reward(scripted, capsys):
    def reward(prompts, completions):
        pairs = zip(prompts, completions, strict=True)
        return [None if p == "2" else float(c == "right") for p, c in pairs]

    questions = [Question(str(n)) for n in (1, 0, 0, 3, 2)]
    held_out = Task(questions, questions, {"mine": WeightedReward(reward, 3.0)}, None, None)
    found = evaluate.evaluate(scripted, held_out, parse_command_line(["--preset", "tiny"]))
    assert found == {"reward": 1.5, "questions": 5}
    assert "5 held-out questions: mean reward 1.5" in capsys.readouterr().out


def test_graded_reward_is_measured_on_samples_if_the_task_says_so(scripted, capsys):
    graded = {
        "marks": WeightedReward(lambda completions: [4.0 * (c == "right") for c in completions])
    }
    one = replace(task([16]), rewards=graded, reward_max=4.0, eval_samples=64)
    found = evaluate.evaluate(scripted, one, parse_command_line(["--preset", "tiny"]))
    share = {"strict": 0.0, "lenient": 0.25}
    assert found == {"reward": 1.0, **share, "questions": 1, "completions": 64}
    shown = "64 sampled completions: mean reward 1 of 4, strict 0.0%, lenient 25.0%"
    assert shown in capsys.readouterr().out


def test_chat_keeps_its_history_and_ends_at_an_empty_line():
    said, lines = [], cycle(["hello", "again", ""])
    evaluate.chat(ScriptedPolicy(), 1.0, 5, lambda prompt: next(lines), said.append)
    assert said[1:] == ["model> 2 messages, last hello", "model> 4 messages, last again"]


def test_chat_starts_with_the_opening_of_the_policy():
    policy, said, lines = ScriptedPolicy(), [], cycle(["hello", ""])
    policy.opening = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    evaluate.chat(policy, 1.0, 5, lambda prompt: next(lines), said.append)
    assert said[1:] == ["model> 4 messages, last hello"]
    assert len(policy.opening) == 2


@pytest.mark.parametrize("end", [EOFError(), Stopped(signal.SIGINT)])
@pytest.mark.parametrize("moment", ["input", "reply"])
def test_chat_ends_with_its_input_and_at_ctrl_c(end, moment, monkeypatch):
    def stop(*_):
        raise end

    monkeypatch.setattr(ScriptedPolicy, "chat_reply", stop)
    said = []
    read = stop if moment == "input" else lambda prompt: "hello"
    evaluate.chat(ScriptedPolicy(), 1.0, 5, read, said.append)
    assert said[1:] == [""]


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_chat_refuses_input_that_is_no_text(encoding, errors):
    lines = io.TextIOWrapper(io.BytesIO(b"Bras\xedlia\n"), encoding, errors)
    with pytest.raises(UserError, match=r"^--chat cannot read its input: '.*' codec can't ..code"):
        evaluate.chat(ScriptedPolicy(), 1.0, 5, lambda prompt: lines.readline(), lambda text: None)


def test_evaluation_preserves_the_rng_of_its_device_only(monkeypatch):
    monkeypatch.setattr(evaluate, "mean_values", lambda *_: {"strict": torch.rand(1).item()})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("walked through them"))
    config = parse_command_line(["--preset", "tiny"])
    policy, before = SimpleNamespace(device=torch.device("cpu")), torch.get_rng_state()
    evaluate.evaluate(policy, task([1]), config)
    assert torch.equal(torch.get_rng_state(), before)
