"""The linear layer on one process, and dictionaries of weights.

Weights of a layer are a flat dict by the names of its parameters, gradients are a dict with the same names.

Dimension key: I features in, O features out; ... any number of axes of tokens.
"""
from collections.abc import Mapping
from typing import Any

from ..arrays import Array

Weights = Mapping[str, Array]


def part(w: Weights, name: str) -> dict[str, Array]:
    """Return the weights of one part, under their names inside it.

    Examples
    --------
    >>> part({"up.weight": 1, "up.bias": 2, "down.weight": 3}, "up")
    {'weight': 1, 'bias': 2}
    """
    return {key[len(name) + 1:]: array for key, array in w.items() if key.startswith(f"{name}.")}


def named(name: str, gradients: Weights) -> dict[str, Array]:
    """Return the gradients of one part under their names in the whole: the inverse of `part`.

    Examples
    --------
    >>> named("up", {"weight": 1, "bias": 2})
    {'up.weight': 1, 'up.bias': 2}
    """
    return {f"{name}.{key}": array for key, array in gradients.items()}


def forward(x: Array, w: Weights) -> tuple[Array, Any]:
    """y = x W^T + b

    Parameters
    ----------
    x : (..., I) array or Magnitude
    w : dict
        "weight" (O, I), and "bias" (O) where there is one.

    Returns
    -------
    y : (..., O) array or Magnitude
    saved : object
        What `backward` needs.
    """
    y = x @ w["weight"].T
    return (y + w["bias"] if "bias" in w else y), (x, w)


def backward(dy: Array, saved: Any) -> tuple[Array, dict[str, Array]]:
    """dx = dy W, dW = dy^T x, db = sum of dy over the tokens.

    Parameters
    ----------
    dy : (..., O) array or Magnitude
    saved : object
        From `forward`.

    Returns
    -------
    dx : (..., I) array or Magnitude
    gradients : dict
        By the names of the weights.
    """
    x, w = saved
    dy_NO, x_NI = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    gradients = {"weight": dy_NO.T @ x_NI}
    if "bias" in w:
        gradients["bias"] = dy_NO.sum(axis=0)
    return dy @ w["weight"], gradients
