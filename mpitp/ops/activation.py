"""The activations of the feed-forward block, each with its derivative.

An activation is cheap arithmetic on much data: what it costs is memory traffic. So it runs over flat pieces
that stay in cache (512 x 4096 values at once: 109 ms as `0.5*h*(1+tanh(k*(h+c*h**3)))`, in pieces 3 ms), and
forward leaves the derivative where h was: backward is then one product. GELU in its tanh form is written
with the logistic function, 0.5 (1 + tanh u) = 1 / (1 + e^(-2u)), which does not cancel for negative u.
"""
import math

import numpy as np

from ..errors import InputError
from .twin import cuda_twin

PIECE = 1 << 15
GELU_K, GELU_C = math.sqrt(2 / math.pi), 0.044715


def identity(h, a, d):
    """a = h"""
    a[...] = h
    if d is not None:
        d[...] = 1


def relu(h, a, d):
    """a = max(h, 0); its derivative at 0 is 0"""
    positive = h > 0
    np.maximum(h, 0, out=a)
    if d is not None:
        d[...] = positive


def silu(h, a, d):
    """a = h s, s = 1 / (1 + e^-h);   a' = s + a (1 - s)"""
    s = 1 / (1 + np.exp(-h))
    np.multiply(h, s, out=a)
    if d is not None:
        np.add(s, a * (1 - s), out=d)


def gelu_tanh(h, a, d):
    """a = h s, s = 1 / (1 + e^-2u), u = k (h + c h^3);   a' = s + a (1 - s) 2 u'   (Hendrycks 2016)"""
    square = h * h
    s = square * (-2 * GELU_K * GELU_C)
    s -= 2 * GELU_K
    s *= h                                      # -2u
    np.exp(s, out=s)
    s += 1
    np.divide(1, s, out=s)
    np.multiply(h, s, out=a)
    if d is not None:
        square *= 6 * GELU_K * GELU_C
        square += 2 * GELU_K                    # 2u'
        square *= a
        np.subtract(1, s, out=d)
        d *= square
        d += s


def gelu(h, a, d):
    """a = h F, F = (1 + erf(h / sqrt 2)) / 2;   a' = F + h e^(-h^2/2) / sqrt(2 pi)   (Hendrycks 2016)"""
    gauss = np.exp(-0.5 * h * h)
    from .erf import erf                        # where it is used: most models have the tanh form
    cdf = erf(h * math.sqrt(0.5), gauss)
    cdf += 1
    cdf *= 0.5
    density = h * gauss if d is not None else None      # before `a` or `d` overwrite h
    np.multiply(h, cdf, out=a)
    if d is not None:
        density *= 1 / math.sqrt(2 * math.pi)
        np.add(cdf, density, out=d)


ACTIVATIONS = {f.__name__: f for f in (gelu_tanh, gelu, silu, relu, identity)}


@cuda_twin(by="h")
def activation_forward(name, h, out=None, derivative=None, bias=None):
    """a = act(h) elementwise, or act(h + bias).

    Parameters
    ----------
    h : array of any shape, C-contiguous
    out : where a goes; `h` itself for in place, None for a new array
    derivative : where act'(h) goes, `h` itself where `out` is another array; None: not computed
    bias : added to every row of h first, which is overwritten then; or None

    Returns
    -------
    a, saved : saved is `derivative`, what activation_backward takes
    """
    if name not in ACTIVATIONS:
        raise InputError(f"found activation {name!r}, expected one of {', '.join(ACTIVATIONS)}")
    if bias is not None:
        h += bias
    out = np.empty_like(h) if out is None else out
    activation = ACTIVATIONS[name]
    flat_h, flat_a, flat_d = h.reshape(-1), out.reshape(-1), None if derivative is None else derivative.reshape(-1)
    with np.errstate(over="ignore"):            # e^-h is inf for very negative h, and 1/inf the right 0
        for start in range(0, h.size, PIECE):
            piece = slice(start, start + PIECE)
            activation(flat_h[piece], flat_a[piece], None if flat_d is None else flat_d[piece])
    return out, derivative


@cuda_twin(by="da")
def activation_backward(da, saved, out=None):
    """dh = da * act'(h), written to `out` if given."""
    return np.multiply(da, saved, out=out)


@cuda_twin(by="h")
def gated_forward(name, h, up, bias=None, up_bias=None, saved=True):
    """a = act(h + bias) (up + up_bias). h and up are overwritten.

    Returns
    -------
    a, saved : saved is (act(h + bias), act'(h + bias), up + up_bias), what gated_backward takes; None with saved=False
    """
    if up_bias is not None:
        up += up_bias
    # The derivative takes the place of h; without a backward pass the activation does.
    act, slope = activation_forward(name, h, derivative=h, bias=bias) if saved else \
        activation_forward(name, h, out=h, bias=bias)
    return act * up, ((act, slope, up) if saved else None)


@cuda_twin(by="da")
def gated_backward(da, saved):
    """dh = da up act'(h), in the place of da, and dup = da act(h)."""
    act, slope, up = saved
    dup = da * act
    da *= up
    return activation_backward(da, slope, out=da), dup


@cuda_twin(by="y")
def add_to(y, x):
    """y += x, of one shape."""
    y += x
