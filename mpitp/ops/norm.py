"""Layer norm and RMS norm over the last axis, forward and backward side by side.

A norm is cheap arithmetic on much data, as an activation is: it runs over pieces of rows that stay in cache, in
place on what it made itself. The bits of a row depend on nothing but the row, since sums over features are one dot
product a row. A matrix-vector product has other bits for the last few rows, and einsum for one row alone (measured).

Dimension key: N rows, n rows of a piece, K features.
"""
from typing import Any

import numpy as np

from ..arrays import Array
from ..errors import InputError
from .twin import cuda_twin

KINDS = ("layernorm", "rmsnorm")
FEW = 1 << 12       # numbers up to which all rows are one piece: those of a token
PIECE = 1 << 16     # numbers at a time; measured: 2^15 to 2^18 take the same time, 2^14 half as long again


@cuda_twin(by="x")
def norm_forward(x: Array, w: Array, b: Array | None, kind: str, epsilon: float,
                 zero_centered: bool = False) -> tuple[Array, tuple]:
    """Compute y = xhat * g + b over the last axis of x.

    layernorm (Ba et al., arXiv 1607.06450): xhat = (x - mean(x)) rstd, rstd = (mean((x - mean(x))^2) + epsilon)^-1/2
    rmsnorm (Zhang and Sennrich, arXiv 1910.07467): xhat = x rstd, rstd = (mean(x^2) + epsilon)^-1/2

    Parameters
    ----------
    x : (..., K) array
    w : (K,) array
        g is w, or 1 + w if `zero_centered`.
    b : (K,) array or None
        None for no bias.
    kind : {"layernorm", "rmsnorm"}
    epsilon : float
    zero_centered : bool

    Returns
    -------
    y : (..., K) array
        A new array.
    saved : tuple
        What norm_backward takes: xhat, rstd, g, the kind, and whether there is a bias. x itself may change.

    Raises
    ------
    InputError
        For an unknown kind.
    """
    if kind not in KINDS:                       # the messages of require() would cost more than a token's norm
        raise InputError(f"found norm kind {kind!r}, expected one of {', '.join(KINDS)}")
    K = x.shape[-1]
    x_NK, g_K = x.reshape(-1, K), (1 + w if zero_centered else w)
    if len(x_NK) == 1 and kind == "rmsnorm" and b is None:
        return norm_of_row(x_NK, g_K, epsilon, x.shape)
    xhat_NK, y_NK = np.empty(x_NK.shape, x.dtype), np.empty(x_NK.shape, x.dtype)
    rstd_N1 = np.empty((len(x_NK), 1), x.dtype)
    if x.size <= FEW:                           # a token of generation: to cut pieces would cost as much as the norm
        normalise(x_NK, g_K, b, kind, epsilon, xhat_NK, rstd_N1, y_NK)
    else:
        steps = pieces(x_NK.shape)
        g_nK, b_nK = for_a_piece(g_K, steps), None if b is None else for_a_piece(b, steps)
        for piece in steps:
            x_nK = x_NK[piece]
            normalise(x_nK, g_nK[:len(x_nK)], None if b_nK is None else b_nK[:len(x_nK)], kind, epsilon,
                      xhat_NK[piece], rstd_N1[piece], y_NK[piece])
    return y_NK.reshape(x.shape), (xhat_NK, rstd_N1, g_K, kind, b is not None)


def norm_of_row(x_1K: Array, g_K: Array, epsilon: float, shape: tuple[int, ...]) -> tuple[Array, tuple]:
    """Do the rmsnorm of one row, as a token has it, with the same bits in half the time: one number is no array."""
    x_K = np.ascontiguousarray(x_1K[0])
    rstd = 1 / np.sqrt(x_K.dot(x_K) / len(x_K) + epsilon)
    xhat_1K = x_1K * rstd
    return (xhat_1K * g_K).reshape(shape), (xhat_1K, rstd.reshape(1, 1), g_K, "rmsnorm", False)


def normalise(x_nK: Array, g: Array, b: Array | None, kind: str, epsilon: float, xhat_nK: Array, rstd_n1: Array,
              y_nK: Array) -> None:
    """Write xhat, rstd and y of some rows; g and b are (n, K) or (K,)."""
    K = x_nK.shape[-1]
    x_nK = np.ascontiguousarray(x_nK)
    if kind == "layernorm":
        mean_n1 = row_dot(x_nK, np.ones(K, x_nK.dtype))
        mean_n1 /= K
        x_nK = np.subtract(x_nK, mean_n1, out=xhat_nK)
    np.divide(row_dot(x_nK, x_nK), K, out=rstd_n1)
    rstd_n1 += epsilon
    np.sqrt(rstd_n1, out=rstd_n1)
    np.divide(1, rstd_n1, out=rstd_n1)
    np.multiply(x_nK, rstd_n1, out=xhat_nK)
    np.multiply(xhat_nK, g, out=y_nK)
    if b is not None:
        y_nK += b


