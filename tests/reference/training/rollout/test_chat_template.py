"""Chat templates: system messages, parts, and templates that lose text."""

import copy

import pytest

from reference.training.errors import UserError
from reference.training.model.load import from_scratch
from reference.training.rollout.chat_template import common_opening
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


SYSTEM_AND_FEW_SHOT = chat(
    ("system", "12"), ("user", "3"), ("assistant", "4"), ("user", "5"), ("assistant", "6")
) + chat(("user", "7"))
TURN = "{% for m in messages %}{{ m['role'][0] }}=%s {% endfor %}+"


@pytest.mark.parametrize(
    "content",
    [
        "{{ m['content'] | trim }}",
        "{{ m['content'] | upper }}",
        "{{ m['content'] | tojson }}",
        "{{ m | tojson }}",
        "{{ m['content'] | replace(' ', '  ') }}",
        "{{ m['content'].split('</think>')[-1] }}",
        "{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}",
    ],
)
def test_template_that_transforms_text_is_accepted(content):
    messages = chat(("user", " A <b>\n\n1\u05e9 "), ("assistant", "<think>1</think>2"))
    messages += chat(("user", "\u20ac?"))
    assert encoded_text(TURN.replace("%s", content), messages)


@pytest.mark.parametrize(
    "content",
    [
        "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}",
        "{{ m['content'][0].text }}",
        "{% for c in m['content'] if c.type == 'text' %}{{ c.text }}{% endfor %}",
    ],
)
def test_template_that_wants_parts_gets_parts(content):
    template = TURN.replace("%s", content)
    expected = encoded_text(SHOWS_ALL, SYSTEM_AND_FEW_SHOT)
    assert encoded_text(template, SYSTEM_AND_FEW_SHOT) == expected


def test_template_with_parts_for_users_only():
    content = "{{ m['content'] if m['role'] != 'user' else m['content'][0]['text'] }}"
    template = TURN.replace("%s", content)
    expected = encoded_text(SHOWS_ALL, SYSTEM_AND_FEW_SHOT)
    assert encoded_text(template, SYSTEM_AND_FEW_SHOT) == expected


def test_template_with_parts_and_without_system_role():
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No') }}{% endif %}"
    template += TURN.replace("%s", "{{ m['content'][0]['text'] }}")
    messages = chat(("system", "12"), ("user", "34"))
    assert encoded_text(template, messages) == " =12 34 +"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("", "writes nothing"),
        ("  \n", "writes nothing"),
        ("Hello!", r"loses the text of message 1 \(user\), message 2 \(assistant\), mess"),
        ("{{ messages[-1]['content'] }}", r"loses the text of .*message 4 \(assistant\):"),
        ("{{ messages[0]['content'] }}", r"loses the text of .*message 5 \(user\):"),
        (
            "{% for m in messages if m['role'] != 'assistant' %}{{ m['content'] }}{% endfor %}",
            r"loses the text of message 2 \(assistant\), message 4 \(assistant\): repair the",
        ),
        (TURN.replace("%s", "{{ m['content'][:3] }}"), r"loses the text of message 1 \(user\)"),
        (TURN.replace("%s", "{{ m['content'][-3:] }}"), r"loses the text of message 1 \(user\)"),
        (
            TURN.replace("%s", "{{ m['content'] if m['content'] is not string }}"),
            "loses the text of",
        ),
        ("{{ messages | length + 'a' }}", r"refuses the messages \(user, assistant, .*unsupported"),
    ],
)
def test_template_that_loses_messages_raises(template, problem):
    with pytest.raises(UserError, match=f"^the chat template of the tokenizer {problem}"):
        encoded_text(template, SYSTEM_AND_FEW_SHOT[1:])


def test_lost_text_names_the_file(tmp_path):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = "Hello!"
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=rf"^the chat template {tmp_path}/chat_template.jinja loses"
    ):
        encode(loaded, ["7"])


def test_text_that_the_template_refuses_raises_user_error():
    template = "{% if '7' in messages[0]['content'] %}{{ raise_exception('no 7') }}{% endif %}"
    with pytest.raises(UserError, match=r"refuses the messages \(user\): no 7"):
        encoded_text(template + SHOWS_ALL, chat(("user", "7")))


def test_common_opening():
    example = chat(("system", "12"), ("user", "3"), ("assistant", "4"))
    first, second = (example + chat(("user", text)) for text in "56")
    assert common_opening([first, second]) == example
    assert common_opening([first]) == example
    assert common_opening([first, SYSTEM_AND_FEW_SHOT]) == example
    other = example[:2] + chat(("assistant", "9"), ("user", "5"))
    assert common_opening([first, other]) == chat(("system", "12"))
    assert common_opening([first, chat(("user", "5"))]) == common_opening([]) == []
