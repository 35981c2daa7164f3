"""Chat templates with and without system messages."""

import copy

import pytest

from reference.training.errors import UserError
from reference.training.model.load import from_scratch
from reference.training.rollout.generate import encode

TOKENIZER = from_scratch()[1]
SHOWS_ALL = "{% for m in messages %}{{ m['role'][0] }}={{ m['content'] }} {% endfor %}+"
SHOWS_NO_SYSTEM = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{{ messages[0]['content'] }}"
)


def encoded_text(template, messages):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = template
    return tokenizer.decode(encode(tokenizer, [messages]).ids[0])


def chat(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def test_template_with_system_role():
    messages = chat(("system", "12"), ("user", "34"))
    assert encoded_text(SHOWS_ALL, messages) == " =12  =34 +"


@pytest.mark.parametrize("template", [SHOWS_NO_SYSTEM, REFUSES_SYSTEM])
def test_template_without_system_role_gets_the_system_prompt_in_the_question(
    template,
):
    messages = chat(("system", "12"), ("user", "34"))
    assert encoded_text(template, messages) == "12 34"  # the empty line is one unknown character
    assert messages == chat(("system", "12"), ("user", "34"))


def test_template_that_shows_only_the_first_message_gets_both_in_it():
    prompts = encode(TOKENIZER, ["34", "5"], system="12")
    assert TOKENIZER.decode(prompts.ids[0]) == "12 34"
    assert prompts.mask.sum(-1).tolist() == [5, 4]


def test_conversation_is_encoded_with_all_turns():
    messages = chat(("user", "1"), ("assistant", "2"), ("user", "3"))
    assert encoded_text(SHOWS_ALL, messages) == " =1  =2  =3 +"


def test_system_prompt_precedes_texts_and_conversations_without_one():
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = SHOWS_ALL
    prompts = ["3", chat(("user", "4"), ("assistant", "5"), ("user", "6"))]
    prompts.append(chat(("system", "7"), ("user", "8")))
    encoded = encode(tokenizer, prompts, system="12")
    rows = [ids[mask] for ids, mask in zip(encoded.ids, encoded.mask, strict=True)]
    assert tokenizer.batch_decode(rows) == [" =12  =3 +", " =12  =4  =5  =6 +", " =7  =8 +"]


def test_refused_messages_raise_user_error_with_the_reason():
    refuses = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"\(user, user\): roles must alternate"):
        encoded_text(refuses, chat(("user", "1"), ("user", "2")))
