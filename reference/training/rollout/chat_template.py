"""Chat templates, including those that accept no system message."""

from __future__ import annotations

from reference.training.errors import UserError

Messages = list[dict[str, str]]  # {"role": "system", "user" or "assistant", "content": text}


def apply_chat_template(tokenizer, messages: Messages) -> list[int]:
    """Return the token ids of a conversation up to the assistant's turn.

    If the template refuses or omits a system message, its text is put before the user's first
    message.
    """
    from jinja2 import TemplateError

    def apply(messages: Messages, tokenize: bool):
        return tokenizer.apply_chat_template(
            messages, tokenize=tokenize, add_generation_prompt=True, return_dict=False
        )

    if messages[0]["role"] == "system":
        system, user, *others = messages
        try:
            text = apply([system, user], tokenize=False)
        except TemplateError:
            text = ""
        if not all(message["content"].strip() in text for message in (system, user)):
            merged = system["content"] + "\n\n" + user["content"]
            messages = [{**user, "content": merged}, *others]
    try:
        return apply(messages, tokenize=True)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"the chat template refuses the messages ({roles}): {error}") from None
