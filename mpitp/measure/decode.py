"""Cases of generation: one token after the other, and the matrix products that it cannot do without."""
from __future__ import annotations

import numpy as np

from ..arrays import Array
from ..comm.group import TensorParallelGroup
from ..config import DecoderConfig
from ..inference.generation import RECORD_FROM, one_token
from ..inference.kv import KeyValues
from ..layers.decoder import Decoder
from ..ops.linear import linear_forward
from .block import BLOCK_HEADS
from .rounds import Case


class Decode:
    """One token in the same place again and again, behind a prompt, as generation does it."""

    def __init__(self, model: Decoder, tokens: int) -> None:
        self.kv = KeyValues(model, 1, tokens + 1)
        model.extend(np.arange(tokens)[None] % model.config.vocab_size, self.kv)
        self.extend = one_token(model, self.kv, RECORD_FROM)

    def run(self) -> None:
        """Decode one token, and forget it."""
        self.extend(np.array([[1]]))
        self.kv.advance(-1)


def decode_cases(group: TensorParallelGroup, tokens: int, hidden: int, heads: int = BLOCK_HEADS,
                 dtype: str = "float32") -> tuple[dict[str, Case], Decoder]:
    """Return {"decode", "matrix-vector products"} of a small decoder, and the decoder.

    It is of Llama's kind, with 2 layers and a vocabulary of 8,192. A call decodes one token behind `tokens` others.
    """
    model = Decoder(group, decode_config(hidden, heads), dtype=dtype)
    return {"decode": Decode(model, tokens).run, "matrix-vector products": matrix_vector_products(model)}, model


def decode_config(hidden: int, heads: int = BLOCK_HEADS) -> DecoderConfig:
    """Return the config of that decoder."""
    return DecoderConfig(8192, hidden, 2, heads, normalization="rmsnorm", activation="silu", gated=True, qkv_bias=False,
                         attention_bias=False, mlp_bias=False, tie_word_embeddings=True)


def matrix_vector_products(model: Decoder) -> Case:
    """Return a case that multiplies every matrix of this rank by a vector, the head's once: the limit of decoding."""
    return MatrixProducts(model, 1).run


def prefill_products(model: Decoder, tokens: int) -> Case:
    """Return a case that multiplies every matrix of this rank by a prompt, the head's by its last token alone."""
    return MatrixProducts(model, tokens).run


class MatrixProducts:
    """Every matrix of a decoder that a pass reads as a whole, times so many rows; the head's times one."""

    def __init__(self, model: Decoder, rows: int) -> None:
        head = model.weights[model.head.weight_name]
        self.weights = [(w, 1 if w is head else rows) for name, w in model.weights.items()
                        if w.ndim == 2 and not name.startswith("position") and
                        (w is head or name != "embedding.weight")]     # a lookup reads one row of it
        xp = model.group.xp
        self.x = {(rows, w.shape[1]): xp.ones((rows, w.shape[1]), w.dtype) for w, rows in self.weights}
        self.y = {(rows, w.shape[0]): xp.empty((rows, w.shape[0]), w.dtype) for w, rows in self.weights}
        self.multiply = multiply if xp is np else linear_forward

    def run(self) -> None:
        """Multiply each."""
        for w, rows in self.weights:
            self.multiply(self.x[rows, w.shape[1]], w, self.y[rows, w.shape[0]])


def multiply(x: Array, w: Array, y: Array) -> None:
    """Write x W^T to y."""
    np.matmul(x, w.T, out=y)
