"""y = x w^T, the one product that everything here splits over ranks.

Dimension key: N rows (tokens), I in features, O out features.
"""
import numpy as np

from ..arrays import module_of, twin

FEW = 64        # rows up to which y = (w x^T)^T is faster: 2 to 3 times up to 16, as OpenBLAS does not repack w then
NARROW = 16     # rows or columns: up to here a product is computed on arrays without gaps


def linear_forward(x_NI, w_OI, out=None, dtype=None):
    """y = x w^T. Returns y (N, O), written to `out` if given, else of `dtype` (x's), and what backward needs."""
    if module_of(x_NI) is not np:
        return twin("linear").linear_forward(x_NI, w_OI, out, dtype)
    if not 1 < len(x_NI) <= FEW:
        return product(x_NI, w_OI.T, out), (x_NI, w_OI)
    y_NO = np.empty((len(x_NI), len(w_OI)), x_NI.dtype) if out is None else out
    y_NO[...] = product(w_OI, x_NI.T).T
    return y_NO, (x_NI, w_OI)


def linear_backward(dy_NO, saved, dw_out=None, dtype=None):
    """dx = dy w, dw = dy^T x. Returns dx (N, I), of `dtype` (dy's), and dw (O, I), written to `dw_out` if given."""
    x_NI, w_OI = saved
    return product(dy_NO, w_OI, dtype=dtype), product(dy_NO.T, x_NI, dw_out)


def linear_weight_backward(dy_NO, x_NI, out=None):
    """dw = dy^T x (O, I) alone, where dx is another's to compute."""
    return product(dy_NO.T, x_NI, out)


def add_bias(y_NO, b_O):
    """y += b, in place; nothing where b is None."""
    if b_O is None:
        return
    if module_of(y_NO) is not np:
        twin("linear").add_bias(y_NO, b_O)
        return
    y_NO += b_O


def bias_backward(dy_NO, out=None):
    """The gradient of b in y = x w^T + b: the sum of dy over the rows (O,)."""
    if module_of(dy_NO) is not np:
        return twin("linear").bias_backward(dy_NO, out)
    return dy_NO.sum(axis=0, out=out)


def product(a, b, out=None, dtype=None, add=False):
    """a @ b, with bits that do not depend on what lies beside a block in the memory of its rank.

    dtype : of the result where `out` is None; 16-bit factors are added up in float32, and may stay there. None: a's
    add : to what `out` holds

    A block is a slice of its rank's array, so the gap between its rows depends on the number of ranks. OpenBLAS
    ignores gaps but for one case: it adds up in another order when rows of up to 8 numbers follow each other
    without any (`lda == m` in its kernel/x86_64/sgemv_t_4.c and dgemv_t_4.c).
    """
    if module_of(a) is not np:
        return twin("linear").product(a, b, out, dtype, add)
    if add:
        out += np.matmul(without_gaps(a), without_gaps(b))
        return out
    if out is None or not is_narrow(out):
        return np.matmul(without_gaps(a), without_gaps(b), out=out)
    out[...] = np.matmul(without_gaps(a), without_gaps(b))
    return out


def is_narrow(x):
    return min(x.shape) <= NARROW and not (x.flags.c_contiguous or x.flags.f_contiguous)


def without_gaps(x):
    return x.copy(order="K") if is_narrow(x) else x
