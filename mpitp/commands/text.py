"""Between text and token ids: texts as users give them, prompts on every rank, text as it comes."""
from __future__ import annotations

import codecs
import os
import re
import sys
from array import array
from collections.abc import Callable, Sequence

import numpy as np

from ..arrays import on_host
from ..checkpoints.json_files import read_json, require_file
from ..checkpoints.step_models import model_files
from ..comm.group import TensorParallelGroup
from ..errors import InputError, require
from .tokenizer_process import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"        # what decodes from the first bytes of a character alone
MOST_BYTES = 4                                  # of a character in UTF-8, each of which may be a token
MOST_IDS = 1 << 31                              # an id is an int32
PIECE = 1 << 20                                 # characters of a file of ids that are parsed at a time
BETWEEN_IDS = re.compile(r"[\s,]")
CONTEXT = 8                                     # tokens of a prompt that the first new one is decoded behind


def encode(tokenizer: Tokenizer, content: str, no_bos: bool, what: str, special: bool = True) -> array:
    """Return the ids of a text. Warns where it begins with the token that the tokenizer adds, too.

    Parameters
    ----------
    tokenizer : Tokenizer
    content : str
    no_bos : bool
        Whether to leave out what the tokenizer adds in front.
    what : str
        The text's name, for the warning.
    special : bool, optional
        Whether the tokenizer adds anything.
    """
    ids, added = tokenizer.encode(content, special)
    if added and not no_bos and ids[added:added + 1] == ids[added - 1:added]:
        warn(f"{what} begins with token {ids[added]} twice: the text has one, and the tokenizer adds one; --no-bos "
             f"leaves out the tokenizer's")
    return ids[added:] if no_bos else ids


def end_tokens(folder: str) -> list[int]:
    """Return the ids that end a text: eos_token_id, one or several, of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        path = os.path.join(model_files(folder), name)
        if os.path.lexists(path):               # read_json refuses what is no file
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
        found = [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise InputError(f"found ids {text[:60]!r}, expected integers with commas between") from None
    for token in found:
        require(abs(token) < MOST_IDS, f"token id {token!s:.60}", f"one below {MOST_IDS}")
    return found


def read_ids(path: str) -> np.ndarray:
    """Read the ids of a file as parse_ids does, piece by piece, as int32."""
    content, start, pieces = read_text(path), 0, [np.empty(0, np.int32)]
    while start < len(content):
        gap = BETWEEN_IDS.search(content, start + PIECE)
        end = gap.end() if gap else len(content)
        pieces.append(np.array(parse_ids(content[start:end]), np.int32))
        start = end
    return np.concatenate(pieces)


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
    """Read a file. Raises InputError where it cannot be read, is a pipe or a device, or is larger than memory."""
    require_file(path, "a file")
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{path}: found {error.strerror}, expected a file") from None
    except MemoryError:
        raise InputError(f"{path}: found {os.path.getsize(path)} bytes, expected a file of fewer than "
                         f"memory has") from None


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


def warn(message: str) -> None:
    """Write a warning to standard error."""
    print(f"mpitp: warning: {message}", file=sys.stderr, flush=True)


def give_to_all(group: TensorParallelGroup, prompts: list[list[int]] | None) -> tuple[np.ndarray, np.ndarray]:
    """Give rank 0's prompts to every rank: ids (B, S), padded with 0, and lengths (B,). Two broadcasts."""
    xp = group.xp
    shape = np.zeros(2, np.int64) if prompts is None else np.array([len(prompts), 1 + max(map(len, prompts))])
    B, width = group.broadcast(xp.asarray(shape)).tolist()
    rows = np.zeros((B, width), np.int64)                       # the first column: lengths
    for row, prompt in zip(rows, prompts or ()):
        row[0], row[1:1 + len(prompt)] = len(prompt), prompt
    rows = on_host(group.broadcast(xp.asarray(rows)))
    return rows[:, 1:], rows[:, 0]


def give_ids(group: TensorParallelGroup, ids: np.ndarray | None) -> np.ndarray:
    """Give rank 0's ids (S,) to every rank, as int32. Two broadcasts, of 8 bytes and of 4 S."""
    xp = group.xp
    size = int(group.broadcast(xp.asarray(np.array([0 if ids is None else len(ids)]))).tolist()[0])
    return on_host(group.broadcast(xp.asarray(np.empty(size, np.int32) if ids is None else ids)))


class TextStream:
    """A TextStream decodes new tokens, one at a time, behind a prompt.

    A token may be a part of a character, and a space may depend on the token before it. So tokens are decoded behind a
    context, a few tokens that begin and end at characters, and held back while they end inside of one. So are the last
    tokens of a prompt that ends inside of one, which the new tokens may complete.

    decode : function of ids -> text
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int]):
        self.decode, size = decode, CONTEXT
        prompt = list(prompt)
        self.held = unfinished_end(decode, prompt)
        prompt = prompt[:len(prompt) - len(self.held)]
        self.use(prompt[-size:])
        while self.before.startswith(UNFINISHED) and size < len(prompt):    # it begins inside a character
            size *= 2
            self.use(prompt[-size:])
        self.shown = self.text(self.held) if self.held else ""          # of the prompt already

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
            return self.new(piece)
        if len(self.held) < MOST_BYTES:
            return ""
        size = self.fewest_signs()
        first, self.held = self.held[:size], self.held[size:]
        return self.new(self.text(first))

    def fewest_signs(self) -> int:
        """Return how many of the tokens that are held back belong to no later ones: one, or U+FFFD itself in bytes."""
        lengths = [len(self.text(self.held[:size])) + len(self.text(self.held[size:]))
                   for size in range(1, len(self.held))]
        return 1 + lengths.index(min(lengths))

    def rest(self) -> str:
        """Return the text of the tokens that are held back; none will complete them."""
        held, self.held = self.held, []
        return self.new(self.text(held)) if held else ""

    def new(self, piece: str) -> str:
        """Return what of a piece the prompt has not shown: all of it where new tokens have completed a character."""
        if self.shown.startswith(piece):
            self.shown = self.shown[len(piece):]
            return ""
        piece, self.shown = piece.removeprefix(self.shown), ""
        return piece

    def text(self, tokens: list[int]) -> str:
        """Return the text of these tokens behind the context.

        Byte-fallback decoders spoil a whole run of bytes for one that is no character, so also the context's; then the
        tokens are decoded alone.
        """
        found = self.decode(self.context + tokens)
        return found[len(self.before):] if found.startswith(self.before) else self.decode(tokens)


def unfinished_end(decode: Callable[[list[int]], str], prompt: list[int]) -> list[int]:
    """Return the last tokens of a prompt that are the first bytes of a character, or may be; none of most prompts."""
    length = CONTEXT
    while length < len(prompt) and decode(prompt[-length:]).startswith(UNFINISHED):     # it begins inside a character
        length *= 2
    end = prompt[-length:]
    if end and decode(end).endswith(UNFINISHED):
        for size in range(1, min(MOST_BYTES, len(end) + 1)):
            if not decode(end[:-size]).endswith(UNFINISHED):
                return end[-size:]
    return []
