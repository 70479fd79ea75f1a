"""Rotary positions (Su et al., arXiv 2104.09864): pairs of features turn by an angle that grows with the position.

Dimension key: S positions, d rotary features of a head, K all features of a head.
"""
import math

import numpy as np

from .twin import cuda_twin


def rotary_tables(rotary, head_dim, positions, dtype, xp=np):
    """cos and sin of position * frequency, each times the attention factor.

    Parameters
    ----------
    rotary : mpitp.config.Rotary
    head_dim : K, of which d = rotary.dim features turn (None: all)
    positions : (S,) integers
    dtype : of the tables, which are computed in float64 and rounded once
    xp : the array module that they are for

    Returns
    -------
    cos, sin : (S, d / 2)
    """
    frequency_d, factor = frequencies(rotary, head_dim if rotary.dim is None else rotary.dim)
    angle_Sd = np.asarray(positions, np.float64)[:, None] * frequency_d
    return tuple(xp.asarray((f(angle_Sd) * factor).astype(dtype)) for f in (np.cos, np.sin))


def frequencies(rotary, dim):
    """Radians per position of each of the dim / 2 pairs, base^(-2 i / dim) before scaling, and the attention factor.

    linear : all over `factor` (Chen et al., arXiv 2306.15595)
    llama3 : a wave that turns less than `low_freq_factor` times within the original positions over `factor`, one that
        turns more than `high_freq_factor` times as it was, in between a ramp (Llama 3.1)
    yarn : the same with a ramp over the pairs, which begins at the one that turns `beta_fast` times and ends at the one
        that turns `beta_slow` times (Peng et al., arXiv 2309.00071, sections 3.2 and 3.4)
    """
    plain = rotary.base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if rotary.scaling is None:
        return plain, 1.0
    slow = plain / rotary.factor
    if rotary.scaling == "linear":
        return slow, 1.0
    if rotary.scaling == "llama3":
        turns = rotary.original_max_positions * plain / (2 * math.pi)
        keep = (turns - rotary.low_freq_factor) / (rotary.high_freq_factor - rotary.low_freq_factor)
        factor = 1.0
    else:
        first, last = (pair_that_turns(times, rotary, dim) for times in (rotary.beta_fast, rotary.beta_slow))
        if rotary.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)     # dim - 1, not dim / 2 - 1: so it is in use
        width = last - first if last != first else 0.001
        keep = 1 - (np.arange(dim // 2) - first) / width
        factor = rotary.attention_factor
        if factor is None:
            factor = 0.1 * math.log(rotary.factor) + 1 if rotary.factor > 1 else 1.0
    keep = np.clip(keep, 0, 1)
    return (1 - keep) * slow + keep * plain, factor


def pair_that_turns(times, rotary, dim):
    """The pair, a real number, whose wave turns so many times within the original positions."""
    return dim * math.log(rotary.original_max_positions / (times * 2 * math.pi)) / (2 * math.log(rotary.base))


@cuda_twin(by="x")
def rotary_forward(x, cos, sin, interleaved, starts=None):
    """(u, v) -> (u cos - v sin, v cos + u sin) for each pair (u, v) of the first d features; the others stay.

    Parameters
    ----------
    x : (..., S, heads, K) array; with starts (B, S, heads, K)
    cos, sin : (positions, d / 2), of rotary_tables, in the dtype that x is computed in
    interleaved : pair i is features (2 i, 2 i + 1); False: (i, i + d / 2)
    starts : (B,) the position of the first row of each sequence. None: 0

    Returns a new array, shaped as x.
    """
    half = cos.shape[-1]
    cos, sin = (table[rows_of(x.shape[-3], starts), None] for table in (cos, sin))      # the same for every head
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else \
        (slice(0, half), slice(half, 2 * half))
    u, v, out = x[..., first], x[..., second], np.empty(x.shape, x.dtype)
    np.multiply(u, cos, out=out[..., first])
    out[..., first] -= v * sin
    np.multiply(v, cos, out=out[..., second])
    out[..., second] += u * sin
    out[..., 2 * half:] = x[..., 2 * half:]
    return out


@cuda_twin(by="dy")
def rotary_backward(dy, cos, sin, interleaved):
    """dx of dy: turned back, by the opposite angle. Shaped as dy."""
    return rotary_forward(dy, cos, -sin, interleaved)


def rows_of(S, starts):
    """Which rows of the tables belong to S positions of each sequence: a slice where one sequence is all there is."""
    if starts is None:
        return slice(0, S)
    if len(starts) == 1:                                    # a view: a token's copies cost more than they copy
        return slice(int(starts[0]), int(starts[0]) + S)
    return starts[:, None] + np.arange(S)
