"""A chat whose last message is the assistant's: its text is cut where that message ends, so that the model goes on.

A mark behind the message says where it ends, as transformers has it (5.24, utils/chat_template_utils.py). A template
may strip a message: then what stands before the mark is stripped, too.
"""
from __future__ import annotations

from typing import Any

from ..errors import InputError

MARK = "CONTINUE_FINAL_MESSAGE_TAG "


def marked(template: str, messages: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """Return the text of the last message, and messages in which the mark follows it.

    Raises InputError for a message without text, and for a template that asks for no content of any.
    """
    last = dict(messages[-1])
    content = last.get("content")
    if "content" not in template:
        raise InputError("found a last message of the assistant, expected a chat template that uses its content")
    if isinstance(content, list):
        blocks = [dict(block) if isinstance(block, dict) else block for block in content]
        found = [block for block in blocks if isinstance(block, dict) and isinstance(block.get("text"), str)]
        if found:
            content, found[-1]["text"] = found[-1]["text"], found[-1]["text"] + MARK
            last["content"] = blocks
    elif isinstance(content, str):
        last["content"] = content + MARK
    if not isinstance(content, str):
        raise InputError("found a last message of the assistant without a text, expected one that it continues")
    return content, [*messages[:-1], last]


def continued(text: bytes, last: str) -> bytes:
    """Return what stands before the mark. Raises InputError unless the template has kept the message."""
    mark = MARK.encode()
    before, found, after = text.rpartition(mark.strip())
    if not found or last.strip().encode() not in text:
        raise InputError("found a last message of the assistant that the chat template leaves out or changes, expected "
                         "it in the text, to be continued")
    return before if (found + after).startswith(mark) else before.decode().rstrip().encode()
