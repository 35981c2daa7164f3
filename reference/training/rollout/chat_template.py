"""A conversation as token ids, through a chat template that may know no system messages."""

from __future__ import annotations

from reference.training.errors import UserError

Messages = list[dict[str, str]]  # {"role": "system", "user" or "assistant", "content": text}


def token_ids(tokenizer, messages: Messages) -> list[int]:
    """The conversation up to the assistant's turn.

    A system message that the template refuses, or leaves out, goes before the user's first words.

    Raises:
        UserError: the template refuses the messages.
    """
    if messages[0]["role"] == "system" and not _shows(tokenizer, messages[:2]):
        system, user, *rest = messages
        merged = system["content"] + "\n\n" + user["content"]
        messages = [{**user, "content": merged}, *rest]
    return _through_template(tokenizer, messages, tokenize=True)


def _shows(tokenizer, messages: Messages) -> bool:
    """Whether the template writes all that the messages say."""
    try:
        text = _through_template(tokenizer, messages, tokenize=False)
    except UserError:
        return False
    return all(message["content"].strip() in text for message in messages)


def _through_template(tokenizer, messages: Messages, *, tokenize: bool) -> list[int] | str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=tokenize, add_generation_prompt=True, return_dict=False
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"the chat template refuses the messages ({roles}): {error}") from None
