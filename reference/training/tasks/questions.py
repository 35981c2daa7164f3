"""A question: the prompt, its ground truth, and further columns for rewards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from reference.training.errors import UserError
from reference.training.rollout.chat_template import Messages
from reference.training.tasks.rows import Row

# The names of these columns, unless --prompt-column and --answer-column say others.
PROMPT_COLUMNS = ("prompt", "question", "problem", "messages")
ANSWER_COLUMNS = ("answer", "solution", "ground_truth", "completion")
# Rewards receive other things under these names.
RESERVED = ("prompts", "completions", "answer")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Question:
    """A prompt with what is known about it.

    Attributes:
        prompt: the text of the user, or a conversation that ends with the user's message. The turns
            before it are worked examples or a system message.
        answer: the ground truth, None if there is none.
        columns: the other columns of the row, which rewards receive by name.
    """

    prompt: str | Messages
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def messages(self) -> Messages:
        """The prompt as a conversation."""
        if isinstance(self.prompt, str):
            return [{"role": "user", "content": self.prompt}]
        return self.prompt

    @property
    def text(self) -> str:
        """The text of the user's last message."""
        return next(x["content"] for x in reversed(self.messages) if x["role"] == "user")

    @property
    def key(self) -> str:
        """A text that two questions share if their prompts are equal."""
        return self.prompt if isinstance(self.prompt, str) else json.dumps(self.prompt)


def make_question(
    row: Row,
    names: Sequence[str],
    prompt_columns: Sequence[str] = PROMPT_COLUMNS,
    answer_column: str | None = "answer",
    final: Callable[[str], str] = str.strip,
) -> Question:
    """Make a question of a row; errors name its place.

    Args:
        names: all columns of the data; those that the row lacks are None.
        prompt_columns: the first that the row has is taken.
        answer_column: None if there is no ground truth.
        final: extracts the final answer from an answer text, or raises a ValueError.
    """
    given = [name for name in prompt_columns if row.columns.get(name) is not None]
    prompt_column, answer = given[0] if given else "", None
    try:
        if not given:
            wanted = " or ".join(f'"{name}"' for name in prompt_columns)
            raise ValueError(f"expected a text or messages under {wanted}; got None")
        prompt = _prompt(row.columns[prompt_column], prompt_column)
        if answer_column is not None and row.columns.get(answer_column) is not None:
            answer = final(_ground_truth(row.columns[answer_column], answer_column))
    except ValueError as error:
        raise UserError(f"{row.place}: {error}") from None
    columns = {name: row.columns.get(name) for name in names if name not in RESERVED}
    if prompt_column == "prompt":
        columns.pop("prompt")  # in the plural it is there for every question
    if answer_column is not None and answer_column in columns:
        columns[answer_column] = answer
    return Question(prompt, answer, columns)


def _prompt(value: Any, column: str) -> str | Messages:
    """Check a text or a list of messages; keep role and text of each message."""
    if isinstance(value, str) and value.strip():
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(f'expected a text or messages under "{column}"; got {_short(value)}')
    messages = []
    for number, message in enumerate(value, start=1):
        what = f'message {number} under "{column}"'
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(
                f'{what}: expected {{"role": ..., "content": ...}}; got {_short(message)}'
            )
        role = message["role"]
        if role not in ROLES:
            raise ValueError(f"{what}: expected the role {', '.join(ROLES)}; got {_short(role)}")
        if role == "system" and number > 1:
            raise ValueError(f"{what}: the system message must be the first")
        messages.append({"role": role, "content": _content(message["content"], what)})
    if messages[-1]["role"] != "user":
        raise ValueError(
            f'the last message under "{column}" must be the user\'s; got {messages[-1]["role"]}'
        )
    return messages


def _content(content: Any, what: str) -> str:
    """Return the text of a message: a text, or parts {"type": "text", "text": ...}."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{what}: expected a text as content; got {_short(content)}")
    for part in parts:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{what}: expected text parts only; got {_short(part)}")
    text = "".join(part["text"] for part in parts)
    if not text.strip():
        raise ValueError(f"{what}: the content is empty")
    return text


def _ground_truth(value: Any, column: str) -> str:
    """Return a text, a number or a truth value as text; of a conversation its one message."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        if value[0].get("role") == "assistant":
            value = _content(value[0].get("content"), f'the message under "{column}"')
    if isinstance(value, (int, float, Decimal)):  # True is an int
        value = str(value) if math.isfinite(value) else value
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'expected a text or a number under "{column}"; got {_short(value)}')
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
