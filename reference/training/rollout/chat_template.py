"""Chat templates, also those that accept no system message or want content as a list of parts.

Templates lose messages silently. Whether one does is tried with a copy of the conversation, where
marks stand around each text. The texts themselves would be no test: templates trim or escape them,
and leave out the reasoning of earlier turns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reference.training.errors import UserError, one_line

Messages = list[dict[str, str]]  # {"role": "system", "user" or "assistant", "content": text}
NOT_SPACE = re.compile(r"\S")

# Roles whose content is a list of parts instead of a text, in the order in which this is tried.
ROLES_WITH_PARTS = ((), ("user",), ("user", "assistant"), ("user", "assistant", "system"))


def apply_chat_template(tokenizer, messages: Messages) -> list[int]:
    """Return the token ids of a conversation up to the assistant's turn.

    If the template refuses or omits a system message, its text is put before the user's first
    message. If it loses texts, they are passed as parts, {"type": "text", "text": ...}.
    """
    marked = [
        {**message, "content": f"first{i}z {re.sub(NOT_SPACE, 'x', message['content'])} last{i}z"}
        for i, message in enumerate(messages)
    ]
    problems = []
    for form, marked_form in zip(_forms(messages), _forms(marked), strict=True):
        try:
            problem = _find_loss(_apply(tokenizer, marked_form, tokenize=False), messages)
            if problem is None:
                return _apply(tokenizer, form, tokenize=True)
        except Exception as error:  # TemplateError, or what Python raises inside of the template
            roles = ", ".join(message["role"] for message in messages)
            problem = f"refuses the messages ({roles}): {one_line(error)}"
        problems.append(problem)
    directory = Path(tokenizer.name_or_path)
    names = ("chat_template.jinja", "tokenizer_config.json")
    file = next((directory / name for name in names if (directory / name).is_file()), "")
    problem = problems[-len(ROLES_WITH_PARTS)]  # of plain texts, without a system message
    raise UserError(
        f"the chat template {file or 'of the tokenizer'} {problem}: repair the template, or take "
        "another model"
    )


def common_opening(conversations: Sequence[Messages]) -> Messages:
    """Return the turns with which all conversations begin, such as worked examples.

    They end before a user's message.
    """
    if not conversations:
        return []
    opening = conversations[0][:-1]
    for conversation in conversations:
        while conversation[: len(opening)] != opening:
            opening = opening[:-1]
    while opening and opening[-1]["role"] == "user":
        opening = opening[:-1]
    return opening


def _forms(messages: Messages) -> Iterator[list[dict[str, Any]]]:
    """Yield the forms in which templates accept a conversation, the plain one first."""
    forms = [messages]
    if messages[0]["role"] == "system" and len(messages) > 1:
        system, user, *others = messages
        merged = system["content"] + "\n\n" + user["content"]
        forms.append([{**user, "content": merged}, *others])
    for form in forms:
        for roles in ROLES_WITH_PARTS:
            yield [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                if message["role"] in roles
                else message
                for message in form
            ]


def _find_loss(text: str, messages: Messages) -> str | None:
    """Say what marked messages have lost in the text of a template, if anything."""
    if not text.strip():
        return "writes nothing"
    if re.search(r"""['"]text['"]: ['"]first""", text):
        return "writes a list of parts as it is"
    shown = "".join(filter(str.isalnum, text.casefold()))
    lost = [
        f"message {i + 1} ({message['role']})"
        for i, message in enumerate(messages)
        if f"first{i}z" not in shown or f"last{i}z" not in shown
    ]
    return f"loses the text of {', '.join(lost)}" if lost else None


def _apply(tokenizer, messages: list[dict[str, Any]], *, tokenize: bool):
    return tokenizer.apply_chat_template(
        messages, tokenize=tokenize, add_generation_prompt=True, return_dict=False
    )
