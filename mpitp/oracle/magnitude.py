"""How large rounding errors may grow: arrays that carry a bound beside their value (running error analysis).

`dense_decoder` runs on these as it does on NumPy's arrays: every output and gradient comes with its magnitude, and
|computed - exact| / (eps * magnitude) judges any of them. First order, worst case: no error is taken to cancel another.
In one layer that is close to what a real computation does; through many layers it is generous.

Source: N. J. Higham, Accuracy and Stability of Numerical Algorithms (2002), section 3.3.
"""
import numpy as np

from . import feed_forward as dense


class Magnitude:
    """An array and, elementwise, its error when each operation errs by a relative 1; that times eps is the bound.

    value, size : arrays of one shape; inputs are exact, size 0
    """
    __array_priority__ = 1000

    def __init__(self, value, size=None):
        self.value = np.asarray(value, np.float64)
        self.size = np.zeros_like(self.value) if size is None else size

    shape = property(lambda self: self.value.shape)
    ndim = property(lambda self: self.value.ndim)
    dtype = property(lambda self: self.value.dtype)
    T = property(lambda self: self.view(lambda array: array.T))

    def __len__(self):
        return len(self.value)

    # --- what moves numbers but does not change them -------------------------------------------------------

    def view(self, move):
        return Magnitude(move(self.value), move(self.size))

    def __getitem__(self, window):
        return self.view(lambda array: array[window])

    def reshape(self, *shape):
        return self.view(lambda array: array.reshape(*shape))

    def transpose(self, *axes):
        return self.view(lambda array: array.transpose(*axes))

    def swapaxes(self, one, other):
        return self.view(lambda array: array.swapaxes(one, other))

    # --- what computes: the operation's own rounding, and what becomes of its operands' ------------------------

    def sum(self, axis=None, keepdims=False):
        return Magnitude(self.value.sum(axis=axis, keepdims=keepdims),
                         (np.abs(self.value) + self.size).sum(axis=axis, keepdims=keepdims))

    def __add__(self, other):
        other = exact(other)
        value = self.value + other.value
        return Magnitude(value, np.abs(value) + self.size + other.size)

    def __mul__(self, other):
        other = exact(other)
        value = self.value * other.value
        return Magnitude(value, np.abs(value) + np.abs(self.value) * other.size + self.size * np.abs(other.value))

    def __truediv__(self, other):
        other = exact(other)
        value = self.value / other.value
        return Magnitude(value, np.abs(value) + (self.size + np.abs(value) * other.size) / np.abs(other.value))

    def __matmul__(self, other):
        other = exact(other)
        a, b = np.abs(self.value), np.abs(other.value)
        return Magnitude(self.value @ other.value, a @ (b + other.size) + self.size @ b)

    def __neg__(self):
        return Magnitude(-self.value, self.size)

    def __sub__(self, other):
        return self + -exact(other)

    def __radd__(self, other):
        return self + other

    def __rmul__(self, other):
        return self * other

    def __rsub__(self, other):
        return exact(other) - self

    def __rtruediv__(self, other):
        return exact(other) / self

    def __rmatmul__(self, other):
        return exact(other) @ self

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        """np.exp(x) and its like, and array + x, where NumPy's array is asked first."""
        if method != "__call__" or options or ufunc not in OPERATIONS:
            return NotImplemented
        return OPERATIONS[ufunc](*map(exact, inputs))


def exact(x):
    return x if isinstance(x, Magnitude) else Magnitude(x)


def exp(x):
    value = np.exp(x.value)
    return Magnitude(value, value * (1 + x.size))


def log(x):
    value = np.log(x.value)
    return Magnitude(value, np.abs(value) + x.size / x.value)


def sqrt(x):
    value = np.sqrt(x.value)
    return Magnitude(value, value + x.size / (2 * value))


OPERATIONS = {np.add: Magnitude.__add__, np.subtract: Magnitude.__sub__, np.multiply: Magnitude.__mul__,
              np.divide: Magnitude.__truediv__, np.matmul: Magnitude.__matmul__, np.negative: Magnitude.__neg__,
              np.exp: exp, np.log: log, np.sqrt: sqrt}


def activation(name, h):
    """act(h) and act'(h) for arrays and for magnitudes."""
    if not isinstance(h, Magnitude):
        return dense.activation(name, h)[:2]
    act, slope, _ = dense.activation(name, h.value)
    act_size, slope_size = dense.activation_magnitudes(name, h.value, h.size)
    return Magnitude(act, act_size), Magnitude(slope, slope_size)


def value(x):
    """The numbers themselves: for what is not part of the arithmetic, such as a maximum that is taken off."""
    return x.value if isinstance(x, Magnitude) else x
