"""The activations of the feed-forward block, each with its derivative.

An activation is cheap arithmetic on much data: what it costs is memory traffic. So it runs over flat pieces
that stay in cache, measured for 512 x 4096 values: 3 ms in pieces against 109 ms at once as
`0.5*h*(1+tanh(k*(h+c*h**3)))`. Forward leaves the derivative where h was, so that backward is one product.
GELU in its tanh form is written with the logistic function, 0.5 (1 + tanh u) = 1 / (1 + e^(-2u)), which does not
cancel for negative u.

The functions of ACTIVATIONS read h and write a = act(h) and, unless d is None, d = act'(h); a or d may be h itself.
"""
import math

import numpy as np

from ..arrays import Array
from ..errors import InputError
from .twin import cuda_twin

PIECE = 1 << 15     # numbers at a time
GELU_K, GELU_C = math.sqrt(2 / math.pi), 0.044715


def identity(h: Array, a: Array, d: Array | None) -> None:
    """Compute a = h and d = 1."""
    a[...] = h
    if d is not None:
        d[...] = 1


def relu(h: Array, a: Array, d: Array | None) -> None:
    """Compute a = max(h, 0) and d = 1 where h > 0, elsewhere 0."""
    positive = h > 0
    np.maximum(h, 0, out=a)
    if d is not None:
        d[...] = positive


def relu2(h: Array, a: Array, d: Array | None) -> None:
    """Compute a = max(h, 0)^2 and d = 2 max(h, 0) (So et al., arXiv 2109.08668)."""
    positive = np.maximum(h, 0)
    np.multiply(positive, positive, out=a)
    if d is not None:
        np.multiply(positive, 2, out=d)


def silu(h: Array, a: Array, d: Array | None) -> None:
    """Compute a = h s and d = s + a (1 - s), where s = 1 / (1 + e^-h)."""
    s = 1 / (1 + np.exp(-h))
    np.multiply(h, s, out=a)
    if d is not None:
        np.add(s, a * (1 - s), out=d)


def gelu_tanh(h: Array, a: Array, d: Array | None) -> None:
    """Compute a = h s, d = s + a (1 - s) 2 u', s = 1 / (1 + e^-2u), u = k (h + c h^3) (arXiv 1606.08415)."""
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


def gelu(h: Array, a: Array, d: Array | None) -> None:
    """Compute a = h F, d = F + h e^(-h^2/2) / sqrt(2 pi), F = (1 + erf(h / sqrt 2)) / 2 (arXiv 1606.08415)."""
    gauss = np.exp(-0.5 * h * h)
    from .erf import erf                        # where it is used: most models have the tanh form
    cdf = erf(h * math.sqrt(0.5), gauss)
    cdf += 1
    cdf *= 0.5
    if d is None:
        np.multiply(h, cdf, out=a)
        return
    density = h * gauss                         # before a or d overwrites h
    np.multiply(h, cdf, out=a)
    density *= 1 / math.sqrt(2 * math.pi)
    np.add(cdf, density, out=d)


ACTIVATIONS = {f.__name__: f for f in (gelu_tanh, gelu, silu, relu, relu2, identity)}


@cuda_twin(by="h")
def activation_forward(name: str, h: Array, out: Array | None = None, derivative: Array | None = None,
                       bias: Array | None = None) -> tuple[Array, Array | None]:
    """Compute a = act(h + bias), elementwise.

    Parameters
    ----------
    name : of ACTIVATIONS; InputError for another
    h : (..., F) array, C-contiguous
    out : where a goes; h itself for in place, None for a new array
    derivative : where act'(h + bias) goes, h itself if `out` is another array; None: it is not computed
    bias : (F,) array added to every row of h, which is overwritten then; None for 0

    Returns
    -------
    a, saved : `saved` is `derivative`, what activation_backward takes
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
def activation_backward(da: Array, saved: Array, out: Array | None = None) -> Array:
    """Compute dh = da * act'(h + bias), which `saved` holds; written to `out` if given."""
    return np.multiply(da, saved, out=out)


@cuda_twin(by="h")
def gated_forward(name: str, h: Array, up: Array, bias: Array | None = None, up_bias: Array | None = None,
                  saved: bool = True) -> tuple[Array, tuple[Array, Array, Array] | None]:
    """Compute a = act(h + bias) (up + up_bias); h and up, C-contiguous, are overwritten (arXiv 2002.05202).

    Returns
    -------
    a, saved : act(h + bias), act'(h + bias) and up + up_bias, what gated_backward takes; None if not `saved`
    """
    if up_bias is not None:
        up += up_bias
    if not saved:
        act, _ = activation_forward(name, h, out=h, bias=bias)
        return np.multiply(act, up, out=up), None
    act, _ = activation_forward(name, h, derivative=h, bias=bias)           # the derivative takes the place of h
    return act * up, (act, h, up)


@cuda_twin(by="da")
def gated_backward(da: Array, saved: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    """Compute dh = da (up + up_bias) act'(h + bias), in the memory of da, and dup = da act(h + bias)."""
    act, slope, up = saved
    dup = da * act
    da *= up
    return activation_backward(da, slope, out=da), dup


@cuda_twin(by="y")
def add_to(y: Array, x: Array) -> None:
    """Add x to y, of the same shape, in place."""
    y += x
