"""What generate continues, on rank 0: texts, chats, or token ids, read before anything is loaded."""
from __future__ import annotations

import argparse
import sys

from .. import tables
from ..checkpoints.step_models import model_files
from ..comm.launch import launcher
from ..errors import require
from . import text
from .chat import ChatTemplate, Conversation, read_messages
from .progress import are_terminals, launcher_process
from .tokenizer import tokenizer_of
from .tokenizer_process import Tokenizer

KINDS = ("--prompt", "--ids", "--batch-file", "--messages")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that give prompts."""
    parser.add_argument("--prompt", metavar="TEXT", action="append", help="a text to continue")
    parser.add_argument("--ids", metavar="1,2,3", action="append", help="token ids to continue; prints ids")
    parser.add_argument("--batch-file", metavar="FILE", help="texts to continue, one a line")
    parser.add_argument("--chat", action="store_true", help="answer instead, by the folder's chat template: each text "
                        "is what a user says; without one, what is typed at the terminal, a line a turn")
    parser.add_argument("--messages", metavar="FILE", help='with --chat: answer these, a JSON list of {"role": ..., '
                        '"content": ...}')
    add_no_bos(parser)


def add_no_bos(parser: argparse.ArgumentParser) -> None:
    """Add --no-bos."""
    parser.add_argument("--no-bos", action="store_true", help="leave out what the tokenizer adds in front of a text, "
                        "such as <bos>")


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise InputError unless the options give one kind of prompt."""
    kinds = {kind: getattr(arguments, kind[2:].replace("-", "_")) for kind in KINDS}
    given = [flag for flag, value in kinds.items() if value is not None]
    require(len(given) == 1 or arguments.chat and not given, " and ".join(given) or "no prompt",
            f"one of {', '.join(KINDS)}, or --chat")
    require(arguments.chat or arguments.messages is None, "--messages without --chat", "both")
    require(not (arguments.chat and arguments.ids), "--chat with --ids", "text: a chat template makes text")
    other = "--chat" if arguments.chat else "--ids"
    require(not arguments.no_bos or not (arguments.chat or arguments.ids), f"--no-bos with {other}",
            "--prompt or --batch-file: elsewhere the tokenizer adds nothing")


def is_typed(arguments: argparse.Namespace) -> bool:
    """Return whether the prompts are typed at a terminal."""
    return arguments.chat and not (arguments.prompt or arguments.batch_file or arguments.messages)


class Prompts:
    """Prompts are texts, whose tokenizer begins to load here, or ids.

    Attributes
    ----------
    texts, ids : list of str, list of list of int; or None
        One of them, or none where the prompts are typed.
    tokenizer : Tokenizer or None
    conversation : Conversation or None
        What is typed.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.texts: list[str] | None = None
        self.ids: list[list[int]] | None = None
        self.tokenizer: Tokenizer | None = None
        self.conversation: Conversation | None = None
        self.bos: str | None = None             # that a chat template may write twice
        if arguments.json:
            tables.require_writable(arguments.json)
        if arguments.ids:
            self.ids = [text.parse_ids(ids) for ids in arguments.ids]
            require(all(self.ids), f"--ids {arguments.ids}", "at least one token id in each")
            return
        texts = given_texts(arguments)
        messages = read_messages(arguments.messages) if arguments.messages else None
        template = ChatTemplate(model_files(arguments.model)) if arguments.chat else None
        self.tokenizer = tokenizer_of(arguments.model)
        if template is None:
            self.texts = texts
            return
        self.bos = template.variables.get("bos_token")
        if is_typed(arguments):
            require(is_at_terminal(), "no prompt, and no terminal as standard input", f"one of {', '.join(KINDS)}")
            self.conversation = Conversation(template)
        else:
            self.texts = template.render([messages] if messages else [[{"role": "user", "content": said}]
                                                                      for said in texts or ()])

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of texts. Raises InputError for one that has none; warns of a token that begins one twice."""
        return [self.encode_one(number, one) for number, one in enumerate(texts)]

    def encode_one(self, number: int, one: str) -> list[int]:
        """Return the ids of the text of this number."""
        assert self.tokenizer is not None
        is_chat = self.arguments.chat
        found = text.encode(self.tokenizer, one, self.arguments.no_bos, f"prompt {number}", not is_chat).tolist()
        bos = self.tokenizer.find(self.bos) if is_chat and self.bos else None
        if bos is not None and found[:2] == [bos, bos]:
            text.warn(f"prompt {number} begins with {self.bos} twice: the chat template writes one, and the messages "
                      f"or the template another")
        require(found, f"prompt {one!r:.60}, which is no token", "text")
        return found


def given_texts(arguments: argparse.Namespace) -> list[str] | None:
    """Return the texts of --prompt or --batch-file, None where there are none."""
    if arguments.prompt:
        return [text.text_of_argument(prompt, "--prompt") for prompt in arguments.prompt]
    if arguments.batch_file is None:
        return None
    texts = [line for line in text.lines_of(text.read_text(arguments.batch_file)) if line.strip()]
    require(texts, f"no text in {arguments.batch_file}", "a text a line")
    return texts


def is_at_terminal() -> bool:
    """Return whether somebody can type: standard input is a terminal, of this process or of its launcher."""
    if sys.stdin is not None and sys.stdin.isatty():
        return True
    started_by = launcher_process() if launcher()[0] else None
    return started_by is not None and are_terminals(started_by, (0,))
