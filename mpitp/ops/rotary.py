"""Rotary positions (Su et al., arXiv 2104.09864): pairs of features are rotated by angles that grow with the position.

Dimension key: S positions, d rotary features of a head, K all features of a head.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import DTypeLike

from ..arrays import Array
from .twin import cuda_twin

if TYPE_CHECKING:
    from ..attention_config import Rotary


def rotary_tables(rotary: Rotary, head_dim: int, positions: Sequence[int] | Array, dtype: DTypeLike,
                  xp: ModuleType = np) -> tuple[Array, Array]:
    """Compute the cosine and the sine of position * frequency, each times the attention factor.

    Parameters
    ----------
    rotary : Rotary
    head_dim : int
        K, of which d = rotary.dim features are rotated; all where that is None.
    positions : (S,) integers
        The last of them is that of a sequence's last token.
    dtype : dtype
        Of the tables, which are computed in float64 and rounded once.
    xp : module
        numpy or cupy, whose arrays the tables are.

    Returns
    -------
    cos, sin : (S, d / 2) arrays
    """
    dim = head_dim if rotary.dim is None else rotary.dim
    frequency_d, factor = frequencies(rotary, dim, int(positions[-1]) + 1 if len(positions) else 0)
    angle_Sd = np.asarray(positions, np.float64)[:, None] * frequency_d
    cos_Sd, sin_Sd = ((f(angle_Sd) * factor).astype(dtype) for f in (np.cos, np.sin))
    return xp.asarray(cos_Sd), xp.asarray(sin_Sd)


def frequencies(rotary: Rotary, dim: int, length: int = 0) -> tuple[Array, float]:
    """Compute the radians per position of each of the dim / 2 pairs, and the attention factor; length: the sequence's.

    Pair i has base^(-2 i / dim) before scaling. Scaling divides by `factor`:

    - linear: all pairs (Chen et al., arXiv 2306.15595).
    - llama3: a pair that makes fewer than `low_freq_factor` rotations within the original positions, and none that
      makes more than `high_freq_factor`; between these there is a ramp over the rotations (Llama 3.1).
    - yarn: as llama3, with a ramp over the pairs, from the one that makes `beta_fast` rotations to the one that makes
      `beta_slow` (Peng et al., arXiv 2309.00071, sections 3.2 and 3.4).
    - dynamic and longrope: see rotary_by_length.py.
    """
    plain = rotary.base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if rotary.scaling is None:
        return plain, 1.0
    if rotary.longest is not None:
        from .rotary_by_length import frequencies_by_length         # where it is used: few models have it
        return frequencies_by_length(rotary, dim, length)
    slow = plain / rotary.factor
    if rotary.scaling == "linear":
        return slow, 1.0
    keep: Array
    if rotary.scaling == "llama3":
        rotations = rotary.original_max_positions * plain / (2 * math.pi)       # type: ignore[operator] # config has it
        keep = (rotations - rotary.low_freq_factor) / (rotary.high_freq_factor - rotary.low_freq_factor)
        factor = 1.0
    else:
        first, last = (pair_of(rotations, rotary, dim) for rotations in (rotary.beta_fast, rotary.beta_slow))
        if rotary.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)     # dim - 1, not dim / 2 - 1, as in the programs in use
        width = last - first if last != first else 0.001
        keep = 1 - (np.arange(dim // 2) - first) / width
        factor = 0.1 * math.log(rotary.factor) + 1 if rotary.factor > 1 else 1.0
        if rotary.attention_factor is not None:
            factor = rotary.attention_factor
    keep = np.clip(keep, 0, 1)
    return (1 - keep) * slow + keep * plain, factor


def pair_of(rotations: float, rotary: Rotary, dim: int) -> float:
    """Find the pair, as a real number, that makes so many rotations within the original positions."""
    wave = rotary.original_max_positions / (rotations * 2 * math.pi)            # type: ignore[operator] # config has it
    return dim * math.log(wave) / (2 * math.log(rotary.base))


@cuda_twin(by="x")
def rotary_forward(x: Array, cos: Array, sin: Array, interleaved: bool, starts: Array | None = None) -> Array:
    """Compute (u cos - v sin, v cos + u sin) for each pair (u, v) of the first d features; the others stay.

    Parameters
    ----------
    x : (..., S, heads, K) array
        With starts (B, S, heads, K).
    cos, sin : (positions, d / 2) arrays
        From rotary_tables, in the dtype that x is computed in.
    interleaved : bool
        Whether pair i is the features 2 i and 2 i + 1, or else i and i + d / 2.
    starts : (B,) array of integers or None
        The position of the first row of each sequence; None for 0.

    Returns
    -------
    y : array
        A new array of x's shape.
    """
    half = cos.shape[-1]
    cos, sin = (table[rows_of(x.shape[-3], starts), None] for table in (cos, sin))      # the same for every head
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else \
        (slice(0, half), slice(half, 2 * half))
    u, v, out = x[..., first], x[..., second], np.empty(x.shape, x.dtype)
    turned_u, turned_v = out[..., first], out[..., second]
    np.multiply(u, cos, out=turned_u)
    turned_u -= v * sin
    np.multiply(v, cos, out=turned_v)
    turned_v += u * sin
    if 2 * half < x.shape[-1]:
        out[..., 2 * half:] = x[..., 2 * half:]
    return out


@cuda_twin(by="dy")
def rotary_backward(dy: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """Compute dx, which is dy rotated by the opposite angles: a new array of dy's shape."""
    return rotary_forward(dy, cos, -sin, interleaved)


def rows_of(S: int, starts: Array | None) -> slice | Array:
    """Find the rows of the tables for S positions of each sequence: a slice where there is one sequence alone."""
    if starts is None:
        return slice(0, S)
    if len(starts) == 1:                                    # a view: a token's copies cost more than they copy
        return slice(int(starts[0]), int(starts[0]) + S)
    return starts[:, None] + np.arange(S)
