"""Cases of the feed-forward block: the layer, its bare products, and a read of its weights."""
from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..arrays import Array, compute_dtype, sum_dtype
from ..comm.group import TensorParallelGroup
from ..layers.mlp import ParallelMLP
from ..ops.linear import linear_backward, linear_forward
from .rounds import Case

if TYPE_CHECKING:
    from ..comm.rows import Rows
    from ..layers.block import ParallelBlock


class Draws:
    """The standard normals of one seed, one array after the other, where the group's arrays are."""

    def __init__(self, group: TensorParallelGroup, seed: int, dtype: str) -> None:
        self.group, self.dtype = group, compute_dtype(dtype, group.device)
        self.generator = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> Array:
        return self.group.xp.asarray(self.generator.standard_normal(shape).astype(self.dtype))


class LayerCases:
    """LayerCases are forward and backward of a layer on one x and dy."""

    def __init__(self, layer: ParallelMLP | ParallelBlock, x: Array, dy: Array, rows: Rows | None = None) -> None:
        self.layer, self.x, self.dy, self.rows = layer, x, dy, rows
        self.gradients = layer.backward(dy, layer.forward(x, rows=rows)[1])[1]

    def forward(self) -> None:
        """Run forward without keeping what backward needs."""
        self.layer.forward(self.x, rows=self.rows, save=False)

    def forward_backward(self) -> None:
        """Run forward and backward."""
        _, saved = self.layer.forward(self.x, rows=self.rows)
        self.layer.backward(self.dy, saved, out=self.gradients)

    def by_name(self, prefix: str) -> dict[str, Case]:
        """Return both cases under their names."""
        return {f"{prefix}forward": self.forward, f"{prefix}forward+backward": self.forward_backward}


def mlp_cases(group: TensorParallelGroup, tokens: int, hidden: int, ffn: int, activation: str = "gelu_tanh",
              dtype: str = "float32", prefix: str = "") -> tuple[dict[str, Case], ParallelMLP]:
    """Return {"forward", "forward+backward"} of a ParallelMLP without bias, and the layer."""
    layer = ParallelMLP(group, hidden, ffn, activation, bias=False, dtype=dtype)
    x, dy = (Draws(group, seed, dtype)(tokens, hidden) for seed in (1, 2))
    return LayerCases(layer, x, dy).by_name(prefix), layer


class MlpProducts:
    """The bare matrix products of one rank's share of a feed-forward block.

    Operands are distinct buffers: one buffer as both operands would take the slower syrk kernel.
    """

    def __init__(self, group: TensorParallelGroup, tokens: int, hidden: int, ffn: int, dtype: str) -> None:
        part, draw = group.partition(ffn).lengths[group.rank], Draws(group, 3, dtype)
        self.x, self.dy = draw(tokens, hidden), draw(tokens, hidden)
        self.h, self.dh = draw(tokens, part), draw(tokens, part)
        self.up, self.down = draw(part, hidden), draw(hidden, part)
        self.dup, self.ddown = (group.xp.empty(w.shape, sum_dtype(w.dtype)) for w in (self.up, self.down))

    def forward(self) -> None:
        """Multiply by both weights."""
        linear_forward(self.x, self.up)
        linear_forward(self.h, self.down)

    def forward_backward(self) -> None:
        """Multiply as forward and backward do: six products."""
        self.forward()
        linear_backward(self.dy, (self.h, self.down), self.ddown)
        linear_backward(self.dh, (self.x, self.up), self.dup)


def product_cases(group: TensorParallelGroup, tokens: int, hidden: int, ffn: int,
                  dtype: str = "float32") -> dict[str, Case]:
    """Return the bare products of one rank's share: the limit of what the block can reach."""
    bare = MlpProducts(group, tokens, hidden, ffn, dtype)
    return {"products forward": bare.forward, "products forward+backward": bare.forward_backward}


class Read:
    """A plain read of as many bytes as one rank's two weights have.

    On a CPU by BLAS dot products of 1 MiB, the fastest reader that NumPy has; on a GPU a copy of half of them, which
    reads and writes as many bytes.
    """

    def __init__(self, group: TensorParallelGroup, hidden: int, ffn: int, dtype: str) -> None:
        part, kind = group.partition(ffn).lengths[group.rank], compute_dtype(dtype, group.device)
        self.xp, self.is_on_gpu = group.xp, group.device == "gpu"
        if self.is_on_gpu:
            self.source = group.xp.zeros(part * hidden, kind)
            self.target = group.xp.empty_like(self.source)
        else:
            self.vector = np.ones(1 << 12, kind)                # stays in the first-level cache
            data = np.ones(2 * part * hidden, kind)
            self.rows = data[:data.size // self.vector.size * self.vector.size].reshape(-1, self.vector.size)

    def run(self) -> None:
        """Read all of the source once."""
        if self.is_on_gpu:
            self.xp.copyto(self.target, self.source)
        else:
            self.rows @ self.vector


def read_case(group: TensorParallelGroup, hidden: int, ffn: int, dtype: str = "float32") -> dict[str, Case]:
    """Return {"read"}, a plain read of one rank's weights: the limit of one token."""
    return {"read": Read(group, hidden, ffn, dtype).run}


def flops(tokens: int, hidden: int, ffn: int, backward: bool) -> int:
    """Return the flops of the products of all ranks: 2 a multiply-add, two products forward, four more backward."""
    return 2 * tokens * hidden * ffn * (6 if backward else 2)
