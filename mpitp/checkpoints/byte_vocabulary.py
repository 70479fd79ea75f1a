"""The vocabulary of a model that was trained on bytes: token i is byte i; text is UTF-8."""
from __future__ import annotations

import json
from typing import Any

BYTES = 256


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
