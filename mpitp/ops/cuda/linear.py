"""y = x w^T on the GPU: cuBLAS for many rows, a kernel of our own for one.

cuBLAS chooses its kernel by shapes, gaps and alignment. A block is a slice of its rank's array, whose gaps and
alignment depend on the number of ranks: operands that the hardware would read otherwise are made compact first.

Dimension key: N rows (tokens), I in features, O out features.
"""
from functools import lru_cache

import cupy
import numpy as np
from cupy.cuda import cublas, device

from ...arrays import sum_dtype
from .activation import activation_forward
from .kernel import kernel, launch
from .sums import column_sum

ROWS = 2            # that a warp adds up at once: x is read for both
ALIGNED = 16        # bytes that one instruction reads
CUDA_R = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}         # cudaDataType of library_types.h
SCALARS = {(value, name): np.array(value, name) for value in (1, 0) for name in ("float32", "float64")}
ONE, ZERO = ({name: SCALARS[value, name].ctypes.data for name in ("float32", "float64")} for value in (1, 0))
GEMV = r"""
// y[o] = sum over i of w[o, i] x[i], WARPS warps for ROWS rows; 16 bytes of w at a time. Which thread adds what of a
// row, and so its bits, depends on WARPS alone.
struct alignas(16) Vector { T at[16 / sizeof(T)]; };
extern "C" __global__ void gemv(const T* w, const T* x, Y* y, int O, int I, long long pitch) {
    const int V = 16 / sizeof(T), warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int o = (blockIdx.x * (4 / WARPS) + warp / WARPS) * ROWS, part = (warp % WARPS) * 32 + lane;
    const T* row[ROWS];
    A sum[ROWS];
    for (int r = 0; r < ROWS; r++) {
        row[r] = w + min(o + r, O - 1) * pitch;
        sum[r] = 0;
    }
    #pragma unroll 4
    for (int i = part * V; i < I; i += WARPS * 32 * V) {
#if VECTORS
        Vector b = *(const Vector*)(x + i), a[ROWS];
        #pragma unroll
        for (int r = 0; r < ROWS; r++) a[r] = *(const Vector*)(row[r] + i);
        #pragma unroll
        for (int v = 0; v < V; v++)
            #pragma unroll
            for (int r = 0; r < ROWS; r++) sum[r] += up(a[r].at[v]) * up(b.at[v]);
#else
        for (int v = 0; v < V && i + v < I; v++)
            for (int r = 0; r < ROWS; r++) sum[r] += up(row[r][i + v]) * up(x[i + v]);
#endif
    }
    __shared__ A of_warps[4][ROWS];
    for (int r = 0; r < ROWS; r++) {
        sum[r] = warp_sum(sum[r]);
        if (!lane) of_warps[warp][r] = sum[r];
    }
    __syncthreads();
    if (warp % WARPS == 0 && lane < ROWS && o + lane < O) {
        A total = of_warps[warp][lane];
        for (int other = 1; other < WARPS; other++) total += of_warps[warp + other][lane];
        y[o + lane] = ROUND_Y(total);
    }
}
"""


def linear_forward(x_NI, w_OI, out=None, dtype=None):
    """y = x w^T, written to `out` or to a new array of `dtype` (x's). Returns y (N, O) and what backward needs."""
    if len(x_NI) == 1 and w_OI.size:
        return one_row(x_NI, w_OI, out, dtype), (x_NI, w_OI)
    return product(x_NI, w_OI.T, out, dtype), (x_NI, w_OI)


