"""From token ids to features: the table split by vocabulary, and the table of positions.

Dimension key: N tokens, S positions, V vocabulary, M positions in the table, D features; p marks an axis split over
the ranks.
"""
from collections import Counter
from math import isfinite, prod
from typing import Any

import numpy as np

from ..arrays import Array, module_of, scaled
from ..comm.group import TensorParallelGroup
from ..comm.ledger import Collective
from ..errors import InputError, is_integer, require, require_positive
from ..ops.embedding import embedding_backward, embedding_forward
from ..sharding.parameters import ParameterSpec
from ..sharding.specs import join
from .base import ParallelLayer, require_saved


class VocabParallelEmbedding(ParallelLayer):
    """y = multiplier * W[ids], W [V, D] split by rows: each rank looks up the ids of its rows, zeros elsewhere; a sum.

    Parameters
    ----------
    group : TensorParallelGroup
        The ranks.
    vocab_size, hidden_size : int
        V, D; any, on any number of ranks.
    multiplier : float
        Of the rows of W.
    dtype : str
        "float32" or "float64"; on a GPU "float16" and "bfloat16" too.
    seed : int or None
        Of the initial weights N(0, init_std^2), the same for any number of ranks; None for zeros.
    init_std : float
        Of the initial weights.
    name : str
        Prefix of the parameter's name, "weight".

    Raises
    ------
    InputError
        For sizes that are not positive; forward: ids that are no integers, and an id outside the vocabulary, naming its
        position; on every rank, before any collective.

    Notes
    -----
    As in Megatron-LM (arXiv 1909.08053, section 3), for any V. Collectives, N = tokens: forward one all-reduce of
    N x D, backward none, as dy is complete. The sum is exact in any order: all but one rank add zeros.
    """

    def __init__(self, group: TensorParallelGroup, vocab_size: int, hidden_size: int, multiplier: float = 1.0, *,
                 dtype: str = "float32", seed: int | None = 0, init_std: float = 0.02, name: str = ""):
        require_positive(vocab_size=vocab_size, hidden_size=hidden_size)
        is_number = isinstance(multiplier, (int, float)) and not isinstance(multiplier, bool) and isfinite(multiplier)
        require(is_number, f"multiplier {multiplier!r}", "a number")
        self.vocab_size, self.hidden_size, self.multiplier = int(vocab_size), int(hidden_size), float(multiplier)
        specs = [ParameterSpec(join(name, "weight"), (self.vocab_size, self.hidden_size), 0, init_std)]
        super().__init__(group, specs, dtype, seed, name)
        self.partition = group.partition(self.vocab_size)

    def forward(self, ids: Any, *, rows: Any = None, save: bool = True) -> tuple[Array, Any]:
        """Return y (..., D), complete, of ids (...), the same on every rank; and what backward needs, or None.

        rows: y (n, D) is this rank's rows; backward takes a dy of all of them still. See Rows.
        """
        ids = self.checked(ids)
        return self.look_up(ids, rows), ((self, self.local(ids)) if save else None)

    def checked(self, ids: Any) -> Array:
        """Return ids where the weights are. Raises InputError as token_ids."""
        return self.group.xp.asarray(token_ids(ids, self.vocab_size))

    def local(self, ids: Array) -> Array:
        """Return the rows (N,) of this rank's part that ids mean, outside of it where another rank has them."""
        return ids.reshape(-1) - self.partition.bounds[self.group.rank]

    def look_up(self, ids: Array, rows: Any = None) -> Array:
        """Return y of ids that were checked. Collective: one all-reduce of N x D, with rows one reduce-scatter."""
        y_ND = embedding_forward(self.own["weight"], self.local(ids))
        if self.multiplier != 1:
            scaled(y_ND, self.multiplier, out=y_ND)
        y_ND = self.group.all_reduce(y_ND, out=y_ND) if rows is None else rows.scatter_array(y_ND, self.dtype)
        y_ND += 0.0                             # -0.0 becomes 0.0 on one rank too, as it does in a sum with zeros
        return y_ND.reshape(*ids.shape, self.hidden_size) if rows is None else y_ND

    def backward(self, dy: Array, saved: Any, *, out: dict[str, Array] | None = None) -> tuple[None, dict[str, Array]]:
        """Return None, as ids have no gradient, and {name: gradient} of this rank's rows, of dy (..., D), complete.

        out : an earlier backward's gradients, whose arrays are used again
        """
        (ids_N,) = require_saved(saved, self)
        dy_ND, gradients = self.rows(dy, self.hidden_size, "dy", len(ids_N)), self.gradients(out)
        if self.multiplier != 1:
            dy_ND = scaled(dy_ND, self.multiplier)
        dw_VpD = gradients[join(self.name, "weight")]
        embedding_backward(dy_ND, ids_N, len(dw_VpD), out=dw_VpD)
        return None, gradients

    def collectives(self, tokens: int) -> tuple[Counter, Counter]:
        """Return how many collectives forward and backward do, by the formula: two Counters of Collective."""
        return Counter({Collective("all_reduce", tokens * self.hidden_size, self.dtype.name): 1}), Counter()