def overflows(rstd: Array) -> bool:
    """Return whether 1 / rms of any row is 0; False on a GPU, where there is a NaN instead."""
    return type(rstd) is np.ndarray and not (rstd[0, 0] if len(rstd) == 1 else rstd.all())


def overflow_text(name: str, rstd: Array, dtype: Any) -> str:
    """Return the message about a norm of this name that overflows, by 1 / rms of each row."""
    return f"{name}: found a mean square beyond {dtype} in {int((rstd == 0).sum())} of {len(rstd)} rows, expected " \
           f"finite numbers: weights that are damaged or diverge"


def norm_of_heads(name: str, x_BSHK: Array, w_K: Array, kind: str, epsilon: float,
                  zero_centered: bool) -> tuple[Array, tuple]:
    """Compute the norm over the features of each head of this rank's; returns y and what norm_backward takes.

    Raises InputError where it overflows; not NormOverflow, as other ranks have other heads and may know nothing of it.
    """
    y_BSHK, kept = norm_forward(x_BSHK, w_K, None, kind, epsilon, zero_centered)
    if overflows(kept[1]):
        raise InputError(overflow_text(name, kept[1], x_BSHK.dtype))
    return y_BSHK, kept


@cuda_twin(by="dy")
def norm_backward(dy: Array, saved: tuple, dw_out: Array | None = None,
                  db_out: Array | None = None) -> tuple[Array, Array, Array | None]:
    """Compute dx = rstd (dyg - mean(dyg) - xhat mean(dyg xhat)) with dyg = dy * g, dw and db.

    dw is the sum of dy * xhat over the rows, db that of dy; the means are over the features of a row. An rmsnorm has
    no mean(dyg).

    Parameters
    ----------
    dy : (..., K) array
        Of y's shape.
    saved : tuple
        What norm_forward returned.
    dw_out, db_out : (K,) arrays or None
        Where dw and db go; None for new arrays.

    Returns
    -------
    dx : (..., K) array
    dw : (K,) array
    db : (K,) array or None
        None where there is no bias.
    """
    xhat_NK, rstd_N1, g_K, kind, has_bias = saved
    K = dy.shape[-1]
    dy_NK = dy.reshape(-1, K)
    dx_NK = np.empty(dy_NK.shape, dy.dtype)
    dw_K = np.empty(K, dy.dtype) if dw_out is None else dw_out
    dw_K[...] = 0
    db_K = None
    if has_bias:
        db_K = np.empty(K, dy.dtype) if db_out is None else db_out
        db_K[...] = 0
    steps = pieces(dy_NK.shape)
    g_nK = for_a_piece(g_K, steps)
    for piece in steps:
        dy_nK, xhat_nK, dx_nK = np.ascontiguousarray(dy_NK[piece]), xhat_NK[piece], dx_NK[piece]
        if has_bias:
            db_K += dy_nK.sum(axis=0)
        product_nK = dy_nK * xhat_nK
        dw_K += product_nK.sum(axis=0)
        mean_n1 = row_dot(product_nK, g_K)                  # of dyg * xhat
        mean_n1 /= K
        np.multiply(dy_nK, g_nK[:len(dy_nK)], out=dx_nK)
        if kind == "layernorm":
            dyg_mean_n1 = row_dot(dy_nK, g_K)
            dyg_mean_n1 /= K
            dx_nK -= dyg_mean_n1
        dx_nK -= np.multiply(xhat_nK, mean_n1, out=product_nK)
        dx_nK *= rstd_N1[piece]
    return dx_NK.reshape(dy.shape), dw_K, db_K


def pieces(shape: tuple[int, int]) -> list[slice]:
    """Cut rows into slices of about PIECE numbers each, of which the first is the longest."""
    rows, K = shape
    step = max(1, PIECE // max(1, K))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def for_a_piece(w_K: Array, steps: list[slice]) -> Array:
    """Repeat w_K for each row of the longest piece.

    NumPy multiplies two arrays of one shape twice as fast as each row of an array by one row.
    """
    rows = steps[0].stop if steps else 0
    return np.ascontiguousarray(np.broadcast_to(w_K, (rows, *w_K.shape)))


def row_dot(a_nK: Array, b: Array) -> Array:
    """Compute the dot product of each row of a with b (K,), or with its own row of b (n, K): a column (n, 1).

    It is a stack of products of one row and one column, for which NumPy calls the dot product of BLAS.
    """
    return np.matmul(a_nK[:, None, :], b[..., None])[:, 0]
