"""Questions: a text or a conversation."""

import json

from reference.training.tasks.questions import Question

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