def one_row(x_1I, w_OI, out=None, dtype=None):
    """y = x w^T of one row, which costs the reading of w."""
    O, I = w_OI.shape
    y_1O = cupy.empty((1, O), x_1I.dtype if dtype is None else dtype) if out is None else out
    in_vectors = I * w_OI.itemsize % ALIGNED == 0
    w_OI, x_1I = (in_rows(operand, in_vectors) for operand in (w_OI, x_1I))
    y = y_1O if y_1O.flags.c_contiguous else cupy.empty((1, O), y_1O.dtype)
    # More warps a row where rows are few, so that enough of w is under way. By the shape alone: it is part of the bits.
    warps = 1 if O >= 1 << 14 else 2 if O >= 1 << 13 else 4
    launch(gemv(w_OI.dtype, warps, in_vectors, y.dtype == w_OI.dtype), -(-O * warps // (4 * ROWS)), 128,
           (w_OI, x_1I, y, np.int32(O), np.int32(I), np.int64(w_OI.strides[0] // w_OI.itemsize)))
    if y is not y_1O:
        y_1O[...] = y
    return y_1O


@lru_cache(maxsize=None)
def gemv(dtype, warps, in_vectors, rounded):
    return kernel(GEMV, "gemv", dtype, (f"-DWARPS={warps}", f"-DROWS={ROWS}", f"-DVECTORS={int(in_vectors)}",
                                        *(("-DY=T", "-DROUND_Y=down") if rounded else ("-DY=A", "-DROUND_Y="))))


def in_rows(x, in_vectors):
    """x, or a copy where its rows have gaps inside or, to be read in vectors, are not aligned."""
    if x.flags.c_contiguous and (not in_vectors or x.data.ptr % ALIGNED == 0):
        return x
    return aligned(x) if in_vectors else x if as_rows(x) else compact(x)


def product(a, b, out=None, dtype=None):
    """a @ b of two matrices of one dtype, added up in float32 (float64), to `out` or a new array of `dtype` (a's)."""
    (m, k), n = a.shape, b.shape[1]
    result = cupy.empty((m, n), a.dtype if dtype is None else dtype) if out is None else out
    if not (m and n and k):
        result.fill(0)
        return result
    c = result if as_rows(result) and in_place(result, n) else cupy.empty((m, n), result.dtype)
    (b, b_turned, b_pitch), (a, a_turned, a_pitch) = operand(b), operand(a)
    computed = sum_dtype(a.dtype).name
    # Row by row, c = a b is column by column c^T = b^T a^T, which is what cuBLAS reads.
    cublas.gemmEx(device.get_cublas_handle(), b_turned, a_turned, n, m, k, ONE[computed],
                  b.data.ptr, CUDA_R[b.dtype.name], b_pitch, a.data.ptr, CUDA_R[a.dtype.name], a_pitch,
                  ZERO[computed], c.data.ptr, CUDA_R[c.dtype.name], pitch_of(c),
                  cublas.CUBLAS_COMPUTE_64F if computed == "float64" else cublas.CUBLAS_COMPUTE_32F,
                  cublas.CUBLAS_GEMM_DEFAULT)
    if c is not result:
        result[...] = c
    return result


def batched_product(a_Gmk, b_Gkn, out=None, dtype=None):
    """a[g] @ b[g] for each g: `product` of a stack."""
    (G, m, k), n = a_Gmk.shape, b_Gkn.shape[2]
    c = cupy.empty((G, m, n), a_Gmk.dtype if dtype is None else dtype) if out is None else out
    if not c.size or not k:
        c.fill(0)
        return c
    a, b = (stacked(x) for x in (a_Gmk, b_Gkn))
    computed = sum_dtype(a.dtype).name
    (_, b_turned, b_pitch), (_, a_turned, a_pitch) = (layout(x[0]) for x in (b, a))
    cublas.gemmStridedBatchedEx(
        device.get_cublas_handle(), b_turned, a_turned, n, m, k, ONE[computed],
        b.data.ptr, CUDA_R[b.dtype.name], b_pitch, b.strides[0] // b.itemsize,
        a.data.ptr, CUDA_R[a.dtype.name], a_pitch, a.strides[0] // a.itemsize,
        ZERO[computed], c.data.ptr, CUDA_R[c.dtype.name], n, m * n, G,
        cublas.CUBLAS_COMPUTE_64F if computed == "float64" else cublas.CUBLAS_COMPUTE_32F, cublas.CUBLAS_GEMM_DEFAULT)
    return c


def add_bias(y_NO, b_O):
    """y += b, one pass in vectors."""
    if not y_NO.flags.c_contiguous:
        y_NO += b_O
        return
    activation_forward("identity", y_NO, out=y_NO, bias=b_O)


def bias_backward(dy_NO, out=None):
    """The sum of dy over the rows (O,), in float32 for 16-bit dy."""
    return column_sum(dy_NO, out=out)


# --- how operands lie ------------------------------------------------------------------------------------------

def operand(x):
    """x, or a compact copy, as cuBLAS takes it: (array, transposed or not, pitch)."""
    if as_rows(x):
        x = x if in_place(x, x.shape[1]) else compact(x)
    elif as_rows(x.T):
        x = x if in_place(x.T, x.shape[0]) else compact(x.T).T
    else:
        x = compact(x)
    return layout(x)


def layout(x):
    """x, whether its columns lie one after the other, and how many numbers apart."""
    if as_rows(x):
        return x, cublas.CUBLAS_OP_N, pitch_of(x)
    return x, cublas.CUBLAS_OP_T, pitch_of(x.T)


def as_rows(x):
    """Whether rows of x have no gaps inside."""
    rows, columns = x.shape
    return (columns == 1 or x.strides[1] == x.itemsize) and (rows == 1 or x.strides[0] >= columns * x.itemsize)


def pitch_of(x):
    return x.shape[1] if len(x) == 1 else x.strides[0] // x.itemsize


def in_place(x, length):
    """Whether cuBLAS would read the rows of x, of that length, as it would those of a compact copy."""
    if length * x.itemsize % ALIGNED == 0:
        return x.data.ptr % ALIGNED == 0 and (len(x) == 1 or x.strides[0] % ALIGNED == 0)
    return x.data.ptr % ALIGNED == 0 and (len(x) == 1 or x.strides[0] == length * x.itemsize)


def aligned(x):
    return x if as_rows(x) and in_place(x, x.shape[1]) else compact(x)


def compact(x):
    return x.copy(order="C")


def stacked(x):
    """x (G, rows, columns) if each matrix lies as cuBLAS takes it, else a compact copy."""
    one = x[0]
    rows = one if as_rows(one) else one.T if as_rows(one.T) else None
    if rows is None or not in_place(rows, rows.shape[1]) or len(x) > 1 and x.strides[0] % ALIGNED:
        if rows is not None and rows.shape[1] * x.itemsize % ALIGNED and x.flags.c_contiguous:
            return x
        return compact(x)
    return x
