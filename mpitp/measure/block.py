"""Cases of a decoder block: layer norm, causal attention, layer norm, tanh-GELU feed-forward, biases, residuals."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..arrays import Array, compute_dtype, module_of, sum_dtype
from ..comm.group import TensorParallelGroup
from ..comm.rows import Rows
from ..config import DecoderConfig
from ..layers.block import ParallelBlock
from ..ops.attention import TILE
from ..ops.linear import linear_backward, linear_forward, product
from .feed_forward import Draws, LayerCases
from .rounds import Case

BLOCK_HEADS = 8


def block_config(hidden: int, heads: int = BLOCK_HEADS) -> DecoderConfig:
    """Return a decoder of one such block."""
    return DecoderConfig(vocab_size=1, hidden_size=hidden, num_layers=1, num_attention_heads=heads,
                         position_embedding="none")


def block_data(tokens: int, hidden: int, dtype: Any = "float32") -> Iterator[Array]:
    """Yield x and dy (1, S, D), on the host, the same on every rank."""
    return (np.random.default_rng(seed).standard_normal((1, tokens, hidden)).astype(dtype) for seed in (1, 2))


def block_cases(group: TensorParallelGroup, tokens: int, hidden: int, heads: int = BLOCK_HEADS, dtype: str = "float32",
                prefix: str = "", gather_again: bool = False, **options: Any) -> dict[str, Case]:
    """Return {"forward", "forward+backward"} of a ParallelBlock with these options; gather_again: as Rows has it."""
    block = ParallelBlock(group, block_config(hidden, heads), dtype=dtype, **options)
    x, dy = (group.xp.asarray(a) for a in block_data(tokens, hidden, compute_dtype(dtype, group.device)))
    if not block.sequence_parallel:
        return LayerCases(block, x, dy).by_name(prefix)
    rows = Rows(group, (1, tokens), gather_again)
    return LayerCases(block, rows.split(x), rows.split(dy), rows).by_name(prefix)


class BlockProducts:
    """BlockProducts are the bare products of one rank: six linears, and attention's by tiles.

    Backward of attention: the scores again, and the gradients of weights, value, query and key.
    """

    def __init__(self, group: TensorParallelGroup, tokens: int, hidden: int, heads: int, dtype: str) -> None:
        xp, draw = group.xp, Draws(group, 3, dtype)
        K, mine = hidden // heads, group.partition(heads).lengths[group.rank]
        F = group.partition(4 * hidden).lengths[group.rank]
        shapes = 3 * [(hidden, mine * K)] + [(mine * K, hidden), (hidden, F), (F, hidden)]
        gradient_dtype = sum_dtype(compute_dtype(dtype, group.device))
        self.linears = [(draw(tokens, i), draw(o, i), draw(tokens, o), xp.empty((o, i), gradient_dtype))
                        for i, o in shapes]                     # x, w, dy, dw
        self.q, self.k, self.v, self.da = (draw(mine, tokens, K) for _ in range(4))
        tile = tile_of(group)
        self.tiles = causal_tiles(tokens, tile)
        self.p, self.ds = (xp.empty(mine * min(tile, tokens) * tokens, self.q.dtype) for _ in range(2))

    def forward(self) -> None:
        """Multiply as forward does."""
        for x, w, _, _ in self.linears:
            linear_forward(x, w)
        for queries, keys in self.tiles:
            stacked_product(scores(self.q, self.k, self.p, queries, keys), self.v[:, keys])

    def forward_backward(self) -> None:
        """Multiply as forward and backward do."""
        self.forward()
        for x, w, dy, dw in self.linears:
            linear_backward(dy, (x, w), dw)
        for queries, keys in self.tiles:
            weights = scores(self.q, self.k, self.p, queries, keys)
            d_scores = scores(self.da, self.v, self.ds, queries, keys)
            stacked_product(weights.swapaxes(1, 2), self.da[:, queries])
            stacked_product(d_scores, self.k[:, keys])
            stacked_product(d_scores.swapaxes(1, 2), self.q[:, queries])


def block_product_cases(group: TensorParallelGroup, tokens: int, hidden: int, heads: int = BLOCK_HEADS,
                        dtype: str = "float32") -> dict[str, Case]:
    """Return the bare products of one rank's share of a block: the limit of what it can reach."""
    bare = BlockProducts(group, tokens, hidden, heads, dtype)
    return {"products forward": bare.forward, "products forward+backward": bare.forward_backward}


def scores(a: Array, b: Array, buffer: Array, queries: slice, keys: slice) -> Array:
    """Multiply the queries of a tile by the keys that they see, into the beginning of a buffer."""
    shape = len(a), queries.stop - queries.start, keys.stop
    out = buffer[:shape[0] * shape[1] * shape[2]].reshape(shape)
    return stacked_product(a[:, queries], b[:, keys].swapaxes(1, 2), out)


def tile_of(group: TensorParallelGroup) -> int:
    """Return how many queries attention takes at once."""
    if group.device == "cpu":
        return TILE
    from ..ops.cuda.attention import TILE as tile_of_gpu
    return tile_of_gpu


def stacked_product(a: Array, b: Array, out: Array | None = None) -> Array:
    """Multiply matrix by matrix along the first axis."""
    return np.matmul(a, b, out=out) if module_of(a) is np else product(a, b, out)


def causal_tiles(tokens: int, tile: int) -> list[tuple[slice, slice]]:
    """Return the queries of each tile, and the keys that it sees."""
    return [(slice(first, min(first + tile, tokens)), slice(0, min(first + tile, tokens)))
            for first in range(0, tokens, tile)]


def block_flops(tokens: int, hidden: int, backward: bool, tile: int) -> int:
    """Return the flops of the products of all ranks.

    There are 12 D^2 weights, and 2 products of attention forward, 7 with backward.
    """
    pairs = sum((queries.stop - queries.start) * keys.stop for queries, keys in causal_tiles(tokens, tile))
    return 2 * (12 * tokens * hidden ** 2 * (3 if backward else 1) + pairs * hidden * (7 if backward else 2))
