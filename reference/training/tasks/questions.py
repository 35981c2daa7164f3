"""A question: the prompt, its ground truth, and further columns for rewards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reference.training.rollout.chat_template import Messages


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
