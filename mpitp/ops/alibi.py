"""Slopes of ALiBi, attention with linear biases (Press et al., arXiv 2108.12409)."""
import numpy as np


def alibi_slopes(heads):
    """The slope of each head (heads,), float64.

    2^(-8 (h+1) / heads) for a power of two. Otherwise those of the largest power of two m below, then every other one
    of those of 2 m, as in the authors' program.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = geometric(power)
    return np.concatenate([slopes, geometric(2 * power)[0::2][:heads - power]])


def geometric(heads):
    return 2.0 ** (-8.0 * np.arange(1, heads + 1) / heads)
