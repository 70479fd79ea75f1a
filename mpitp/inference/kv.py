"""Keys and values of the tokens so far, so that generation computes those of new tokens only. Each rank has its heads'.

Dimension key: B sequences, C capacity (positions), S new positions, u key/value heads of one unit, K features of
a head.
"""
import numpy as np

from ..errors import require, require_positive
from ..ops.keys_values import append
from ..ops.rotary import rotary_tables


class LayerKeyValues:
    """Those of one ParallelAttention.

    lengths, starts : KeyValues', shared by all layers
    tables : rotary's cos and sin of all positions; () without rotary
    units : {unit: [keys, values]}, (B, C, u, K) each
    """

    def __init__(self, layer, lengths, starts, capacity):
        xp, B = layer.group.xp, len(lengths)
        self.lengths, self.starts, self.units = lengths, starts, {}
        for unit in layer.heads.held_units:
            self.units[unit] = [xp.zeros((B, capacity, unit.stop - unit.start, layer.kv_channels), layer.dtype)
                                for _ in ("key", "value")]
        self.tables = rotary_tables(layer.rotary, layer.kv_channels, range(capacity), layer.sum_dtype, xp) \
            if layer.rotary else ()

    def append(self, unit, k_BSuK, v_BSuK):
        """Put the new positions behind the old ones; returns all keys and values (B, C, u, K)."""
        append(self.units[unit], (k_BSuK, v_BSuK), self.starts)
        return self.units[unit]

    def nbytes(self):
        return sum(array.nbytes for arrays in self.units.values() for array in arrays)


class KeyValues:
    """Those of all layers of a Decoder, for `batch` sequences of up to `capacity` positions.

    lengths, starts : (B,) integers, how many positions of each sequence there are, on the host and where the arrays are

    2 x B x C x (key/value heads of the rank) x K numbers a layer and rank.
    """

    def __init__(self, model, batch, capacity):
        require_positive(batch=batch, capacity=capacity)
        self.capacity, self.lengths = capacity, np.zeros(batch, np.int64)
        # On a GPU a copy there, which operations read: so a recorded token can be replayed at any position.
        self.starts = self.lengths if model.group.xp is np else model.group.xp.asarray(self.lengths)
        self.layers = [LayerKeyValues(block.attention, self.lengths, self.starts, capacity) for block in model.blocks]

    def require_room(self, shape):
        """Raise InputError unless ids of `shape` (B, S) fit behind what there is."""
        require(len(shape) == 2 and shape[0] == len(self.lengths), f"ids of shape {shape}",
                f"({len(self.lengths)}, tokens), a row for each sequence of the keys and values")
        longest = int(self.lengths.max()) + shape[1]
        require(longest <= self.capacity, f"{longest} positions", f"at most {self.capacity}, the capacity")

    def advance(self, counts):
        """Count so many new positions of each sequence; what lies behind them will be overwritten."""
        self.set_lengths(self.lengths + counts)

    def set_lengths(self, lengths):
        self.lengths[...] = lengths
        if self.starts is not self.lengths:
            self.starts.set(self.lengths)
