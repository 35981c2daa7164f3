"""Questions, the held-out split, and the rewards."""

import re

import pytest

from reference.tasks import (
    HELD_OUT,
    TASKS,
    bare_number_bonus,
    exact_match,
    last_number_is,
)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_questions_are_not_trained_on(name, seed):
    task = TASKS[name](seed)
    train = {question.text for question in task.train}
    held_out = {question.text for question in task.held_out}
    assert len(held_out) == len(task.held_out) == HELD_OUT == 128
    assert len(train) == len(task.train) > 128
    assert not train & held_out


@pytest.mark.parametrize("name", TASKS)
def test_the_split_follows_the_seed(name):
    assert TASKS[name](3).held_out == TASKS[name](3).held_out
    assert TASKS[name](3).held_out != TASKS[name](4).held_out


def test_the_answers_are_right():
    for question in TASKS["arithmetic"](0).train:
        assert sum(map(int, re.findall(r"\d+", question.text))) == int(question.answer)
    for question in TASKS["reverse"](0).train[:1000]:
        assert question.text == question.answer[::-1] + "="


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("12", "12", True),
        ("7 + 5 = 12", "12", True),
        ("7+5=12.", "12", True),
        ("12 is 7 + 5", "12", False),  # the last number counts
        ("The answer is 12!", "12", True),
        ("112", "12", False),
        ("12.5", "5", False),
        ("12.5", "12", False),
        ("1,024", "1024", True),
        ("1,024", "24", False),
        ("7-5", "5", True),  # a minus between numbers is no sign
        ("7 - 5 = -2", "-2", True),
        ("-2", "2", False),
        ("twelve", "12", False),
        ("", "12", False),
    ],
)
def test_the_last_number_decides(completion, answer, right):
    assert last_number_is(completion, answer) is right


@pytest.mark.parametrize(
    ("completion", "reward"),
    [("12", 1.2), (" 12\n", 1.2), ("7 + 5 = 12", 1.0), ("12.", 1.0), ("13", 0.0), ("", 0.0)],
)
def test_arithmetic_rewards(completion, reward):
    rewards = TASKS["arithmetic"](0).rewards
    assert sum(function(completion, "12") for function in rewards.values()) == reward


def test_a_wrong_answer_earns_no_bonus_for_its_form():
    assert all(bare_number_bonus(str(wrong), "12") == 0 for wrong in range(12))


def test_reverse_rewards_only_the_whole_answer():
    assert TASKS["reverse"](0).rewards["exact"]("654321", "654321") == 1.0
    assert TASKS["reverse"](0).rewards["exact"]("65432", "654321") == 0.0
    assert not exact_match("6543210", "654321")
