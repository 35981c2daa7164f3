"""Questions: a text or a conversation, and how rows become questions."""

import json
from decimal import Decimal

import pytest

from reference.training.errors import UserError
from reference.training.tasks.questions import Question, make_question
from reference.training.tasks.rows import Row

EXAMPLE = [
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "7+5?"},
]


def test_text_is_the_users_message():
    question = Question("7+5?", "12")
    assert question.messages == [{"role": "user", "content": "7+5?"}]
    assert question.text == question.key == "7+5?"


def test_text_of_a_conversation_is_the_last_message_of_the_user():
    question = Question(EXAMPLE)
    assert question.messages == EXAMPLE and question.text == "7+5?"
    assert json.loads(question.key) == EXAMPLE


def of(**columns):
    return make_question(Row("a.csv, row 3", columns), list(columns))


def test_row_has_a_prompt_a_ground_truth_and_columns():
    assert of(prompt="p", answer=" x ") == Question("p", "x")
    assert of(question="q", answer=7) == Question("q", "7", {"question": "q"})
    assert of(problem="r", answer=0.5, n=1) == Question("r", "0.5", {"problem": "r", "n": 1})
    assert of(prompt="p", question="q").columns == {"question": "q"}
    assert of(prompt=None, question="q", answer=None) == Question(
        "q", None, {"prompt": None, "question": "q"}
    )
    assert of(prompt="p", answer=Decimal("1.50")).answer == "1.50"


def test_answer_column_is_a_column_too():
    row = Row("a", {"prompt": "p", "solution": " 12 ", "answer": "other"})
    question = make_question(row, list(row.columns), answer_column="solution")
    assert question == Question("p", "12", {"solution": "12"})
    assert make_question(row, list(row.columns), answer_column=None).answer is None


def test_conversation_keeps_roles_and_text():
    parts = [{"type": "text", "text": "7"}, {"type": "text", "text": "+5?"}]
    messages = [*EXAMPLE[:3], {"role": "user", "content": parts, "name": None}]
    question = of(prompt=messages, completion=[{"role": "assistant", "content": "12"}])
    assert question.prompt == EXAMPLE
    row = Row("a", {"messages": EXAMPLE, "completion": [{"role": "assistant", "content": "12"}]})
    answered = make_question(row, list(row.columns), answer_column="completion")
    assert answered.prompt == EXAMPLE and answered.answer == "12"
    assert answered.columns == {"messages": EXAMPLE, "completion": "12"}


def test_truth_values_are_ground_truths():
    assert [of(prompt="p", answer=value).answer for value in (True, False)] == ["True", "False"]


USER = {"role": "user", "content": "7+5?"}
BAD = [
    ({"answer": "a"}, 'under "prompt" or "question" or "problem" or "messages"; got None'),
    ({"prompt": " "}, "expected a text or messages under \"prompt\"; got ' '"),
    ({"prompt": []}, r'messages under "prompt"; got \[\]'),
    ({"prompt": 7}, 'messages under "prompt"; got 7'),
    ({"prompt": ["7+5?"]}, 'message 1 under "prompt": expected {"role": ..., "content": ...}; got'),
    ({"prompt": [{"role": "user"}]}, "message 1"),
    ({"prompt": [{"from": "human", "value": "x"}]}, "message 1"),
    ({"prompt": [{"role": "human", "content": "x"}]}, "role system, user, assistant; got 'human'"),
    ({"prompt": [{"role": "user", "content": None}]}, "a text as content; got None"),
    ({"prompt": [{"role": "user", "content": " "}]}, "the content is empty"),
    ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "text parts only; got {'type"),
    ({"prompt": [USER, {"role": "system", "content": "x"}, USER]}, "must be the first"),
    (
        {"messages": [USER, {"role": "assistant", "content": "12"}]},
        'last message under "messages" must be the user\'s; got assistant',
    ),
    ({"prompt": [{"role": "system", "content": "x"}]}, "must be the user's; got system"),
    ({"prompt": "p", "answer": " "}, "under \"answer\"; got ' '"),
    ({"prompt": "p", "answer": float("nan")}, 'under "answer"; got nan'),
    ({"prompt": "p", "answer": float("inf")}, 'under "answer"; got inf'),
    ({"prompt": "p", "answer": ["a", "b"]}, 'under "answer"; got '),
    ({"prompt": "p", "answer": {"text": "a"}}, 'under "answer"; got '),
]


@pytest.mark.parametrize(("columns", "says"), BAD)
def test_bad_row_raises_with_its_place(columns, says):
    with pytest.raises(UserError, match=rf"^a.csv, row 3: .*{says}") as error:
        of(**columns)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)
