"""Cross entropy over some columns of the vocabulary: what they add to the sums of each row, and their gradient.

No array as large as the logits is made but their gradient: rows are computed in pieces that stay in cache, and backward
computes the exponentials again.

Dimension key: N rows (tokens), n rows of a piece, V these columns.
"""
import numpy as np

from ..arrays import Array
from .twin import cuda_twin

PIECE = 1 << 15     # numbers at a time


@cuda_twin(by="z_NV")
def row_maximum(z_NV: Array) -> Array:
    """Compute the maximum of each row (N,), minus infinity where there are no columns.

    A NaN that MPI's maximum over the ranks loses is seen in the sum of e^z.
    """
    return z_NV.max(axis=1) if z_NV.shape[1] else np.full(len(z_NV), -np.inf, z_NV.dtype)


@cuda_twin(by="z_NV")
def row_sums(z_NV: Array, max_N: Array, targets_N: Array, with_sum: bool) -> Array:
    """Compute what these columns add to the sums of each row that its loss is made of.

    Parameters
    ----------
    z_NV : (N, V) array
        The logits.
    max_N : (N,) array
        The maximum of each row over the whole vocabulary, so that no exponential overflows and their sum is at least 1.
    targets_N : (N,) array of integers
        The column of each row's target; one outside 0..V-1 belongs to another rank.
    with_sum : bool
        Whether the third sum is needed (label smoothing).

    Returns
    -------
    sums : (2 or 3, N) array
        The sums over the columns of e^(z - max), of z - max in the target's column alone, and of z - max.
    """
    sums = np.zeros((3 if with_sum else 2, len(z_NV)), z_NV.dtype)
    for piece in pieces(z_NV.shape):
        shifted_nV = shifted(z_NV, max_N, piece)
        if with_sum:
            shifted_nV.sum(axis=1, out=sums[2, piece])
        np.exp(shifted_nV, out=shifted_nV)
        shifted_nV.sum(axis=1, out=sums[0, piece])
    rows = targets_here(z_NV, targets_N)
    with np.errstate(invalid="ignore"):
        sums[1, rows] = z_NV[rows, targets_N[rows]] - max_N[rows]
    return sums


@cuda_twin(by="z_NV")
def row_gradient(z_NV: Array, max_N: Array, targets_N: Array, factor_N: Array, at_target_N: Array,
                 everywhere_N: Array | None, out: Array) -> Array:
    """Compute out = factor e^(z - max) - everywhere, and subtract at_target in the column of the target.

    Parameters
    ----------
    z_NV, max_N, targets_N : arrays
        As in row_sums.
    factor_N, at_target_N : (N,) arrays
        Of each row. Where these and everywhere are 0, a row does not count: its gradient is 0, also if it holds NaN.
    everywhere_N : (N,) array or None
        None for 0.
    out : (N, V) array
        Where the result goes.

    Returns
    -------
    out : (N, V) array
    """
    for piece in pieces(z_NV.shape):
        shifted_nV = shifted(z_NV, max_N, piece)
        np.exp(shifted_nV, out=shifted_nV)
        np.multiply(shifted_nV, factor_N[piece, None], out=out[piece])
        if everywhere_N is not None:
            out[piece] -= everywhere_N[piece, None]
    rows = targets_here(z_NV, targets_N)
    out[rows, targets_N[rows]] -= at_target_N[rows]
    out[(factor_N == 0) & (at_target_N == 0) & (True if everywhere_N is None else everywhere_N == 0)] = 0
    return out


def shifted(z_NV: Array, max_N: Array, piece: slice) -> Array:
    """Compute z - max of some rows. inf - inf is NaN without a warning, since the loss shows it."""
    with np.errstate(invalid="ignore"):
        return z_NV[piece] - max_N[piece, None]


def targets_here(z_NV: Array, targets_N: Array) -> Array:
    """Find the rows whose target is one of these columns."""
    return np.flatnonzero((targets_N >= 0) & (targets_N < z_NV.shape[1]))


def pieces(shape: tuple[int, int]) -> list[slice]:
    """Cut rows into slices of about PIECE numbers each, whose length depends on the columns alone."""
    rows, columns = shape
    step = max(1, PIECE // max(1, columns))
    return [slice(start, start + step) for start in range(0, rows, step)]
