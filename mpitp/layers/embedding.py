"""From token ids to features: the table split by vocabulary, and the table of positions.

Dimension key: N tokens, S positions, V vocabulary, M positions in the table, D features; p marks an axis split over
the ranks.
"""
from collections import Counter
from math import isfinite, prod

import numpy as np

from ..arrays import module_of, scaled
from ..comm.ledger import Collective
from ..errors import InputError, is_integer, require, require_positive
from ..ops.embedding import embedding_backward, embedding_forward
from ..sharding.parameters import ParameterSpec
from .base import ParallelLayer, join, require_saved


class VocabParallelEmbedding(ParallelLayer):
    """y = multiplier * W[ids], W [V, D] split by rows: each rank looks up the ids of its rows, zeros elsewhere; a sum.

    Parameters
    ----------
    group : TensorParallelGroup
    vocab_size, hidden_size : V, D; any, on any number of ranks
    multiplier : of what is looked up
    dtype : "float32" or "float64"
    seed : of the initial weights N(0, init_std^2), the same for any number of ranks; None for zeros
    name : prefix of the parameter's name, "weight"

    Notes
    -----
    As in Megatron-LM (arXiv 1909.08053, section 3), for any V. Collectives, N = tokens: forward one all-reduce of
    N x D, backward none, as dy is complete. The sum is exact in any order: all but one rank add zeros.
    Raises InputError for sizes that are not positive, ids that are no integers, and an id outside the vocabulary,
    naming its position; on every rank, before any collective.
    """

    def __init__(self, group, vocab_size, hidden_size, multiplier=1.0, *, dtype="float32", seed=0, init_std=0.02,
                 name=""):
        require_positive(vocab_size=vocab_size, hidden_size=hidden_size)
        is_number = isinstance(multiplier, (int, float)) and not isinstance(multiplier, bool) and isfinite(multiplier)
        require(is_number, f"multiplier {multiplier!r}", "a number")
        self.vocab_size, self.hidden_size, self.multiplier = int(vocab_size), int(hidden_size), float(multiplier)
        specs = [ParameterSpec(join(name, "weight"), (self.vocab_size, self.hidden_size), 0, init_std)]
        super().__init__(group, specs, dtype, seed, name)
        self.partition = group.partition(self.vocab_size)

    def forward(self, ids, *, saved=True):
        """ids (...), integers, the same on every rank -> y (..., D), complete; and what backward needs, or None."""
        ids = self.checked(ids)
        return self.look_up(ids), (self.local(ids) if saved else None)

    def checked(self, ids):
        """ids where the weights are, after token_ids has looked at them."""
        return self.group.xp.asarray(token_ids(ids, self.vocab_size))

    def local(self, ids):
        """The rows of this rank's part that ids (N,) mean, where they are there."""
        return ids.reshape(-1) - self.partition.bounds[self.group.rank]

    def look_up(self, ids):
        """forward() of checked ids."""
        y_ND = embedding_forward(self.parameter("weight"), self.local(ids))
        if self.multiplier != 1:
            scaled(y_ND, self.multiplier, out=y_ND)
        self.group.all_reduce(y_ND, out=y_ND)
        y_ND += 0.0                             # -0.0 becomes 0.0 on one rank too, as it does in a sum with zeros
        return y_ND.reshape(*ids.shape, self.hidden_size)

    def backward(self, dy, saved, *, out=None):
        """dy (..., D), complete -> None, as ids have no gradient, and {name: gradient} of this rank's rows.

        out : an earlier backward's gradients, whose arrays are used again
        """
        require_saved(saved)
        dy_ND, gradients = self.rows(dy, self.hidden_size, "dy", len(saved)), self.gradients(out)
        if self.multiplier != 1:
            dy_ND = scaled(dy_ND, self.multiplier)
        dw_VpD = gradients[join(self.name, "weight")]
        embedding_backward(dy_ND, saved, len(dw_VpD), out=dw_VpD)
        return None, gradients

    def collectives(self, tokens):
        """The closed form: (forward, backward), each a Counter of logical data collectives."""
        return Counter({Collective("all_reduce", tokens * self.hidden_size, self.dtype.name): 1}), Counter()


class PositionEmbedding(ParallelLayer):
    """y = W[0..S-1], W [M, D] replicated: learned positions.

    Parameters
    ----------
    max_positions, hidden_size : M, D
    group, dtype, seed, init_std, name : as VocabParallelEmbedding's

    Notes
    -----
    No collectives. Raises InputError for more positions than the table has.
    """

    def __init__(self, group, max_positions, hidden_size, *, dtype="float32", seed=0, init_std=0.02, name=""):
        require_positive(max_positions=max_positions, hidden_size=hidden_size)
        self.max_positions, self.hidden_size = int(max_positions), int(hidden_size)
        specs = [ParameterSpec(join(name, "weight"), (self.max_positions, self.hidden_size), None, init_std)]
        super().__init__(group, specs, dtype, seed, name)

    def forward(self, positions, *, saved=True):
        """positions : how many, S -> y (S, D), a new array, and what backward needs (None if not saved)."""
        good = is_integer(positions) and 0 <= positions <= self.max_positions
        require(good, f"{positions!r} positions", f"0 to {self.max_positions}, the size of the table")
        return self.parameter("weight")[:positions].copy(), (int(positions) if saved else None)

    def backward(self, dy, saved, *, out=None):
        """dy (..., S, D) -> None and {name: gradient}, summed over the batch, the leading axes.

        out : an earlier backward's gradients, whose arrays are used again
        """
        require_saved(saved)
        S, D = saved, self.hidden_size
        require(dy.ndim >= 2 and dy.shape[-2] == S, f"dy: shape {dy.shape}", f"(..., {S}, {D})")
        dy_ND, gradients = self.rows(dy, D, "dy"), self.gradients(out)
        dw_MD = gradients[join(self.name, "weight")]
        dw_MD[S:] = 0
        dy_ND.reshape(prod(dy.shape[:-2]), S, D).sum(axis=0, dtype=self.sum_dtype, out=dw_MD[:S])
        return None, gradients

    def collectives(self, tokens=0):
        """The closed form: (forward, backward), both empty."""
        return Counter(), Counter()


def token_ids(ids, vocab_size, what="ids", ignore_index=None):
    """ids as an int64 array where they are, after looking at each: nothing is communicated, as every rank has the same.

    Ids on the host are looked at there: a look at a device's is a copy back, which waits for all that it has to do.

    Raises InputError unless they are integers from 0 to vocab_size - 1, or ignore_index; it names the first other one.
    """
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
