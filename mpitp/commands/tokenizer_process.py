"""A tokenizer in a process of its own, which loads while weights are read."""
from __future__ import annotations

import os
from array import array

from .child import Child
from .tokenizing import EXPECTED, path_of


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
