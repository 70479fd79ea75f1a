"""Between text and token ids: the tokenizer of a checkpoint folder, prompts on every rank, text as it comes."""
from __future__ import annotations

import codecs
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoints.byte_vocabulary import ByteTokenizer
from ..checkpoints.json_files import read_json, require_no_pointer
from ..checkpoints.step_models import byte_vocabulary, model_files
from ..comm.group import TensorParallelGroup
from ..errors import InputError, require

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NEWLINE = "\n"
UNFINISHED = "\N{REPLACEMENT CHARACTER}"        # what decodes from the first bytes of a character alone
MOST_BYTES = 4                                  # of a character in UTF-8, each of which may be a token
CONTEXT = 8                                     # tokens of a prompt that the first new one is decoded behind


def load_tokenizer(folder: str) -> Tokenizer | ByteTokenizer:
    """Load tokenizer.json; a step folder's model of bytes needs none. Raises InputError without it, or the library.

    Truncation and padding that the file may ask for are switched off, as transformers does: a text has all its tokens.
    """
    size = byte_vocabulary(folder)
    if size is not None:
        return ByteTokenizer(size)
    path = os.path.join(model_files(folder), "tokenizer.json")
    require(os.path.isfile(path), f"no {path}", "the tokenizer of the checkpoint, or ids in place of text: --ids")
    try:
        from tokenizers import Tokenizer        # late: a large vocabulary takes a second
    except ImportError:
        raise InputError("found no tokenizers, expected it for text: pip install 'mpitp[text]', or ids") from None
    content = read_bytes(path).removeprefix(codecs.BOM_UTF8)
    require_no_pointer(path, content)
    try:
        tokenizer = Tokenizer.from_buffer(content)              # a path may have bytes that the library does not take
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:              # the library raises nothing narrower, and panics by a class of its own
        raise InputError(f"{path}: found {str(error).partition(NEWLINE)[0]}, expected a tokenizer") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode(tokenizer: Tokenizer | ByteTokenizer, text: str) -> list[int]:
    """Return the ids of a text. Raises InputError for a tokenizer that loads and does not work."""
    try:
        return tokenizer.encode(text).ids
    except (KeyboardInterrupt, SystemExit, InputError):
        raise
    except BaseException as error:
        raise InputError(f"tokenizer.json: found {str(error).partition(NEWLINE)[0]} in a text, expected a tokenizer "
                         f"that encodes it") from None


def end_tokens(folder: str) -> list[int]:
    """Return the ids that end a text: eos_token_id, one or several, of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        path = os.path.join(model_files(folder), name)
        if os.path.isfile(path):
            found = read_json(path).get("eos_token_id")
            if found is not None:
                found = found if isinstance(found, list) else [found]
                good = all(isinstance(i, int) and not isinstance(i, bool) for i in found)
                require(good, f"eos_token_id {found} in {path}", "token ids")
                return found
    return []


def parse_ids(text: str) -> list[int]:
    """Parse "1,2,3", or with spaces or lines between, as a list of integers."""
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise InputError(f"found ids {text[:60]!r}, expected integers with commas between") from None


def read_text(path: str) -> str:
    """Read a file of UTF-8, with or without a byte order mark, which is no part of the text."""
    content = read_bytes(path)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{path}: found UTF-16, by its byte order mark, expected text in UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: found bytes that are not UTF-8 at {error.start}, expected text") from None


def read_bytes(path: str) -> bytes:
    """Read a file. Raises InputError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{path}: found {error.strerror}, expected a file") from None


def lines_of(text: str) -> list[str]:
    """Return the lines of a text, split at newlines alone: str.splitlines also splits at U+2028 or a form feed."""
    return re.split("\r\n|\n|\r", text)


def text_of_argument(argument: str, what: str) -> str:
    """Return the text of an argument of the command line: its bytes are UTF-8, whatever the locale took them for."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise InputError(f"{what}: found bytes that are not UTF-8 at {error.start}, expected text") from None


def print_any_character() -> None:
    """Print as \\uXXXX what the encoding of stdout does not have, instead of failing."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def give_to_all(group: TensorParallelGroup, prompts: list[list[int]] | None) -> tuple[np.ndarray, np.ndarray]:
    """Give rank 0's prompts to every rank: ids (B, S), padded with 0, and lengths (B,). Two broadcasts."""
    xp = group.xp
    shape = np.zeros(2, np.int64) if prompts is None else np.array([len(prompts), 1 + max(map(len, prompts))])
    B, width = group.broadcast(xp.asarray(shape)).tolist()
    rows = np.zeros((B, width), np.int64)                       # the first column: lengths
    for row, prompt in zip(rows, prompts or ()):
        row[0], row[1:1 + len(prompt)] = len(prompt), prompt
    rows = group.broadcast(xp.asarray(rows))
    rows = rows if isinstance(rows, np.ndarray) else rows.get()
    return rows[:, 1:], rows[:, 0]


class TextStream:
    """A TextStream decodes new tokens, one at a time, behind a prompt.

    A token may be a part of a character, and a space may depend on the token before it. So tokens are decoded behind a
    context, a few tokens that begin and end at characters, and held back while they end inside of one.

    decode : function of ids -> text
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int]):
        self.decode, size = decode, CONTEXT
        self.held: list[int] = []
        prompt = list(prompt)
        self.use(prompt[-size:])
        while self.before.startswith(UNFINISHED) and size < len(prompt):    # it begins inside a character
            size *= 2
            self.use(prompt[-size:])

    def use(self, context: list[int]) -> None:
        """Decode from now on behind these tokens."""
        self.context, self.before = context, self.decode(context)

    def push(self, token: int) -> str:
        """Return the text that is complete with this token, often empty for a part of a character."""
        self.held.append(int(token))
        piece = self.text(self.held)
        if not piece.endswith(UNFINISHED):
            if piece:
                self.use(self.held)
            self.held = []
            return piece
        if len(self.held) < MOST_BYTES:
            return ""
        first, self.held = self.held[:1], self.held[1:]     # it belongs to no character
        return self.text(first)

    def rest(self) -> str:
        """Return the text of the tokens that are held back; none will complete them."""
        held, self.held = self.held, []
        return self.text(held) if held else ""

    def text(self, tokens: list[int]) -> str:
        """Return the text of these tokens behind the context.

        Byte-fallback decoders spoil a whole run of bytes for one that is no character, so also the context's; then the
        tokens are decoded alone.
        """
        found = self.decode(self.context + tokens)
        return found[len(self.before):] if found.startswith(self.before) else self.decode(tokens)
