"""Layer norm and RMS norm on one process.

Dimension key: K features; ... any number of axes of tokens.

Sources: J. L. Ba et al., arXiv 1607.06450 (layer norm); B. Zhang and R. Sennrich, arXiv 1910.07467 (RMS norm).
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import Array
from .linear import Weights

if TYPE_CHECKING:
    from ..config import DecoderConfig


def forward(x: Array, w: Weights, kind: str = "layernorm", epsilon: float = 1e-5,
            zero_centered: bool = False) -> tuple[Array, Any]:
    """y = (x - mean) / sqrt(var + epsilon) * w + b; an RMS norm takes no mean off.

    Parameters
    ----------
    x : (..., K) array or Magnitude
    w : dict
        "weight" (K), or of each head (H, 1, K) for x (B, H, S, K); and "bias" (K) where there is one.
    kind : str
        "layernorm" or "rmsnorm".
    epsilon : float
        What is added to the variance, or to the mean square.
    zero_centered : bool
        Whether to multiply by 1 + w instead of w.

    Returns
    -------
    y : (..., K) array or Magnitude
    saved : object
        What `backward` needs.
    """
    K = x.shape[-1]
    centred = x - x.sum(axis=-1, keepdims=True) / K if kind == "layernorm" else x
    rstd = 1 / np.sqrt((centred * centred).sum(axis=-1, keepdims=True) / K + epsilon)
    xhat = centred * rstd
    scale = w["weight"] + 1 if zero_centered else w["weight"]
    y = xhat * scale
    return (y + w["bias"] if "bias" in w else y), (xhat, rstd, scale, w, kind)


def backward(dy: Array, saved: Any) -> tuple[Array, dict[str, Array]]:
    """dx = (g - mean g - xhat mean(g xhat)) / sqrt(var + epsilon) with g = dy w; an RMS norm takes no mean g off.

    Parameters
    ----------
    dy : (..., K) array or Magnitude
    saved : object
        From `forward`.

    Returns
    -------
    dx : (..., K) array or Magnitude
    gradients : dict
        By the names of the weights.
    """
    xhat, rstd, scale, w, kind = saved
    K = dy.shape[-1]
    of_weight = dy * xhat
    gradients = {"weight": of_weight.sum(axis=2).sum(axis=0) if scale.ndim > 1 else
                 of_weight.reshape(-1, K).sum(axis=0)}
    if "bias" in w:
        gradients["bias"] = dy.reshape(-1, K).sum(axis=0)
    g = dy * scale
    dx = g - xhat * ((g * xhat).sum(axis=-1, keepdims=True) / K)
    if kind == "layernorm":
        dx = dx - g.sum(axis=-1, keepdims=True) / K
    return dx * rstd, gradients


def options(config: DecoderConfig) -> dict[str, Any]:
    """Return the norm of a decoder as keyword arguments of `forward`."""
    return dict(kind=config.normalization, epsilon=config.norm_epsilon, zero_centered=config.zero_centered_gamma)
