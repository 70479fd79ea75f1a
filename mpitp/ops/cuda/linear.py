"""y = x w^T on the GPU: cuBLAS for many rows, a kernel of our own for one.

cuBLAS chooses its kernel by shapes, gaps and alignment. A block is a slice of its rank's array, whose gaps and
alignment depend on the number of ranks: operands that the hardware would read otherwise are made compact first.

Dimension key: N rows (tokens), I in features, O out features.
"""
import cupy
import numpy as np
from cupy.cuda import cublas, device

from ...arrays import sum_dtype
from .kernel import kernel, launch
from .sums import column_sum

ALIGNED = 16        # bytes that one instruction reads
CUDA_R = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}         # cudaDataType of library_types.h
SCALARS = {(value, name): np.array(value, name) for value in (1, 0) for name in ("float32", "float64")}
ONE, ZERO = ({name: SCALARS[value, name].ctypes.data for name in ("float32", "float64")} for value in (1, 0))
GEMV = r"""
// y[o] = sum over i of w[o, i] x[i], WARPS warps of a row; 16 bytes of w at a time, in the same order without VECTORS.
struct alignas(16) Vector { T at[16 / sizeof(T)]; };
extern "C" __global__ void gemv(const T* w, const T* x, Y* y, int O, int I, long long pitch) {
    const int V = 16 / sizeof(T), warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int o = blockIdx.x * (blockDim.x / 32 / WARPS) + warp / WARPS, part = (warp % WARPS) * 32 + lane;
    A sum = 0;
    if (o < O) {
        const T* row = w + o * pitch;
        #pragma unroll 4
        for (int i = part * V; i < I; i += WARPS * 32 * V) {
#if VECTORS
            Vector a = *(const Vector*)(row + i), b = *(const Vector*)(x + i);
            #pragma unroll
            for (int v = 0; v < V; v++) sum += up(a.at[v]) * up(b.at[v]);
#else
            for (int v = 0; v < V && i + v < I; v++) sum += up(row[i + v]) * up(x[i + v]);
#endif
        }
    }
    sum = warp_sum(sum);
#if WARPS > 1
    __shared__ A of_warps[32];
    if (!lane) of_warps[warp] = sum;
    __syncthreads();
    if (warp % WARPS == 0)
        for (int other = 1; other < WARPS; other++) sum += of_warps[warp + other];
#endif
    if (o < O && !lane && warp % WARPS == 0) y[o] = ROUND_Y(sum);
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
    w_OI, x_1I = (aligned(operand) if in_vectors else operand for operand in (w_OI, x_1I))
    if w_OI.strides[1] != w_OI.itemsize and I > 1 or x_1I.strides[1] != x_1I.itemsize and I > 1:
        w_OI, x_1I = cupy.ascontiguousarray(w_OI), cupy.ascontiguousarray(x_1I)
    y = y_1O if y_1O.strides[1] == y_1O.itemsize or O == 1 else cupy.empty_like(y_1O)
    # More warps a row where rows are few, so that enough of w is under way. By the shape alone: it is part of the bits.
    warps = 1 if O >= 1 << 14 else 2 if O >= 1 << 13 else 4
    rounded = ("-DY=T", "-DROUND_Y=down") if y.dtype == w_OI.dtype else ("-DY=A", "-DROUND_Y=")
    gemv = kernel(GEMV, "gemv", w_OI.dtype, (f"-DWARPS={warps}", f"-DVECTORS={int(in_vectors)}", *rounded))
    launch(gemv, -(-O * warps // 4), 128,
           (w_OI, x_1I, y, np.int32(O), np.int32(I), np.int64(w_OI.strides[0] // w_OI.itemsize)))
    if y is not y_1O:
        y_1O[...] = y
    return y_1O


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
