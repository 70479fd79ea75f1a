"""The activations of a feed-forward block and their derivatives, by their textbook formulas.

Sources: D. Hendrycks and K. Gimpel, arXiv 1606.08415 (GELU and its tanh form); S. Elfwing et al., arXiv 1702.03118
(SiLU).
"""
import math

import numpy as np

from ..arrays import Array
from .magnitude import Magnitude


def identity(h: Array) -> tuple[Array, Array]:
    """a = h"""
    return h, np.ones_like(h)


def relu(h: Array) -> tuple[Array, Array]:
    """a = max(h, 0); the derivative at 0 is taken to be 0."""
    return np.maximum(h, 0), (h > 0).astype(h.dtype)


def relu2(h: Array) -> tuple[Array, Array]:
    """a = max(h, 0)^2; a' = 2 max(h, 0)"""
    return np.maximum(h, 0) ** 2, 2 * np.maximum(h, 0)


def silu(h: Array) -> tuple[Array, Array]:
    """a = h s with s = 1 / (1 + e^-h); a' = s + h s (1 - s)"""
    s = np.exp(-np.logaddexp(0, -h))
    return h * s, s + h * s * (1 - s)


def gelu(h: Array) -> tuple[Array, Array]:
    """a = h P with P = (1 + erf(h / sqrt 2)) / 2; a' = P + h e^(-h^2 / 2) / sqrt(2 pi)"""
    p = (1 + erf(h / math.sqrt(2))) / 2
    return h * p, p + h * np.exp(-h * h / 2) / math.sqrt(2 * math.pi)


def gelu_tanh(h: Array) -> tuple[Array, Array]:
    """a = h (1 + t) / 2 with t = tanh(sqrt(2 / pi) (h + 0.044715 h^3))"""
    k, c = math.sqrt(2 / math.pi), 0.044715
    t = np.tanh(k * (h + c * h * h * h))
    return 0.5 * h * (1 + t), 0.5 * (1 + t) + 0.5 * h * (1 - t * t) * k * (1 + 3 * c * h * h)


def erf(z: Array) -> Array:
    """Return the error function, number by number, by the C library."""
    return np.asarray(np.frompyfunc(math.erf, 1, 1)(z.astype(np.float64)), dtype=np.float64).astype(z.dtype)


ACTIVATIONS = {"gelu_tanh": gelu_tanh, "gelu": gelu, "silu": silu, "relu": relu, "relu2": relu2,
               "identity": identity}
# Bounds on the second derivatives.
BEND = {"gelu_tanh": 0.8, "gelu": 0.8, "silu": 0.5, "relu": 0.0, "relu2": 2.0, "identity": 0.0}


def forward(h: Array, name: str) -> tuple[Array, Array]:
    """Compute act(h) and its derivative act'(h), elementwise.

    Parameters
    ----------
    h : (...) array or Magnitude
    name : str
        "gelu_tanh", "gelu", "silu", "relu", "relu2" or "identity".

    Returns
    -------
    a, slope : (...) array or Magnitude
        `slope` is what `backward` needs.

    Raises
    ------
    ValueError
        The name is none of these.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"found activation {name!r}, expected one of {', '.join(ACTIVATIONS)}")
    return of_magnitude(h, name) if isinstance(h, Magnitude) else ACTIVATIONS[name](h)


def backward(da: Array, slope: Array) -> Array:
    """dh = da act'(h)"""
    return da * slope


def of_magnitude(h: Magnitude, name: str) -> tuple[Magnitude, Magnitude]:
    """Compute act(h) and act'(h) with their bounds: the rounding of their own terms, and what h's error makes of them.

    size(act(h)) = |terms of act| + |act'(h)| size(h), size(act'(h)) = |terms of act'| + max |act''| size(h).
    """
    a, slope = ACTIVATIONS[name](h.value)
    a_terms, slope_terms = np.abs(a), np.abs(slope)
    if name in ("gelu", "gelu_tanh"):       # 1 + erf and 1 + tanh cancel for negative h: their terms do not
        a_terms, slope_terms = np.abs(h.value), 1 + np.abs(h.value)
    if name == "relu":                      # so close to 0, float32 may flip the sign: either slope is right
        eps = float(np.finfo(np.float32).eps)
        slope_terms = slope_terms + (np.abs(h.value) <= 4 * eps * h.size) / eps
    return Magnitude(a, a_terms + np.abs(slope) * h.size), Magnitude(slope, slope_terms + BEND[name] * h.size)
