"""Keys and values of the tokens so far, so that generation computes those of new tokens only. Each rank has its heads'.

Dimension key: B sequences, C capacity (positions), S new positions, u key/value heads of one unit, K features of
a head.
"""
from typing import Any

import numpy as np

from ..arrays import Array
from ..errors import require, require_positive
from ..layers.attention import ParallelAttention
from ..layers.decoder import Decoder
from ..ops.keys_values import append
from ..ops.rotary import rotary_tables
from ..sharding.heads import KeyValueUnit


class LayerKeyValues:
    """LayerKeyValues holds keys and values of one ParallelAttention: of the heads that this rank's query heads use.

    Parameters
    ----------
    layer : ParallelAttention
        The layer.
    lengths, starts : array
        KeyValues', shared by all layers.
    capacity : int
        Positions that there is room for, C.
    tables : dict
        Those of the layers before this one, to which its own are added: many layers have the same.

    Attributes
    ----------
    tables : tuple of array
        Rotary's cos and sin of all positions; () without rotary.
    units : {KeyValueUnit: [keys, values]}
        (B, C, u, K) each.
    """

    def __init__(self, layer: ParallelAttention, lengths: np.ndarray, starts: Array, capacity: int, tables: dict):
        xp, B = layer.group.xp, len(lengths)
        self.lengths, self.starts = lengths, starts
        self.units: dict[KeyValueUnit, list[Array]] = {}
        for unit in layer.heads.held_units:
            self.units[unit] = [xp.zeros((B, capacity, unit.stop - unit.start, layer.kv_channels), layer.dtype)
                                for _ in ("key", "value")]
        if layer.rotary not in tables:
            tables[layer.rotary] = rotary_tables(layer.rotary, layer.kv_channels, range(capacity), layer.sum_dtype,
                                                 xp) if layer.rotary else ()
        self.tables = tables[layer.rotary]

    def append(self, unit: KeyValueUnit, k_BSuK: Array, v_BSuK: Array) -> list[Array]:
        """Put the new positions behind the old ones; returns all keys and values (B, C, u, K)."""
        append(self.units[unit], (k_BSuK, v_BSuK), self.starts)
        return self.units[unit]

    def nbytes(self) -> int:
        """Return the bytes of this rank's keys and values."""
        return sum(array.nbytes for arrays in self.units.values() for array in arrays)


class KeyValues:
    """KeyValues holds those of all layers of a Decoder: 2 x B x C x (key/value heads of the rank) x K numbers a layer.

    Parameters
    ----------
    model : Decoder
        The model.
    batch, capacity : int
        Sequences, B, and positions that there is room for in each, C.

    Attributes
    ----------
    lengths : (B,) array
        How many positions of each sequence there are, on the host.
    starts : (B,) array
        The same numbers where the keys and values are.

    Raises
    ------
    InputError
        For a batch or capacity that is not positive; for a model that is not causal; for a capacity beyond the
        positions that a model was trained on whose rotary frequencies depend on the length of the sequence.
    """

    def __init__(self, model: Decoder, batch: int, capacity: int):
        require_positive(batch=batch, capacity=capacity)
        require(model.config.causal, "a model whose attention goes in both directions", "a causal one: a token of the "
                "first has other keys and values once more of them follow")
        for rotary in filter(None, model.config.rotaries):
            longest = rotary.longest
            require(longest is None or capacity <= longest, f"keys and values of {capacity} positions",
                    f"at most {longest}: for longer sequences {rotary.scaling} rotary positions are others, those of "
                    f"the keys that are kept, too")
        self.capacity, self.lengths = capacity, np.zeros(batch, np.int64)
        # On a GPU a copy there, which operations read: so a recorded token can be replayed at any position.
        self.starts: Any = self.lengths if model.group.xp is np else model.group.xp.asarray(self.lengths)
        tables: dict = {}
        self.layers = [LayerKeyValues(block.attention, self.lengths, self.starts, capacity, tables)
                       for block in model.blocks]

    def require_room(self, shape: tuple[int, ...]) -> None:
        """Raise InputError unless ids of `shape` (B, S) fit behind the positions that there are."""
        require(len(shape) == 2 and shape[0] == len(self.lengths), f"ids of shape {shape}",
                f"({len(self.lengths)}, tokens), a row for each sequence of the keys and values")
        longest = int(self.lengths.max()) + shape[1]
        require(longest <= self.capacity, f"{longest} positions", f"at most {self.capacity}, the capacity")

    def advance(self, counts: Any) -> None:
        """Count so many new positions of each sequence; later ones will be overwritten."""
        self.set_lengths(self.lengths + counts)

    def set_lengths(self, lengths: np.ndarray) -> None:
        """Say how many positions of each sequence there are."""
        self.lengths[...] = lengths
        if self.starts is not self.lengths:
            self.starts.set(self.lengths)
