"""y = x w^T on the GPU: cuBLAS for many rows, kernels of our own for few (few_rows.py).

cuBLAS chooses its kernel by shapes, gaps and alignment. A block is a slice of its rank's array, whose gaps and
alignment depend on the number of ranks: operands that the hardware would read otherwise are made compact first.

Dimension key: N rows (tokens), I in features, O out features.
"""
from functools import lru_cache, cache

import cupy
import numpy as np
from cupy.cuda import cublas
from cupy.cuda.device import get_cublas_handle
from numpy.typing import DTypeLike

from ...arrays import DeviceArray, sum_dtype
from .activation import activation_forward
from .few_rows import few_rows, in_rows, one_row, one_row_of_two, takes
from .kernel import ALIGNED
from .sums import column_sum

CUDA_R = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}         # cudaDataType of library_types.h
NUMBERS = {dtype: np.array([0, 1], dtype) for dtype in (np.dtype("float32"), np.dtype("float64"))}


def linear_forward(x_NI: DeviceArray, w_OI: DeviceArray, out: DeviceArray | None = None,
                   dtype: DTypeLike | None = None) -> tuple[DeviceArray, tuple[DeviceArray, DeviceArray]]:
    """Compute as mpitp.ops.linear.linear_forward."""
    if len(x_NI) == 1 and w_OI.size:
        return one_row(x_NI, w_OI, out, dtype), (x_NI, w_OI)
    if takes(x_NI, w_OI):
        return few_rows(x_NI, w_OI, out), (x_NI, w_OI)
    return product(x_NI, w_OI.T, out, dtype), (x_NI, w_OI)


def two_linears_forward(x_NI: DeviceArray, v_OI: DeviceArray, w_OI: DeviceArray) -> tuple[DeviceArray, DeviceArray]:
    """Compute as mpitp.ops.linear.two_linears_forward, of one row by one kernel."""
    if len(x_NI) == 1 and w_OI.size:
        v_OI, w_OI = in_rows(v_OI), in_rows(w_OI)
        if (v_OI.shape, v_OI.strides) == (w_OI.shape, w_OI.strides):
            return tuple(one_row_of_two(x_NI, v_OI, w_OI))
    return linear_forward(x_NI, v_OI)[0], linear_forward(x_NI, w_OI)[0]


def product(a: DeviceArray, b: DeviceArray, out: DeviceArray | None = None, dtype: DTypeLike | None = None,
            add: bool = False) -> DeviceArray:
    """Compute as mpitp.ops.linear.product, of two matrices or of two stacks of them, added up in float32 (float64)."""
    (*stack, m, k), n = a.shape, b.shape[-1]
    result = cupy.ndarray((*stack, m, n), a.dtype if dtype is None else dtype) if out is None else out
    if not (result.size and k):
        if not add:
            result.fill(0)
        return result
    in_place, c_turned, c_pitch, c_apart = layout(result)
    c = result
    if c_turned or not in_place:
        c, c_pitch, c_apart = cupy.empty(result.shape, result.dtype), n, m * n
    a, a_turned, a_pitch, a_apart = operand(a)
    b, b_turned, b_pitch, b_apart = operand(b)
    compute, one, zero = numbers(a.dtype)
    before = one if add and c is result else zero
    a_type, c_type = cuda_type(a.dtype), cuda_type(c.dtype)
    # Row by row, c = a b is column by column c^T = b^T a^T, which is what cuBLAS reads.
    if stack:
        cublas.gemmStridedBatchedEx(
            get_cublas_handle(), b_turned, a_turned, n, m, k, one, b.data.ptr, a_type, b_pitch, b_apart,
            a.data.ptr, a_type, a_pitch, a_apart, before, c.data.ptr, c_type, c_pitch, c_apart, stack[0], compute,
            cublas.CUBLAS_GEMM_DEFAULT)
    else:
        cublas.gemmEx(
            get_cublas_handle(), b_turned, a_turned, n, m, k, one, b.data.ptr, a_type, b_pitch,
            a.data.ptr, a_type, a_pitch, before, c.data.ptr, c_type, c_pitch, compute, cublas.CUBLAS_GEMM_DEFAULT)
    if c is not result:
        if add:
            result += c
        else:
            result[...] = c
    return result


def add_bias(y_NO: DeviceArray, b_O: DeviceArray | None) -> None:
    """Compute as mpitp.ops.linear.add_bias, one pass in vectors."""
    if b_O is None:
        return
    if not y_NO.flags.c_contiguous:
        y_NO += b_O
        return
    activation_forward("identity", y_NO, out=y_NO, bias=b_O)


def bias_backward(dy_NO: DeviceArray, out: DeviceArray | None = None) -> DeviceArray:
    """Compute as mpitp.ops.linear.bias_backward, in float32 for 16-bit dy."""
    return column_sum(dy_NO, out=out)


# --- how cuBLAS is told of arrays ------------------------------------------------------------------------------

def operand(x: DeviceArray) -> tuple[DeviceArray, int, int, int]:
    """Return x or a copy without gaps as cuBLAS takes it: (array, transposed or not, pitch, from matrix to matrix)."""
    in_place, turned, pitch, apart = layout(x)
    if not in_place:
        x = (x.swapaxes(-1, -2) if turned else x).copy(order="C")
    return x, turned, pitch, apart


def layout(x: DeviceArray) -> tuple[bool, int, int, int]:
    """Find (whether cuBLAS may take x where it lies, transposed or not, pitch, apart), of x or of a compact copy."""
    return layout_of(x.shape, x.strides, x.dtype, x.data.ptr % ALIGNED == 0)


@lru_cache(maxsize=4096)
def layout_of(shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype,
              starts_aligned: bool) -> tuple[bool, int, int, int]:
    """Find the layout of a matrix (rows, length) or a stack of them, once for each kind.

    It may lie where it is if cuBLAS reads it as it would a compact copy, so that the bits are the same.
    """
    size, turned = dtype.itemsize, False
    (rows, length), (gap, step) = shape[-2:], strides[-2:]
    if min(rows, length) > 1 and step != size and gap == size:
        turned, (rows, length), (gap, step) = True, (length, rows), (step, gap)
    compact = gap == length * size or rows == 1
    apart = strides[0] if len(shape) == 3 and shape[0] > 1 else rows * length * size
    if min(rows, length) == 1 or length * size % ALIGNED:           # not in vectors, or by other kernels
        good = compact and apart == rows * length * size
    else:
        good = gap >= length * size and gap % ALIGNED == 0 and apart % ALIGNED == 0
    in_place = good and starts_aligned and (step == size or length == 1)
    op = cublas.CUBLAS_OP_T if turned else cublas.CUBLAS_OP_N
    if not in_place or rows == 1:
        gap = length * size
    return in_place, op, gap // size, (apart // size if in_place else rows * length)


@cache
def cuda_type(dtype: np.dtype) -> int:
    """Find the number that cuBLAS has for a dtype."""
    return CUDA_R[dtype.name]


@cache
def numbers(dtype: np.dtype) -> tuple[int, int, int]:
    """Find what cuBLAS computes products of a dtype in, and the addresses of a 1 and a 0 of that."""
    computed = sum_dtype(dtype)
    compute = cublas.CUBLAS_COMPUTE_64F if computed == np.float64 else cublas.CUBLAS_COMPUTE_32F
    zero = NUMBERS[computed].ctypes.data
    return compute, zero + computed.itemsize, zero