class PositionEmbedding(ParallelLayer):
    """y = W[offset..offset+S-1], W [offset+M, D] replicated: learned positions.

    Parameters
    ----------
    group : TensorParallelGroup
        The ranks.
    max_positions, hidden_size : int
        M, D.
    offset : int
        Rows of W before that of position 0, which nothing uses.
    dtype : str
        "float32" or "float64"; on a GPU "float16" and "bfloat16" too.
    seed : int or None
        Of the initial weights N(0, init_std^2); None for zeros.
    init_std : float
        Of the initial weights.
    name : str
        Prefix of the parameter's name, "weight".

    Raises
    ------
    InputError
        For sizes that are not positive; forward: for more positions than the table has.

    Notes
    -----
    No collectives.
    """

    def __init__(self, group: TensorParallelGroup, max_positions: int, hidden_size: int, offset: int = 0, *,
                 dtype: str = "float32", seed: int | None = 0, init_std: float = 0.02, name: str = ""):
        require_positive(max_positions=max_positions, hidden_size=hidden_size)
        self.max_positions, self.hidden_size, self.offset = int(max_positions), int(hidden_size), offset
        specs = [ParameterSpec(join(name, "weight"), (offset + self.max_positions, self.hidden_size), None, init_std)]
        super().__init__(group, specs, dtype, seed, name)

    def forward(self, positions: int, *, save: bool = True) -> tuple[Array, Any]:
        """Return y (S, D), a new array, of so many positions, S; and what backward needs (None if not save)."""
        good = is_integer(positions) and 0 <= positions <= self.max_positions
        require(good, f"{positions!r} positions", f"0 to {self.max_positions}, the size of the table")
        rows = slice(self.offset, self.offset + positions)
        return self.own["weight"][rows].copy(), ((self, int(positions)) if save else None)

    def backward(self, dy: Array, saved: Any, *, out: dict[str, Array] | None = None) -> tuple[None, dict[str, Array]]:
        """Return None and {name: gradient} of dy (..., S, D), summed over the batch, the leading axes.

        out : an earlier backward's gradients, whose arrays are used again
        """
        (S,), D = require_saved(saved, self), self.hidden_size
        require(dy.ndim >= 2 and dy.shape[-2] == S, f"dy: shape {dy.shape}", f"(..., {S}, {D})")
        dy_ND, gradients = self.rows(dy, D, "dy"), self.gradients(out)
        dw_MD = gradients[join(self.name, "weight")]
        first, stop = self.offset, self.offset + S
        dw_MD[:first], dw_MD[stop:] = 0, 0
        dy_ND.reshape(prod(dy.shape[:-2]), S, D).sum(axis=0, dtype=self.sum_dtype, out=dw_MD[first:stop])
        return None, gradients

    def collectives(self, tokens: int = 0) -> tuple[Counter, Counter]:
        """Return how many collectives forward and backward do: two empty Counters."""
        return Counter(), Counter()


def token_ids(ids: Any, vocab_size: int, what: str = "ids", ignore_index: int | None = None) -> Array:
    """Return ids as an int64 array where they are, after checking each. No collective: every rank has the same ids.

    Ids on the host are checked there. On a device a check is a copy back, which waits for all pending kernels.

    Parameters
    ----------
    ids : array
        Of any shape.
    vocab_size : int
        Ids go from 0 to vocab_size - 1.
    what : str
        Their name, for the message.
    ignore_index : int, optional
        An id that is legal beside these.

    Raises
    ------
    InputError
        For ids that are no integers, and naming the first that is outside the vocabulary.
    """
    require(not hasattr(ids, "mask"), f"{what}: a masked array", "one without a mask")
    xp = module_of(ids) or np
    ids = xp.asarray(ids)
    if ids.dtype.kind not in "iu":
        raise InputError(f"{what}: found dtype {ids.dtype}, expected integers")
    wrong = (ids < 0) | (ids >= vocab_size)
    if ignore_index is not None:
        wrong &= ids != ignore_index
    if wrong.any():
        position = tuple(int(i[0]) for i in xp.nonzero(wrong)) if ids.ndim else ()
        expected = f"0 to {vocab_size - 1}" + ("" if ignore_index is None else f", or {ignore_index} to leave it out")
        raise InputError(f"{what}[{', '.join(map(str, position))}]: found token id {int(ids[position])}, "
                         f"expected {expected}")
    return ids.astype(np.int64)
