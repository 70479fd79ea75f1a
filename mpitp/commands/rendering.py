"""Chat templates to texts, in a process of its own. This file is that process's; chat.py asks it.

A template is a program in Jinja that the folder brings. jinja2's sandbox keeps it from Python's inside; limits of time,
memory and size end one that has no end.
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from ..errors import InputError
from . import child
from .continued import continued, marked

SECONDS, ROOM = 3, 512 << 20        # of processor time, and bytes of memory, for all conversations
MOST_RENDERED = 1 << 24             # characters of a conversation
OLDEST = (3, 1, 6)                  # of jinja2: older ones have known ways out of the sandbox
TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
REASONING = ("reasoning_content", "thinking", "reasoning")      # names of one field, the first of them the templates'


class Renderer:
    """A Renderer answers {template, conversations, variables} by texts."""

    def answer(self, question: dict[str, Any], data: bytes) -> child.Message:
        """Answer by the texts, one behind the other, their sizes in bytes, and the variables that are missing."""
        question |= json.loads(data)
        subject = question["subject"]
        try:
            texts, undefined = render(question["template"], question["conversations"], question["variables"])
        except InputError as error:
            raise InputError(f"{subject}: {error.args[0]}") from None
        except MemoryError:
            raise InputError(f"{subject}: found a chat template that takes more than {ROOM >> 20} MiB, expected "
                             f"less") from None
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:          # whatever a template does
            line = getattr(error, "lineno", None)
            raise InputError(f"{subject}: found a chat template that fails{f' in line {line}' if line else ''} "
                             f"({type(error).__name__}: {child.first_line(error)[:300]}), expected one for these "
                             f"messages") from None
        return {"sizes": [len(text) for text in texts], "undefined": undefined}, b"".join(texts)


def render(template: str, conversations: Sequence[list[dict[str, Any]]],
           variables: dict[str, Any]) -> tuple[list[bytes], list[str]]:
    """Return the text of each conversation, in UTF-8, and the names of special tokens that the template does not find.

    variables : special tokens by name; those that are None are undefined for the template, and known to be so

    A conversation that ends with the assistant's message ends with that message's text, which the model continues.
    """
    try:
        version = metadata.version("jinja2")
        from .jinja_environment import environment
        made = environment()
    except ImportError:                         # also the one of metadata
        raise InputError("found no jinja2, expected it for --chat: pip install 'mpitp[chat]'") from None
    if tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) < OLDEST:
        raise InputError(f"found jinja2 {version}, expected {'.'.join(map(str, OLDEST))} or newer, whose sandbox holds")
    from jinja2.meta import find_undeclared_variables
    used = find_undeclared_variables(made.parse(template))
    known = {name: value for name, value in variables.items() if value is not None}
    compiled = made.from_string(template)
    texts = []
    for messages in conversations:
        messages = [plain_message(message) for message in messages]
        if messages[-1]["role"] != "assistant":
            texts.append(rendered(compiled, messages, known, True))
        else:
            last, messages = marked(template, messages)
            texts.append(continued(rendered(compiled, messages, known, False), last))
    return texts, [name for name in TOKENS if name in used and name not in variables]


def rendered(compiled: Any, messages: list[dict[str, Any]], variables: dict[str, str], prompts: bool) -> bytes:
    """Return the text of a conversation, up to a new answer if `prompts`. Raises InputError where it is too long."""
    pieces, size = [], 0
    for piece in compiled.generate(messages=messages, tools=None, documents=None, add_generation_prompt=prompts,
                                   **variables):
        pieces.append(piece)
        size += len(piece)
        if size > MOST_RENDERED:
            raise InputError(f"found a chat template that makes more than {MOST_RENDERED} characters of a "
                             f"conversation, expected fewer")
    return "".join(pieces).encode()


def plain_message(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message as templates expect it: without nulls, its reasoning under each of its names."""
    found = {name: value for name, value in message.items() if value is not None}
    reasoning = next((found[name] for name in REASONING if name in found), None)
    return found if reasoning is None else {"thinking": reasoning, **found, "reasoning_content": reasoning}


def serve() -> None:
    """Run the child."""
    child.limit_seconds(SECONDS)
    child.limit_memory(ROOM)
    child.limit(0, "RLIMIT_CORE")
    child.limit(0, "RLIMIT_FSIZE")              # a template has no file to write
    child.serve(Renderer())
