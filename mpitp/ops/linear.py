"""y = x w^T, the one product that everything here splits over ranks.

Dimension key: N rows (tokens), I in features, O out features.
"""
import numpy as np
from numpy.typing import DTypeLike

from ..arrays import Array
from .twin import cuda_twin

FEW = 64        # rows up to which y = (w x^T)^T is faster: 2 to 3 times up to 16, as OpenBLAS does not repack w then
NARROW = 16     # rows or columns: up to here a product is computed on arrays without gaps


@cuda_twin(by="w_OI")
def linear_forward(x_NI: Array, w_OI: Array, out: Array | None = None,
                   dtype: DTypeLike | None = None) -> tuple[Array, tuple[Array, Array]]:
    """Compute y = x w^T (N, O); also return what linear_backward takes: x and w themselves, not copies.

    out : where y goes; None for a new array
    dtype : of a new y, None for x's; a GPU can leave the sums of 16-bit factors in float32, others have x's dtype
    """
    if not 1 < len(x_NI) <= FEW:
        return compact_product(x_NI, w_OI.T, out), (x_NI, w_OI)
    y_NO = np.empty((len(x_NI), len(w_OI)), x_NI.dtype) if out is None else out
    y_NO[...] = compact_product(w_OI, x_NI.T).T
    return y_NO, (x_NI, w_OI)


@cuda_twin(by="w_OI")
def two_linears_forward(x_NI: Array, v_OI: Array, w_OI: Array) -> tuple[Array, Array]:
    """Compute x v^T and x w^T (N, O), which a GPU does at once where x is one row."""
    return linear_forward(x_NI, v_OI)[0], linear_forward(x_NI, w_OI)[0]


def linear_backward(dy_NO: Array, saved: tuple[Array, Array], dw_out: Array | None = None,
                    dtype: DTypeLike | None = None) -> tuple[Array, Array]:
    """Compute dx = dy w (N, I), of `dtype` or dy's, and dw = dy^T x (O, I), written to `dw_out` if given."""
    x_NI, w_OI = saved
    return product(dy_NO, w_OI, dtype=dtype), product(dy_NO.T, x_NI, dw_out)


def linear_weight_backward(dy_NO: Array, x_NI: Array, out: Array | None = None) -> Array:
    """Compute dw = dy^T x (O, I) alone, where dx is computed elsewhere; written to `out` if given."""
    return product(dy_NO.T, x_NI, out)


@cuda_twin(by="y_NO")
def add_bias(y_NO: Array, b_O: Array | None) -> None:
    """Add b to every row of y in place; do nothing where b is None."""
    if b_O is not None:
        y_NO += b_O


@cuda_twin(by="dy_NO")
def bias_backward(dy_NO: Array, out: Array | None = None) -> Array:
    """Compute the gradient of b in y = x w^T + b, the sum of dy over the rows (O,); written to `out` if given."""
    return dy_NO.sum(axis=0, out=out)


@cuda_twin(by="a")
def product(a: Array, b: Array, out: Array | None = None, dtype: DTypeLike | None = None, add: bool = False) -> Array:
    """Compute a @ b, with bits that do not depend on what lies beside a block in the memory of its rank.

    Parameters
    ----------
    a, b : (m, k) and (k, n) arrays of one dtype, on a GPU also two stacks of such matrices
    out : (m, n) array for the result; None for a new one
    dtype : of a new result, as in linear_forward
    add : whether the product is added to what `out` holds
    """
    if not add:
        return compact_product(a, b, out)
    out += compact_product(a, b)
    return out


def compact_product(a: Array, b: Array, out: Array | None = None) -> Array:
    """Compute a @ b of NumPy arrays, of copies without gaps where gaps would change the bits.

    A block is a slice of its rank's array, so the gap between its rows depends on the number of ranks. OpenBLAS
    ignores gaps but for one case: it adds up in another order when rows of up to 8 numbers follow each other
    without any (`lda == m` in its kernel/x86_64/sgemv_t_4.c and dgemv_t_4.c).
    """
    a = a if a.flags.forc else without_gaps(a)          # forc: without gaps, in Fortran's order or in C's
    b = b if b.flags.forc else without_gaps(b)
    if out is None or out.flags.forc or min(out.shape) > NARROW:
        return np.matmul(a, b, out=out)
    out[...] = np.matmul(a, b)
    return out


def without_gaps(x: Array) -> Array:
    """Return a compact copy of a narrow matrix, a wide one itself."""
    return x.copy(order="K") if min(x.shape) <= NARROW else x
