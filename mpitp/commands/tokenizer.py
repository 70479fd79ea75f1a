"""The tokenizer of a checkpoint folder as commands use it: it loads in a process of its own, while weights are read."""
from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Sequence

from ..errors import InputError
from .child import Child
from .tokenizing import EXPECTED, path_of

_begun: dict[str, Tokenizer] = {}       # those of begin(), by folder, until tokenizer_of() takes them


def begin(argv: Sequence[str]) -> None:
    """Begin to load the tokenizer that a command line is going to need, before NumPy and the layers are imported.

    A guess, which is only about time: tokenizer_of() begins what this has missed, and bad options are refused later.
    """
    folder = None
    for word, following in zip(argv, [*argv[1:], None]):
        if word == "--model":
            folder = following
        elif word.startswith("--model="):
            folder = word.partition("=")[2]
    if folder is not None and not any(word.startswith("--ids") or word in ("-h", "--help") for word in argv):
        with contextlib.suppress(InputError, OSError):
            _begun[folder] = Tokenizer(folder)


def tokenizer_of(folder: str) -> Tokenizer:
    """Return the tokenizer of a folder: the one that begin() has begun to load, else a new one.

    That of a step folder is one of bytes, or lies in the folder of its run.
    """
    begun = _begun.pop(folder, None)
    if begun is not None:
        return begun
    from ..checkpoints.step_models import byte_vocabulary, model_files      # late: begin() waits for no NumPy
    size = byte_vocabulary(folder)
    if size is None:
        return Tokenizer(model_files(folder))
    from .byte_tokenizer import ByteTokenizer
    return ByteTokenizer(size)


class Tokenizer:
    """A Tokenizer encodes and decodes text. The constructor begins to load it; what is asked first waits for that.

    Parameters
    ----------
    folder : str
        Of the checkpoint, with tokenizer.json.

    Raises
    ------
    InputError
        Without that file; for one that is none, or takes too much memory, when something is asked.
    """

    def __init__(self, folder: str):
        self.child = Child("tokenizing", path_of(folder), EXPECTED)
        self.child.begin({"do": "load"}, os.fsencode(folder))
        self.is_loaded = False

    def load(self) -> None:
        """Wait until the tokenizer is loaded."""
        if not self.is_loaded:
            self.is_loaded = True               # or found not to be: the answer comes once
            self.child.finish()

    def encode(self, text: str, special: bool = True) -> tuple[array, int]:
        """Return the ids of a text, and how many of them the tokenizer adds in front of it.

        special : whether the tokenizer adds anything
        """
        self.load()
        head, data = self.child.ask({"do": "encode", "special": special}, text.encode())
        return array("i", data), head["added"]

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, without special tokens."""
        self.load()
        return self.child.ask({"do": "decode"}, array("i", ids).tobytes())[1].decode()

    def find(self, text: str) -> int | None:
        """Return the id of the special token that has this text, None where there is none."""
        self.load()
        return self.child.ask({"do": "find"}, text.encode())[0]["id"]

    def close(self) -> None:
        """End the process."""
        self.child.close()
