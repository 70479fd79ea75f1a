"""The embedding of tokens on one process.

Dimension key: V vocabulary, D hidden; ... any number of axes of tokens.
"""
from typing import Any

import numpy as np

from ..arrays import Array
from .linear import Weights


def forward(ids: Array, w: Weights, multiplier: float = 1.0) -> tuple[Array, Any]:
    """y = multiplier * W[ids]

    Parameters
    ----------
    ids : (...) array of int
        Rows of W.
    w : dict
        "weight" (V, D).
    multiplier : float

    Returns
    -------
    y : (..., D) array or Magnitude
    saved : object
        What `backward` needs.
    """
    return w["weight"][ids] * multiplier, (ids, w["weight"].shape, multiplier)


def backward(dy: Array, saved: Any) -> dict[str, Array]:
    """Compute dW, whose row v is the sum of multiplier * dy over the tokens v. There is no gradient of ids.

    Parameters
    ----------
    dy : (..., D) array or Magnitude
    saved : object
        From `forward`.

    Returns
    -------
    gradients : dict
        "weight" (V, D).
    """
    ids, (V, D), multiplier = saved
    return {"weight": one_hot(ids, V, dy.dtype).reshape(-1, V).T @ (dy * multiplier).reshape(-1, D)}


def one_hot(ids: Array, size: int, dtype: Any) -> Array:
    """Return (..., size): 1 at each id, 0 elsewhere."""
    return (ids[..., None] == np.arange(size)).astype(dtype)
