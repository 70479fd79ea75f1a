"""Chats: the messages, the chat template of a checkpoint folder, and the text that it makes of them."""
from __future__ import annotations

import json
import os
import sys
from typing import Any

from ..checkpoints.json_files import Unique, read_json, require_file
from ..errors import InputError, require
from . import text
from .child import Child
from .rendering import ROOM, SECONDS, TOKENS

MOST_TEMPLATE = 1 << 20         # bytes of a chat template; known ones have up to 60,000
MOST_MESSAGES = 1 << 24         # bytes of a file of messages
WALL_SECONDS = 60               # that rendering may take where the machine is busy
Messages = list[dict[str, Any]]


def read_messages(path: str) -> Messages:
    """Read the messages of a JSON file: a list of {"role": ..., "content": ...}, which may have more fields."""
    content = text.read_text(path)
    require(len(content) <= MOST_MESSAGES, f"more than {MOST_MESSAGES} characters in {path}", "messages of at most so "
            "many")
    try:
        found = json.loads(content, object_pairs_hook=Unique(path).unique)
    except InputError:
        raise
    except (ValueError, RecursionError):
        raise InputError(f"{path}: found something that is not JSON, expected a list of messages") from None
    require_messages(found, path)
    return found


def require_messages(found: Any, path: str) -> None:
    """Raise InputError unless found is a list of messages that a model can answer, or continue."""
    require(isinstance(found, list) and found, f"no list of messages in {path}",
            '[{"role": "user", "content": "..."}, ...]')
    for number, message in enumerate(found):
        good = isinstance(message, dict) and isinstance(message.get("role"), str)
        require(good, f"message {number} of {path} without a role", '{"role": "user", "content": "..."}')
        content = message.get("content")
        require(content is None or isinstance(content, (str, list)),
                f"message {number} of {path} with content {content!r:.60}", "a text, or a list of parts")


class ChatTemplate:
    """A ChatTemplate is the one of a checkpoint folder.

    chat_template.jinja comes before the chat_template of tokenizer_config.json (a text, or a list of {name, template},
    of which "default" is taken), and that before chat_template.json, as in transformers.

    Parameters
    ----------
    folder : str

    Attributes
    ----------
    path, template : str
        The file that it is from, and its text.
    variables : dict
        The special tokens by name, such as bos_token.

    Raises
    ------
    InputError
        Where there is none, or it is too long.
    """

    def __init__(self, folder: str):
        of_tokenizer = os.path.join(folder, "tokenizer_config.json")
        config = read_json(of_tokenizer) if os.path.exists(of_tokenizer) else {}
        self.variables = special_tokens(folder, config)
        found: Any = None
        for name in ("chat_template.jinja", "tokenizer_config.json", "chat_template.json"):
            self.path = os.path.join(folder, name)
            if name == "tokenizer_config.json":
                found = config.get("chat_template")
            elif os.path.exists(self.path):
                found = read_template(self.path) if name.endswith(".jinja") else read_json(self.path).get(
                    "chat_template")
            if found is not None:
                break
        require(found is not None, f"no chat template in {folder}", "chat_template.jinja, or chat_template in "
                "tokenizer_config.json: the model may not be made for chats")
        self.template = default_of(found, self.path)
        require(len(self.template) <= MOST_TEMPLATE, f"a chat template of {len(self.template)} characters in "
                f"{self.path}", f"at most {MOST_TEMPLATE}")

    def render(self, conversations: list[Messages]) -> list[str]:
        """Return the text of each conversation, up to where the model is to answer, or to continue its last message.

        Raises InputError for a template that is none, refuses the messages, or takes too much: rendering.py's limits.
        """
        data = json.dumps(dict(template=self.template, conversations=conversations, variables=self.variables))
        expected = f"a chat template that needs at most {SECONDS} s and {ROOM >> 20} MiB"
        with Child("rendering", self.path, expected, WALL_SECONDS) as child:
            head, joined = child.ask({"subject": self.path}, data.encode())
        if head["undefined"]:
            text.warn(f"{self.path}: the chat template uses {' and '.join(head['undefined'])}, which "
                      f"tokenizer_config.json does not have: nothing stands there")
        texts, start = [], 0
        for size in head["sizes"]:
            texts.append(joined[start:start + size].decode())
            start += size
        return texts


def read_template(path: str) -> str:
    """Read chat_template.jinja. Raises InputError where it is too long to be one."""
    require_file(path, "a chat template")
    size = os.path.getsize(path)
    require(size <= 4 * MOST_TEMPLATE, f"{size} bytes in {path}", f"at most {MOST_TEMPLATE} characters")
    return text.read_text(path)


def default_of(found: Any, path: str) -> str:
    """Return the template of what chat_template holds: a text, or one of a list of named ones."""
    if isinstance(found, list):
        require(all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in found),
                f"chat templates without a name in {path}", 'a list of {"name": ..., "template": ...}')
        by_name = {one["name"]: one.get("template") for one in found}
        require("default" in by_name, f"chat templates {', '.join(by_name)[:200]} in {path}", 'one that is "default"')
        found = by_name["default"]
    require(isinstance(found, str), f"a chat template that is {type(found).__name__} in {path}", "a text")
    return found


def special_tokens(folder: str, config: dict[str, Any]) -> dict[str, str | None]:
    """Return the special tokens that tokenizer_config.json names, and special_tokens_map.json of older folders.

    A token that the file says to be null is None here, which a template sees as undefined.
    """
    found = {name: config[name] for name in TOKENS if name in config}
    older = os.path.join(folder, "special_tokens_map.json")
    if "added_tokens_decoder" not in config and os.path.exists(older):
        found |= {name: value for name, value in read_json(older).items() if name in TOKENS}
    for name, value in found.items():
        value = value.get("content") if isinstance(value, dict) else value
        require(value is None or isinstance(value, str), f"{name} {value!r:.60} in {folder}", "a text")
        found[name] = value
    return found


class Conversation:
    """A Conversation is typed at a terminal, a line a turn, on rank 0.

    Parameters
    ----------
    template : ChatTemplate
    """

    def __init__(self, template: ChatTemplate):
        self.template = template
        self.messages: Messages = []
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")

    def next_text(self) -> str | None:
        """Read a line and return the text of the conversation with it; None for an empty line or the end of the input.

        Open MPI's mpirun forwards whole lines, and not the end of what is typed.
        """
        print("> ", end="" if sys.stdin.isatty() else "\n", flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            return None
        self.messages.append({"role": "user", "content": line.rstrip("\r\n")})
        return self.template.render([self.messages])[0]

    def answered(self, answer: str) -> None:
        """Add what the model has answered."""
        self.messages.append({"role": "assistant", "content": answer})
