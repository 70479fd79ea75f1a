"""The tokenizer of a checkpoint folder, in a process of its own. This file is that process's; tokenizer.py asks it."""
from __future__ import annotations

import codecs
import os
from array import array
from typing import TYPE_CHECKING, Any

from ..checkpoints.json_files import require_file, require_no_pointer
from ..errors import InputError, require
from . import child

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Memory that tokenizer.json may take to be loaded, a byte of it (measured: Gemma 3's 11), and a text to be encoded.
BYTES_OF_FILE, BYTES_OF_TEXT, ROOM = 32, 512, 256 << 20
# And processor time to load or to encode, and more for a text (measured: 3 us a byte).
SECONDS, BYTES_OF_SECOND = 120, 10_000
EXPECTED = f"a tokenizer that needs {BYTES_OF_FILE} times its file's bytes and {ROOM >> 20} MiB of memory at most, " \
           f"and {BYTES_OF_TEXT} a byte of text, and {SECONDS} s and one for {BYTES_OF_SECOND} bytes of text"


def load_tokenizer(folder: str) -> Tokenizer:
    """Load tokenizer.json. Raises InputError without that file, or without the library.

    Truncation and padding that the file may ask for are switched off, as transformers does: a text has all its tokens.
    """
    path = path_of(folder)
    try:
        from tokenizers import Tokenizer        # late: a large vocabulary takes a second
    except ImportError:
        raise InputError("found no tokenizers, expected it for text: pip install 'mpitp[text]', or ids") from None
    try:
        with open(path, "rb") as file:
            content = file.read().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise InputError(f"{path}: found {error.strerror}, expected a file") from None
    require_no_pointer(path, content)
    try:
        tokenizer = Tokenizer.from_buffer(content)              # a path may have bytes that the library does not take
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:              # the library raises nothing narrower, and panics by a class of its own
        raise InputError(f"{path}: found {child.first_line(error)}, expected a tokenizer") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def path_of(folder: str) -> str:
    """Return the path of a folder's tokenizer.json. Raises InputError unless there is such a file."""
    path = os.path.join(folder, "tokenizer.json")
    require(os.path.exists(path), f"no {path}", "the tokenizer of the checkpoint, or ids in place of text: --ids")
    require_file(path, "the tokenizer of the checkpoint")
    return path


def encode(tokenizer: Tokenizer, text: str, special: bool = True) -> tuple[array, int]:
    """Return the ids of a text, and how many of them the tokenizer adds in front of it; none unless `special`.

    Raises InputError for a tokenizer that loads and does not work.
    """
    try:
        encoding = tokenizer.encode(text, add_special_tokens=special)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InputError(f"tokenizer.json: found {child.first_line(error)} in a text, expected a tokenizer that "
                         f"encodes it") from None
    added = 0
    if special:
        mask = encoding.special_tokens_mask     # 1 for what a post-processor adds, not for special tokens of the text
        added = mask.index(0) if 0 in mask else len(mask)
    return array("i", encoding.ids), added


class TokenizerServer:
    """A TokenizerServer answers for one tokenizer: "load" a folder's, "encode" a text, "decode" ids, "find" a token."""

    def __init__(self) -> None:
        self.tokenizer: Any = None

    def answer(self, question: dict[str, Any], data: bytes) -> child.Message:
        """Answer a question: the data of encode is the text, of its answer the ids."""
        what = question["do"]
        if what == "load":
            folder = os.fsdecode(data)
            child.limit_seconds(SECONDS)
            child.limit_memory(ROOM + BYTES_OF_FILE * os.path.getsize(path_of(folder)))
            self.tokenizer = load_tokenizer(folder)
            return {}, b""
        if what == "encode":
            child.limit_seconds(SECONDS + len(data) // BYTES_OF_SECOND)
            child.limit_memory(ROOM + BYTES_OF_TEXT * len(data))
            ids, added = encode(self.tokenizer, data.decode(), question["special"])
            return {"added": added}, ids.tobytes()
        if what == "decode":
            return {}, self.decode(array("i", data).tolist()).encode("utf-8", "replace")
        return {"id": self.find(data.decode())}, b""

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, without special tokens."""
        try:
            return self.tokenizer.decode(ids, skip_special_tokens=True)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise InputError(f"tokenizer.json: found {child.first_line(error)} for ids {ids[:20]}, expected a "
                             f"tokenizer that decodes them") from None

    def find(self, text: str) -> int | None:
        """Return the id of the special token that has this text, None where there is none."""
        special = (id for id, token in self.tokenizer.get_added_tokens_decoder().items()
                   if token.special and token.content == text)
        return next(special, None)


def serve() -> None:
    """Run the child."""
    child.serve(TokenizerServer())
