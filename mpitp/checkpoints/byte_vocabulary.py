"""The vocabulary of a model that was trained on bytes: token i is byte i; text is UTF-8."""
from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import InputError

BYTES = 256


class Encoding(NamedTuple):
    """The tokens of a text, as the library `tokenizers` returns them."""
    ids: list[int]


class ByteTokenizer:
    """A ByteTokenizer turns text into bytes and back; it has the two methods of `tokenizers` that commands use.

    Parameters
    ----------
    vocab_size : int
        Of the model; tokens from 256 on have no text.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str, **options: Any) -> Encoding:
        """Return the bytes of a text. Raises InputError for a byte outside of the vocabulary. No option matters."""
        ids = list(text.encode())
        if max(ids, default=0) >= self.vocab_size:
            at = next(i for i, byte in enumerate(ids) if byte >= self.vocab_size)
            raise InputError(f"found byte {ids[at]} at position {at} of a text, expected 0 to {self.vocab_size - 1}, "
                             f"below the vocabulary's size")
        return Encoding(ids)

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        """Return the text of bytes; U+FFFD for what is no UTF-8, and for a token that is no byte. No option matters."""
        pieces, run = [], bytearray()
        for token in [*ids, BYTES]:             # the last one ends the last run of bytes
            if token < BYTES:
                run.append(token)
            else:
                pieces += [run.decode("utf-8", "replace"), "\N{REPLACEMENT CHARACTER}"]
                run = bytearray()
        return "".join(pieces[:-1])


def documents(vocab_size: int) -> dict[str, str]:
    """Return {file name: text} of the same vocabulary for the library `tokenizers` and for transformers.

    {} for a vocabulary of fewer than 256, of which the library would drop the other bytes without a word.
    """
    if vocab_size < BYTES:
        return {}
    of_bytes: dict[str, Any] = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": of_bytes, "post_processor": None, "decoder": of_bytes,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "vocab": {character: byte for byte, character in enumerate(characters())}, "merges": []}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": json.dumps(tokenizer, ensure_ascii=False) + "\n",
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}


def characters() -> list[str]:
    """Return the character that stands for each byte in tokenizer.json (Radford et al., GPT-2, 2019).

    A byte that is a visible character of Latin-1 is that one; the others are U+0100 and what follows, in order.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(BYTES)]
