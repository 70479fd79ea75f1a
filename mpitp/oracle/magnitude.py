"""Arrays that carry a bound on their rounding error: running error analysis.

The functions of this package run on `Magnitude` arrays as they run on NumPy's. Every output and gradient then comes
with its magnitude, and |found - exact| / (eps * magnitude) judges a result in any dtype (see comparison.py). The bound
is first order and a worst case: no error is taken to cancel another. In one layer that is close to what a real
computation does; through many layers it is generous.

Source: N. J. Higham, Accuracy and Stability of Numerical Algorithms (2002), section 3.3.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..arrays import Array


class Magnitude:
    """An array in float64 and, elementwise, how large its error is if every operation errs by a relative 1.

    The error of the same computation in a dtype is then at most `size` times the eps of the dtype, to first order.

    Parameters
    ----------
    value : array
        The numbers.
    size : array of the same shape, optional
        Their error bound. None: the numbers are exact, as inputs are.

    Attributes
    ----------
    value, size : array
        As above.
    is_exact : bool
        Whether the numbers were given as exact; then `size` is 0.

    Examples
    --------
    Three numbers that add up to 0 do so only up to rounding: the error may be eps times 1 + 2 + 3.

    >>> total = Magnitude([1.0, 2.0, -3.0]).sum()
    >>> float(total.value), float(total.size)
    (0.0, 6.0)

    A product passes on the errors of its factors, and adds a rounding of its own: 6 |0 * 4| from the sum, 0 from here.

    >>> product = total * 4.0
    >>> float(product.value), float(product.size)
    (0.0, 24.0)
    """
    __array_priority__ = 1000           # array + Magnitude is asked of Magnitude

    def __init__(self, value: Any, size: Array | None = None) -> None:
        self.value: Array = np.asarray(value, np.float64)
        self.is_exact = size is None
        self.size: Array = np.broadcast_to(0.0, self.value.shape) if size is None else np.asarray(size)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the array."""
        return self.value.shape

    @property
    def ndim(self) -> int:
        """Return the number of its axes."""
        return self.value.ndim

    @property
    def dtype(self) -> np.dtype:
        """Return float64, always."""
        return self.value.dtype

    def __len__(self) -> int:
        return len(self.value)

    # --- what moves numbers but does not change them -------------------------------------------------------

    def moved(self, move: Callable[[Array], Array]) -> Magnitude:
        """Apply `move`, a view or a reordering, to the numbers and to their bounds."""
        return Magnitude(move(self.value), None if self.is_exact else move(self.size))

    @property
    def T(self) -> Magnitude:
        """Return the transpose."""
        return self.moved(np.transpose)

    def __getitem__(self, window: Any) -> Magnitude:
        return self.moved(lambda array: array[window])

    def reshape(self, *shape: int) -> Magnitude:
        """Reshape as NumPy's reshape does."""
        return self.moved(lambda array: array.reshape(*shape))

    def transpose(self, *axes: int) -> Magnitude:
        """Permute the axes as NumPy's transpose does."""
        return self.moved(lambda array: array.transpose(*axes))

    def swapaxes(self, one: int, other: int) -> Magnitude:
        """Exchange two axes as NumPy's swapaxes does."""
        return self.moved(lambda array: array.swapaxes(one, other))

    # --- what computes: the operation's own rounding, and what becomes of its operands' errors -----------------

    def sum(self, axis: Any = None, keepdims: bool = False) -> Magnitude:
        """Add up: every term may be rounded once, relative to itself."""
        return Magnitude(self.value.sum(axis=axis, keepdims=keepdims),
                         (np.abs(self.value) + self.size).sum(axis=axis, keepdims=keepdims))

    def __add__(self, other: Any) -> Magnitude:
        other = as_magnitude(other)
        value = self.value + other.value
        return Magnitude(value, np.abs(value) + self.size + other.size)

    def __mul__(self, other: Any) -> Magnitude:
        other = as_magnitude(other)
        value = self.value * other.value
        return Magnitude(value, np.abs(value) + np.abs(self.value) * other.size + self.size * np.abs(other.value))

    def __truediv__(self, other: Any) -> Magnitude:
        other = as_magnitude(other)
        value = self.value / other.value
        return Magnitude(value, np.abs(value) + (self.size + np.abs(value) * other.size) / np.abs(other.value))

    def __matmul__(self, other: Any) -> Magnitude:
        other = as_magnitude(other)
        a, b = np.abs(self.value), np.abs(other.value)
        size = a @ (b if other.is_exact else b + other.size)
        if not self.is_exact:
            size = size + self.size @ b
        return Magnitude(self.value @ other.value, size)

    def __neg__(self) -> Magnitude:
        return Magnitude(-self.value, None if self.is_exact else self.size)

    def __sub__(self, other: Any) -> Magnitude:
        return self + -as_magnitude(other)

    def __radd__(self, other: Any) -> Magnitude:
        return self + other

    def __rmul__(self, other: Any) -> Magnitude:
        return self * other

    def __rsub__(self, other: Any) -> Magnitude:
        return as_magnitude(other) - self

    def __rtruediv__(self, other: Any) -> Magnitude:
        return as_magnitude(other) / self

    def __rmatmul__(self, other: Any) -> Magnitude:
        return as_magnitude(other) @ self

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        """Answer np.exp(x), np.log(x), np.sqrt(x), and array + x, which NumPy asks its own array first."""
        if method != "__call__" or options or ufunc not in OPERATIONS:
            return NotImplemented
        return OPERATIONS[ufunc](*map(as_magnitude, inputs))


def as_magnitude(x: Any) -> Magnitude:
    """Return x itself if it is a Magnitude, else one of exact numbers."""
    return x if isinstance(x, Magnitude) else Magnitude(x)


def numbers_of(x: Any) -> Array:
    """Return the numbers without their bounds, for what is not part of the arithmetic, such as a largest score."""
    return x.value if isinstance(x, Magnitude) else x


def exp(x: Magnitude) -> Magnitude:
    """Return e^x, whose relative error is the absolute one of x, and one rounding."""
    value = np.exp(x.value)
    return Magnitude(value, value * (1 + x.size))


def log(x: Magnitude) -> Magnitude:
    """ln x, whose absolute error is the relative one of x, and one rounding."""
    value = np.log(x.value)
    return Magnitude(value, np.abs(value) + x.size / x.value)


def sqrt(x: Magnitude) -> Magnitude:
    """Return the square root, with half the relative error of x, and one rounding."""
    value = np.sqrt(x.value)
    return Magnitude(value, value + x.size / (2 * value))


def tanh(x: Magnitude) -> Magnitude:
    """Return tanh x, whose absolute error is that of x times the slope, and one rounding."""
    value = np.tanh(x.value)
    return Magnitude(value, np.abs(value) + (1 - value * value) * x.size)


OPERATIONS: dict[np.ufunc, Callable[..., Magnitude]] = {
    np.add: Magnitude.__add__, np.subtract: Magnitude.__sub__, np.multiply: Magnitude.__mul__,
    np.divide: Magnitude.__truediv__, np.matmul: Magnitude.__matmul__, np.negative: Magnitude.__neg__,
    np.exp: exp, np.log: log, np.sqrt: sqrt, np.tanh: tanh}
