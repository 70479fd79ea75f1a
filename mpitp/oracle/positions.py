"""Rotary positions and ALiBi on one process.

Dimension key: S positions, K features of a head, H query heads.

Sources: J. Su et al., arXiv 2104.09864 (rotary); B. Peng et al., arXiv 2309.00071 (yarn); Y. Ding et al.,
arXiv 2402.13753 (longrope); O. Press et al., arXiv 2108.12409 (ALiBi).
"""
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import Array

if TYPE_CHECKING:
    from ..attention_config import Rotary


# --- rotary ------------------------------------------------------------------------------------------------------

def rotate_forward(z: Array, rotary: Rotary) -> tuple[Array, Any]:
    """Turn each pair of features by position * frequency: y = z cos + z[partner] sin, sin with its sign.

    Parameters
    ----------
    z : (..., S, K) array or Magnitude
    rotary : Rotary

    Returns
    -------
    y : (..., S, K) array or Magnitude
    saved : object
        What `rotate_backward` needs.
    """
    S, K = z.shape[-2:]
    cos_SK, sin_SK, partner_K = rotation(rotary, S, K, z.dtype)
    return z * cos_SK + z[..., partner_K] * sin_SK, (cos_SK, sin_SK, partner_K)


def rotate_backward(dy: Array, saved: Any) -> Array:
    """dz = dy cos + (dy sin)[partner]: the turn back, as each feature is its partner's partner."""
    cos_SK, sin_SK, partner_K = saved
    return dy * cos_SK + (dy * sin_SK)[..., partner_K]


def rotation(rotary: Rotary, S: int, K: int, dtype: Any) -> tuple[Array, Array, Array]:
    """Return cos (S, K) and signed sin (S, K) of every position and feature, and the partner (K) of every feature."""
    frequency, factor = frequencies(rotary, K, S)
    cos_SK, sin_SK, partner_K = np.ones((S, K)), np.zeros((S, K)), np.arange(K)
    for i, f in enumerate(frequency):
        one, two = (2 * i, 2 * i + 1) if rotary.interleaved else (i, i + len(frequency))
        angle_S = np.arange(S) * f
        cos_SK[:, one] = cos_SK[:, two] = np.cos(angle_S) * factor
        sin_SK[:, one], sin_SK[:, two] = -np.sin(angle_S) * factor, np.sin(angle_S) * factor
        partner_K[one], partner_K[two] = two, one
    return cos_SK.astype(dtype), sin_SK.astype(dtype), partner_K


def frequencies(rotary: Rotary, K: int, S: int) -> tuple[list[float], float]:
    """Return radians a position of each pair in sequences of S positions, and the factor of cos and sin."""
    dim = K if rotary.dim is None else rotary.dim
    plain = [rotary.base ** (-2 * i / dim) for i in range(dim // 2)]
    if rotary.scaling == "linear":
        return [f / rotary.factor for f in plain], 1.0
    if rotary.scaling == "llama3":
        return [llama3_frequency(f, rotary) for f in plain], 1.0
    if rotary.scaling == "yarn":
        low, high = yarn_ramp(rotary, dim)
        slowed = [min(1, max(0, (i - low) / (high - low))) for i in range(dim // 2)]
        found = [part * f / rotary.factor + (1 - part) * f for part, f in zip(slowed, plain)]
        return found, yarn_factor(rotary)
    if rotary.scaling == "dynamic":
        longer = max(1, S / original_length(rotary))
        grown = (rotary.factor * longer - rotary.factor + 1) ** (dim / (dim - 2)) * rotary.base
        return [grown ** (-2 * i / dim) for i in range(dim // 2)], 1.0
    if rotary.scaling == "longrope":
        by = (rotary.long_factors if original_length(rotary) < S else rotary.short_factors) or ()
        return [f / g for f, g in zip(plain, by)], longrope_factor(rotary)
    return plain, 1.0


def llama3_frequency(f: float, rotary: Rotary) -> float:
    """Slow a frequency with a long wavelength down by the factor, keep one with a short wavelength; a ramp between."""
    wavelength, length = 2 * math.pi / f, original_length(rotary)
    if wavelength > length / rotary.low_freq_factor:
        return f / rotary.factor
    if wavelength <= length / rotary.high_freq_factor:
        return f
    kept = (length / wavelength - rotary.low_freq_factor) / (rotary.high_freq_factor - rotary.low_freq_factor)
    return (1 - kept) * f / rotary.factor + kept * f


def yarn_ramp(rotary: Rotary, dim: int) -> tuple[float, float]:
    """Return the pairs that make beta_fast and beta_slow turns within the original length: the ends of the ramp."""
    low, high = (dim * math.log(original_length(rotary) / (turns * 2 * math.pi)) / (2 * math.log(rotary.base))
                 for turns in (rotary.beta_fast, rotary.beta_slow))
    if rotary.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high + 0.001 if low == high else high


def original_length(rotary: Rotary) -> int:
    """Return the positions that the model was first trained for, which Rotary asks for with these scalings."""
    assert rotary.original_max_positions is not None
    return rotary.original_max_positions


def yarn_factor(rotary: Rotary) -> float:
    """Return what yarn multiplies cos and sin by."""
    if rotary.attention_factor is not None:
        return rotary.attention_factor
    return 0.1 * math.log(rotary.factor) + 1 if rotary.factor > 1 else 1.0


def longrope_factor(rotary: Rotary) -> float:
    """Return what longrope multiplies cos and sin by."""
    if rotary.attention_factor is not None:
        return rotary.attention_factor
    return math.sqrt(1 + math.log(rotary.factor, original_length(rotary))) if rotary.factor > 1 else 1.0


# --- ALiBi -------------------------------------------------------------------------------------------------------

def alibi(H: int, S: int, dtype: Any) -> Array:
    """Return what ALiBi adds to the scores, slope * (key - query): (H, query S, key S)."""
    distance_SS = np.arange(S) - np.arange(S)[:, None]
    return (alibi_slopes(H)[:, None, None] * distance_SS).astype(dtype)


def alibi_slopes(H: int) -> Array:
    """Return the slope of each head: powers of 2^(-8 / n), n the power of two up to H, then odd ones of 2^(-8 / 2n).

    Examples
    --------
    >>> alibi_slopes(3).tolist() == [2.0 ** -4, 2.0 ** -8, 2.0 ** -2]
    True
    """
    n = 2 ** int(math.log2(H))
    slopes = [2 ** (-8 * (h + 1) / n) for h in range(n)] + [2 ** (-8 * (h + 1) / (2 * n)) for h in range(0, 2 * n, 2)]
    return np.array(slopes[:H])
