"""Which attention heads a rank has, where they lie in its arrays, and what their scores are made with.

Dimension key: B sequences, S positions, N = B S rows, H query heads, G key/value heads, n query heads of one of those,
K features of a head.
"""
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..arrays import Array
from ..comm.group import TensorParallelGroup
from ..errors import require
from ..ops.dropout import dropout_scale
from ..sharding.heads import KeyValueUnit, key_value_units
from ..sharding.partition import Block
from ..sharding.specs import join


class Heads:
    """The query heads of this rank, block by block, and the key/value heads that they need, unit by unit.

    Parameters
    ----------
    group : TensorParallelGroup
        The ranks.
    num_attention_heads, num_query_groups, kv_channels : int
        H, G and K of the whole layer.
    """

    def __init__(self, group: TensorParallelGroup, num_attention_heads: int, num_query_groups: int, kv_channels: int):
        self.kv_channels, share = kv_channels, num_attention_heads // num_query_groups
        self.partition = group.partition(num_attention_heads)
        self.units = key_value_units(num_attention_heads, num_query_groups, group.size, group.blocks)
        self.held_units = [unit for unit in self.units if unit.held_by(group.rank)]
        self.first_held = group.partition(num_query_groups, share=share).held(group.rank).start

    def block_rows(self, block: Block) -> slice:
        """Return where the features of a block's query heads lie in this rank's arrays."""
        return slice(block.local.start * self.kv_channels, block.local.stop * self.kv_channels)

    def unit_rows(self, unit: KeyValueUnit) -> slice:
        """Return where the features of a unit's key/value heads lie in this rank's arrays."""
        return slice(*((head - self.first_held) * self.kv_channels for head in (unit.start, unit.stop)))

    def heads_by_unit(self, block: Block) -> Iterator[tuple[KeyValueUnit, slice]]:
        """Yield (unit, heads): the block's query heads (a slice of the global ones) that need each unit."""
        for unit in self.units:
            if block.index in unit.blocks:
                yield unit, slice(max(unit.partition.first, block.start), min(unit.partition.last, block.stop))

    def owned_units(self, block: Block) -> list[KeyValueUnit]:
        """Return the units that belong to a block: those whose first query head it has."""
        return [unit for unit in self.held_units if unit.blocks[0] == block.index]


class AttentionCall(NamedTuple):
    """What one forward of ParallelAttention and its backward share: sizes, mask, dropout step, cos and sin, rows."""
    layer: Any
    B: int
    S: int
    mask: Any
    step: int | None
    tables: tuple
    kv: Any
    rows: Any

    def positions_of(self, b: int) -> int:
        """Return how many positions sequence b has, new ones included."""
        return self.S if self.kv is None else int(self.kv.lengths[b]) + self.S

    def options(self, heads: slice, unit: KeyValueUnit, b: int) -> dict[str, Any]:
        """Return what the scores of these query heads in sequence b are made with, as attention_forward takes it."""
        layer = self.layer
        options = dict(causal=layer.causal, window=layer.sliding_window, softcap=layer.config.softcap,
                       slopes=self.slopes(heads, unit))
        if self.mask is not None:
            options["mask"] = self.mask[b]
        if layer.dropout and self.step is not None:
            options["keep"] = functools.partial(self.keep, heads, unit, b)
        return options

    def slopes(self, heads: slice, unit: KeyValueUnit) -> Array | None:
        """Return ALiBi's slopes of these query heads, under the key/value heads that they share; None without ALiBi."""
        slopes = self.layer.slopes
        return None if slopes is None else slopes[heads].reshape(unit.stop - unit.start, -1)

    def keep(self, heads: slice, unit: KeyValueUnit, b: int, first: int, stop: int) -> Array:
        """Return dropout's scales of queries first..stop-1 (G, n, queries, S), addressed in (B, H, S, S)."""
        assert self.step is not None, "dropout without a step"
        layer, shape = self.layer, (self.B, self.layer.num_attention_heads, self.S, self.S)
        window = b, heads, slice(first, stop), slice(0, self.S)
        scales = dropout_scale(layer.seed, join(layer.name, "weights.dropout"), self.step, layer.dropout, shape, window,
                               layer.sum_dtype, layer.group.xp)
        return scales.reshape(unit.stop - unit.start, -1, stop - first, self.S)


def require_mask(mask: Any, B: int, S: int) -> None:
    """Raise InputError unless mask is None or bool, for each key (B, S) or each query and key (B, S, S)."""
    if mask is not None:
        dtype, shape = getattr(mask, "dtype", None), getattr(mask, "shape", None)
        require(str(dtype) == "bool" and shape in ((B, S), (B, S, S)) and not hasattr(mask, "mask"),
                f"a mask {dtype} {shape}", f"bool {(B, S)} or {(B, S, S)}, and no masked array")


def by_group(x_BSHK: Array, b: int, unit: KeyValueUnit, heads: slice, block: Block) -> Array:
    """Return those heads of sequence b, (G, n, S, K), a view: under the key/value heads that they share."""
    x_SHK = x_BSHK[b, :, heads.start - block.start:heads.stop - block.start]
    S, H, K = x_SHK.shape
    G = unit.stop - unit.start
    return x_SHK.reshape(S, G, H // G, K).transpose(1, 2, 0, 3)


def as_heads(x_NHK: Array, B: int, S: int, K: int) -> Array:
    """Return (N, heads K) as (B, S, heads, K)."""
    return x_NHK.reshape(B, S, x_NHK.shape[1] // K, K)


def as_rows(x_BSHK: Array) -> Array:
    """Return (B, S, heads, K) as (N, heads K)."""
    B, S, H, K = x_BSHK.shape
    return x_BSHK.reshape(B * S, H * K)
