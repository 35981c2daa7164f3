"""Tasks: questions, held-out splits, rewards and options."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.training.errors import UserError
from reference.training.tasks.data import HELD_OUT
from reference.training.tasks.rewards import call, score, think_answer
from reference.training.tasks.tasks import TASKS, make_task

GYM = "reasoning-gym/"


def total(task, completion, question):
    values = score(task.rewards, [question], [completion])
    return sum(task.rewards[name].weight * value.item() for name, value in values.items())


def accuracy(task, questions, completions):
    """Return the strict and the lenient accuracy of each completion."""
    strict, lenient = (call(f, "it", questions, completions) for f in (task.strict, task.lenient))
    return strict, lenient


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Make one task of each kind."""
    folder = tmp_path_factory.mktemp("data")
    answers = ["12", "1,024", "Brasília", "x+1", r"\frac{1}{2}", "-3.5"]
    rows = [{"prompt": f"{a} {i}", "answer": a} for i in range(5) for a in answers]
    (folder / "any.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"question": f"q{i}", "answer": f"so\n#### {i}"} for i in range(20)]
    (folder / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "arithmetic": make_task("arithmetic", 0),
        "reverse": make_task("reverse", 0),
        "gsm8k": make_task("gsm8k", 0, data=folder / "gsm8k.jsonl"),
        "data": make_task("data", 0, data=folder / "any.jsonl"),
        "jsonl": make_task("jsonl", 0, data=folder / "any.jsonl"),
        "capital-of-brazil": make_task("capital-of-brazil", 0),
        "question": make_task("question", 0, question="6 * 7?", answer="42"),
        GYM + "chain_sum": make_task(GYM + "chain_sum", 0),
        GYM + "spell_backward": make_task(GYM + "spell_backward", 0),
    }


def test_every_listed_task_can_be_made(tasks):
    offered = {name.partition("/")[0] for name in TASKS}
    assert offered == {name.partition("/")[0] for name in tasks}


@pytest.mark.parametrize("name", ["arithmetic", "reverse"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_questions_are_not_trained_on(name, seed):
    task = make_task(name, seed)
    train = {question.text for question in task.train}
    held_out = {question.text for question in task.held_out}
    assert len(held_out) == len(task.held_out) == HELD_OUT == 128
    assert len(train) == len(task.train) > 128
    assert not train & held_out


@pytest.mark.parametrize("name", ["arithmetic", "reverse"])
def test_split_follows_the_seed(name):
    assert make_task(name, 3).held_out == make_task(name, 3).held_out
    assert make_task(name, 3).held_out != make_task(name, 4).held_out


def test_split_of_seed_0_is_pinned():
    task = make_task("arithmetic", 0)
    assert len(task.train) == 772
    assert task.held_out[0].text == "What is 11 + 17? Write the calculation in one line."
    assert make_task("reverse", 0).held_out[0].text == "885440="


def test_answers_are_right():
    for question in make_task("arithmetic", 0).train:
        assert sum(map(int, re.findall(r"\d+", question.text))) == int(question.answer)
    for question in make_task("reverse", 0).train[:1000]:
        assert question.text == question.answer[::-1] + "="


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("12", 1.2),
        (" 7 + 5 = 12.\n", 1.2),
        ("7 + 4 = 12", 1.0),
        ("It is 12", 1.0),
        ("13", 0.0),
        ("7 + 5 = 13", 0.0),
        ("", 0.0),
    ],
)
def test_arithmetic_rewards(tasks, completion, reward):
    question = next(q for q in tasks["arithmetic"].train if q.answer == "12")
    assert total(tasks["arithmetic"], completion, question) == pytest.approx(reward, abs=1e-6)


def test_gsm8k_rewards_the_number_and_the_format(tasks):
    question = next(q for q in tasks["gsm8k"].train if q.answer == "7")
    completions = {"so\n#### 7": 1.2, "it is 7": 1.0, "so\n#### 8": 0.0, "": 0.0}
    for completion, reward in completions.items():
        assert total(tasks["gsm8k"], completion, question) == pytest.approx(reward, abs=1e-6)


def test_one_question_is_both_trained_on_and_held_out(tasks):
    for name, answer in (("capital-of-brazil", "Brasília"), ("question", "42")):
        task = tasks[name]
        assert task.train == task.held_out and len(task.train) == 1
        reply = f"<think>hm</think><answer>{answer}</answer>"
        assert total(task, reply, task.train[0]) == 4.0
        assert "<think>" in task.system and "<answer>" in task.system
        worked = task.train[0].messages[1]["content"]
        assert think_answer([""], [worked], ["blue"]) == [4.0]
        assert (task.reward_max, task.eval_samples) == (4.0, 64)


def test_generator_rewards_the_tagged_text_or_the_whole_completion(tasks):
    task = tasks[GYM + "spell_backward"]
    question = task.held_out[0]
    whole, tags = question.answer, f"It is <answer> {question.answer} </answer>"
    line, wrong = f"Let me see.\n{question.answer}", "no"
    columns = [question] * 4, [whole, tags, line, wrong]
    rewards = score(task.rewards, *columns)["verifier"].tolist()
    assert rewards[:2] == [1.0, 1.0] and rewards[2] < 1 and rewards[3] < 1
    assert accuracy(task, *columns) == ([1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0])


def test_generator_lenient_accepts_the_last_number(tasks):
    task = tasks[GYM + "chain_sum"]
    question = task.train[0]
    assert accuracy(task, [question], [f"The result is {question.answer}."]) == ([0.0], [1.0])


PIECES = ["<answer>", "</answer>", "<think>", "</think>", "####", "#", r"\boxed{", "}", "$", "\n"]
PIECES += [" ", "\u00a0", ".", ",", "-", "12", "x+1", "1", r"\frac", "The answer is", "ANSWER"]


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_strict_implies_lenient(tasks, data):
    task = tasks[data.draw(st.sampled_from(sorted(tasks)))]
    question = data.draw(st.sampled_from(task.held_out + task.train[:20]))
    pieces = data.draw(st.lists(st.sampled_from(PIECES), max_size=8))
    completion = "".join(question.answer if p == "ANSWER" else p for p in pieces)
    (strict,), (lenient,) = accuracy(task, [question], [completion])
    assert strict in (0, 1) and lenient in (0, 1)
    assert strict <= lenient


def test_right_answer_in_the_right_form_is_strict_and_lenient(tasks):
    forms = {"gsm8k": "#### {}", "capital-of-brazil": "<think>a</think><answer>{}</answer>"}
    forms["question"] = forms["capital-of-brazil"]
    for name, task in tasks.items():
        question = task.held_out[0]
        completion = forms.get(name, "{}").format(question.answer)
        assert accuracy(task, [question], [completion]) == ([1.0], [1.0]), name


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("arithmetics", {}, "expected one of .*did you mean arithmetic"),
        ("reasoning-gym", {}, "expected one of .*reasoning-gym/<generator>"),
        (GYM + "nope", {}, "no generator 'nope'"),
        (GYM, {}, "no generator ''"),
        ("jsonl", {}, "--task jsonl needs --data"),
        ("question", {"answer": "42"}, "needs --question"),
        ("question", {"question": "6 * 7?"}, "needs --answer"),
        ("question", {"question": "6 * 7?", "answer": " "}, "--answer is empty"),
        ("arithmetic", {"question": "6 * 7?"}, "no use for --question; got 6 \\* 7?"),
        ("capital-of-brazil", {"answer": "42"}, "no use for --answer"),
        ("reverse", {"data": "x.jsonl"}, "no use for --data; .*did you mean --task data"),
        ("data", {}, "--task data needs --data"),
        ("data", {"data": " "}, "--data is empty"),
        ("arithmetic", {"prompt_column": "p"}, "no use for --prompt-column; got p"),
        ("question", {"answer_column": "a"}, "no use for --answer-column"),
        (GYM + "chain_sum", {"data": "x.jsonl"}, "no use for --data"),
    ],
)
def test_missing_and_unused_options_raise(name, options, says):
    with pytest.raises(UserError, match=says):
        make_task(name, 0, **options)


def test_settings_of_other_tasks_raise():
    with pytest.raises(UserError, match="--task arithmetic has no use for --task-option"):
        make_task("arithmetic", 0, settings={"max_terms": 2})
