"""The error function, which NumPy does not have.

The method is W. J. Cody's, "Rational Chebyshev approximations for the error function", Math. Comp. 23 (1969): one
ratio of polynomials for |x| <= 0.5, one for erfc up to 4, one beyond. The largest error against values of 36 digits,
measured: 3.4 ULP in float64 and 3.5 in float32, against 5.2 and 6.1 where the first ratio ends at 0.46875, as in
his program.
"""
import numpy as np

from ..arrays import Array

SMALL = ((1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2, 3.77485237685302021e2,
          3.20937758913846947e3),
         (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3))
MIDDLE = ((2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0, 6.61191906371416295e1,
           2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3,
           1.23033935479799725e3),
          (1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3,
           3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3))
LARGE = ((1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1, 1.25781726111229246e-1,
          1.60837851487422766e-2, 6.58749161529837803e-4),
         (1.0, 2.56852019228982242e0, 1.87295284992346725e0, 5.27905102951428412e-1, 6.05183413124413191e-2,
          2.33520497626869185e-3))
INVERSE_SQRT_PI = 0.56418958354775628695


def ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: Array) -> Array:
    """Compute the ratio of two polynomials in x by Horner's rule, from their coefficients, highest power first."""
    numerator, denominator = (c[0] * x + c[1] for c in coefficients)
    for p, q in zip(coefficients[0][2:], coefficients[1][2:]):
        numerator *= x
        numerator += p
        denominator *= x
        denominator += q
    numerator /= denominator
    return numerator


def erf(x: Array, gauss: Array | None = None) -> Array:
    """Compute erf(x) elementwise, in the dtype of x.

    Parameters
    ----------
    x : array
    gauss : array or None
        e^(-x^2), if the caller has it already.

    Returns
    -------
    erf : array
        A new array, of x's shape and dtype.
    """
    if gauss is None:
        gauss = np.exp(-x * x)
    size = np.abs(x)
    out = ratio(MIDDLE, np.clip(size, 0.5, 4.0))
    out *= gauss
    np.subtract(1, out, out=out)
    np.copysign(out, x, out=out)
    # Both everywhere, then a choice by products with 0 and 1, which is exact: ten times faster than a mask.
    is_small = (size <= 0.5).astype(x.dtype)
    small = np.clip(x, -0.5, 0.5)
    small *= ratio(SMALL, small * small)
    small *= is_small
    out *= 1 - is_small
    out += small
    beyond = size > 4.0
    if beyond.any():                            # rare, so gathered
        y = np.minimum(size[beyond], 6.0)       # from 6 on erf rounds to 1 in either dtype
        square = 1.0 / (y * y)
        tail = (INVERSE_SQRT_PI - square * ratio(LARGE, square)) / y
        out[beyond] = np.copysign(1.0 - gauss[beyond] * tail, x[beyond])
    return out
