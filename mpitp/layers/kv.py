"""Keys and values of the tokens so far, so that generation computes those of new tokens only. Each rank has its heads'.

Dimension key: B sequences, C capacity (positions), S new positions, u key/value heads of one unit, K features of
a head.
"""
import numpy as np

from ..errors import require, require_positive
from ..ops.rotary import rotary_tables


class LayerKeyValues:
    """Those of one ParallelAttention.

    lengths : (B,) integers, how many positions of each sequence there are; shared by all layers, who advances it is
        KeyValues
    """

    def __init__(self, layer, lengths, capacity):
        xp, B = layer.group.xp, len(lengths)
        self.lengths, self.capacity, self.units = lengths, capacity, {}
        for unit in layer.heads.held_units:
            self.units[unit] = [xp.zeros((B, capacity, unit.stop - unit.start, layer.kv_channels), layer.dtype)
                                for _ in ("key", "value")]
        self.tables = rotary_tables(layer.rotary, layer.kv_channels, range(capacity), layer.sum_dtype, xp) \
            if layer.rotary else ()

    def tables_of_new(self, S):
        """cos and sin of S new positions of each sequence (B S, d / 2)."""
        if len(self.lengths) == 1:                              # views: a token's copies cost more than they copy
            start = int(self.lengths[0])
            return tuple(table[start:start + S] for table in self.tables)
        positions = (self.lengths[:, None] + np.arange(S)).reshape(-1)
        return tuple(table[positions] for table in self.tables)

    def append(self, unit, k_BSuK, v_BSuK):
        """Put the new positions behind the old ones; returns all keys and values (B, C, u, K)."""
        for held_BCuK, new_BSuK in zip(self.units[unit], (k_BSuK, v_BSuK)):
            for b, start in enumerate(self.lengths):
                held_BCuK[b, start:start + new_BSuK.shape[1]] = new_BSuK[b]
        return self.units[unit]

    def nbytes(self):
        return sum(array.nbytes for arrays in self.units.values() for array in arrays)


class KeyValues:
    """Those of all layers of a Decoder, for `batch` sequences of up to `capacity` positions.

    2 x B x C x (key/value heads of the rank) x K numbers a layer and rank.
    """

    def __init__(self, model, batch, capacity):
        require_positive(batch=batch, capacity=capacity)
        self.capacity, self.lengths = capacity, np.zeros(batch, np.int64)
        self.layers = [LayerKeyValues(block.attention, self.lengths, capacity) for block in model.blocks]

    def require_room(self, shape):
        """Raise InputError unless ids of `shape` (B, S) fit behind what there is."""
        require(len(shape) == 2 and shape[0] == len(self.lengths), f"ids of shape {shape}",
                f"({len(self.lengths)}, tokens), a row for each sequence of the keys and values")
        longest = int(self.lengths.max()) + shape[1]
        require(longest <= self.capacity, f"{longest} positions", f"at most {self.capacity}, the capacity")

    def advance(self, counts):
        """Count so many new positions of each sequence; what lies behind them will be overwritten."""
        self.lengths += counts
