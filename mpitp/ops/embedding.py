"""Lookup in a table of rows, and its gradient.

Dimension key: N tokens, R rows of the table, H features.
"""
import numpy as np

from ..arrays import Array
from .twin import cuda_twin


@cuda_twin(by="w_RH")
def embedding_forward(w_RH: Array, ids_N: Array) -> Array:
    """Compute y[n] = W[ids[n]].

    Parameters
    ----------
    w_RH : (R, H) array
        The table, or a rank's rows of it.
    ids_N : (N,) array of integers
        An id outside 0..R-1 belongs to another rank.

    Returns
    -------
    y : (N, H) array
        A new array, 0 where the id belongs to another rank.
    """
    y_NH = np.zeros((len(ids_N), w_RH.shape[1]), w_RH.dtype)
    mine_n = np.flatnonzero((ids_N >= 0) & (ids_N < len(w_RH)))
    y_NH[mine_n] = w_RH[ids_N[mine_n]]
    return y_NH


@cuda_twin(by="d_NH")
def embedding_backward(d_NH: Array, ids_N: Array, rows: int, out: Array | None = None) -> Array:
    """Compute dW[r], the sum of d[n] over the tokens n with ids[n] = r, added in the order of n.

    Parameters
    ----------
    d_NH : (N, H) array
        The gradient of what was looked up.
    ids_N : (N,) array of integers
        Ids outside 0..rows-1 belong to other ranks and are passed over.
    rows : int
        Of the table.
    out : (rows, H) array or None
        Where the result goes; None for a new array.

    Returns
    -------
    dw : (rows, H) array

    Notes
    -----
    To add token by token is as fast as any other way in NumPy; measured for 4,096 tokens of 1,024 float32: 5 to 9 ms
    against 35 to 40 sorted and added by `np.add.reduceat`, 33 to 46 by `np.add.at`, 4 to 9 by `add.reduce` for each id.
    """
    dw_RH = np.empty((rows, d_NH.shape[-1]), d_NH.dtype) if out is None else out
    dw_RH[...] = 0
    for n, row in enumerate(ids_N.tolist()):
        if 0 <= row < rows:
            dw_RH[row] += d_NH[n]
    return dw_RH
