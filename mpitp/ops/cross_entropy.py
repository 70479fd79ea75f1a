"""Cross entropy over some columns of the vocabulary: what they add to the sums of each row, and their gradient.

Large arrays are not made: rows go in pieces that stay in cache, and backward makes the exponentials again.

Dimension key: N rows (tokens), n rows of a piece, V these columns.
"""
import numpy as np

from .twin import cuda_twin

PIECE = 1 << 15     # numbers at a time


@cuda_twin(by="z_NV")
def row_maximum(z_NV):
    """The maximum of each row, minus infinity without columns. MPI's max may lose NaN: the sum of e^z shows it."""
    return z_NV.max(axis=1) if z_NV.shape[1] else np.full(len(z_NV), -np.inf, z_NV.dtype)


@cuda_twin(by="z_NV")
def row_sums(z_NV, max_N, targets_N, with_sum):
    """What these columns add to the sum of e^(z - max), to z - max of the target, and to the sum of z - max of a row.

    Parameters
    ----------
    z_NV : logits
    max_N : of each row, over the whole vocabulary: no exponential overflows, and their sum is at least 1
    targets_N : column of each row's target, integers; one outside 0..V-1 is another's
    with_sum : whether the third is asked for (label smoothing)

    Returns (2 or 3, N), a new array.
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
def row_gradient(z_NV, max_N, targets_N, factor_N, at_target_N, everywhere_N, out):
    """out = factor e^(z - max) - everywhere, - at_target in the column of the target.

    factor_N, at_target_N, everywhere_N : of each row; everywhere_N None for 0. A row of zeros does not count: its
        gradient is 0, which 0 times NaN would not be
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


def shifted(z_NV, max_N, piece):
    """z - max of some rows, a new array. inf - inf is NaN, and the loss will say so: no warning."""
    with np.errstate(invalid="ignore"):
        return z_NV[piece] - max_N[piece, None]


def targets_here(z_NV, targets_N):
    """The rows whose target is one of these columns."""
    return np.flatnonzero((targets_N >= 0) & (targets_N < z_NV.shape[1]))


def pieces(shape):
    """Slices of rows, about PIECE numbers each. They depend on the columns alone."""
    rows, columns = shape
    step = max(1, PIECE // max(1, columns))
    return [slice(start, start + step) for start in range(0, rows, step)]
