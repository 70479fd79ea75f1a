"""Slopes of ALiBi, attention with linear biases (Press et al., arXiv 2108.12409)."""
import numpy as np

from ..arrays import Array


def alibi_slopes(heads: int) -> Array:
    """Compute the slope of each head (heads,), in float64.

    Head h has 2^(-8 (h+1) / heads) where heads is a power of two. Otherwise the first heads have the slopes of m heads,
    the largest power of two below, and the others every second slope of 2 m heads, as in the authors' program.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = geometric(power)
    return np.concatenate([slopes, geometric(2 * power)[0::2][:heads - power]])


def geometric(heads: int) -> Array:
    """Compute 2^(-8 (h+1) / heads) for each h."""
    return 2.0 ** (-8.0 * np.arange(1, heads + 1) / heads)
