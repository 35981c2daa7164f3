"""Conversations as tokens, through templates that know system messages or do not."""

import copy

import pytest

from reference.training.errors import UserError
from reference.training.model.load import from_scratch
from reference.training.rollout.generate import encode, encode_messages

TOKENIZER = from_scratch()[1]
SHOWS_ALL = "{% for m in messages %}{{ m['role'][0] }}={{ m['content'] }} {% endfor %}+"
SHOWS_NO_SYSTEM = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{{ messages[0]['content'] }}"
)


def written(template, messages):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = template
    return tokenizer.decode(encode_messages(tokenizer, [messages]).ids[0])


def chat(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def test_a_system_prompt_goes_through_a_template_that_shows_it():
    messages = chat(("system", "12"), ("user", "34"))
    assert written(SHOWS_ALL, messages) == " =12  =34 +"


@pytest.mark.parametrize("template", [SHOWS_NO_SYSTEM, REFUSES_SYSTEM])
def test_a_system_prompt_that_a_template_leaves_out_or_refuses_comes_before_the_question(
    template,
):
    messages = chat(("system", "12"), ("user", "34"))
    assert written(template, messages) == "12 34"  # the empty line is one unknown character
    assert messages == chat(("system", "12"), ("user", "34"))


def test_a_template_that_shows_the_first_message_only_gets_both_in_it():
    prompts = encode(TOKENIZER, ["34", "5"], system="12")
    assert TOKENIZER.decode(prompts.ids[0]) == "12 34"
    assert prompts.mask.sum(-1).tolist() == [5, 4]


def test_a_conversation_is_encoded_with_all_its_turns():
    messages = chat(("user", "1"), ("assistant", "2"), ("user", "3"))
    assert written(SHOWS_ALL, messages) == " =1  =2  =3 +"


def test_messages_that_a_template_refuses_are_an_error_with_its_reason():
    refuses = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"\(user, user\): roles must alternate"):
        written(refuses, chat(("user", "1"), ("user", "2")))
