"""The tokenizer of a model that was trained on bytes, without a file or a library: token i is byte i; text is UTF-8."""
from __future__ import annotations

from array import array

from ..checkpoints.byte_vocabulary import BYTES
from ..errors import InputError
from .tokenizer_process import Tokenizer


class ByteTokenizer(Tokenizer):
    """A ByteTokenizer turns text into bytes and back.

    Parameters
    ----------
    vocab_size : int
        Of the model; tokens from 256 on have no text.
    """

    def __init__(self, vocab_size: int):        # not as Tokenizer's: there is no file, hence no process
        self.vocab_size, self.is_loaded = vocab_size, True

    def encode(self, text: str, special: bool = True) -> tuple[array, int]:
        """Return the bytes of a text, in front of which nothing is added, and 0.

        Raises InputError for a byte outside of the vocabulary.
        """
        content = text.encode()
        for at, byte in enumerate(content):
            if byte >= self.vocab_size:
                raise InputError(f"found byte {byte} at position {at} of a text, expected 0 to {self.vocab_size - 1}, "
                                 f"below the vocabulary's size")
        return array("i", list(content)), 0

    def decode(self, ids: list[int]) -> str:
        """Return the text of bytes; U+FFFD for what is no UTF-8, and for a token that is no byte."""
        pieces, run = [], bytearray()
        for token in [*ids, BYTES]:             # the last one ends the last run of bytes
            if token < BYTES:
                run.append(token)
            else:
                pieces += [run.decode("utf-8", "replace"), "\N{REPLACEMENT CHARACTER}"]
                run = bytearray()
        return "".join(pieces[:-1])

    def find(self, text: str) -> int | None:
        """Return None: no token is special."""
        return None

    def close(self) -> None:
        """Do nothing: there is no process to end."""
