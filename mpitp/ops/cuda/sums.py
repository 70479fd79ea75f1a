"""Sums over the rows of a matrix, the gradients of biases and norms, in an order that the shape alone decides.

Dimension key: N rows, K columns.
"""
import cupy
import numpy as np

from ...arrays import DeviceArray, sum_dtype
from .kernel import kernel, launch

CHUNK = 512         # rows that one block of threads adds up: 32 columns, 8 threads each
SOURCE = r"""
// part[c, k] = sum over the rows n of chunk c of x[n, k] (times y[n, k])
extern "C" __global__ void column_sum(const T* x, const T* y, A* part, int N, int K, long long pitch, int chunk) {
    __shared__ A sums[8][33];
    const int k = blockIdx.x % ((K + 31) / 32) * 32 + (threadIdx.x & 31), c = blockIdx.x / ((K + 31) / 32);
    const int group = threadIdx.x >> 5, stop = min(N, (c + 1) * chunk);
    A sum = 0;
    if (k < K)
        for (int n = c * chunk + group; n < stop; n += 8)
            sum += y ? up(x[n * pitch + k]) * up(y[(long long)n * K + k]) : up(x[n * pitch + k]);
    sums[group][threadIdx.x & 31] = sum;
    __syncthreads();
    if (group == 0 && k < K) {
        for (int other = 1; other < 8; other++) sum += sums[other][threadIdx.x & 31];
        part[(long long)c * K + k] = sum;
    }
}
extern "C" __global__ void add_parts(const A* part, A* out, int C, int K) {
    const int k = blockIdx.x * blockDim.x + threadIdx.x;
    if (k >= K) return;
    A sum = 0;
    for (int c = 0; c < C; c++) sum += part[(long long)c * K + k];
    out[k] = sum;
}"""


def column_sum(x_NK: DeviceArray, y_NK: DeviceArray | None = None, out: DeviceArray | None = None) -> DeviceArray:
    """Compute the sum over n of x[n] (times y[n]), in float32 for 16-bit x, to `out` or a new array (K,)."""
    N, K = x_NK.shape
    computed = sum_dtype(x_NK.dtype)
    out_K = cupy.empty(K, computed) if out is None else out
    if not N:
        out_K.fill(0)
        return out_K
    if x_NK.strides[1] != x_NK.itemsize and K > 1:
        x_NK = cupy.ascontiguousarray(x_NK)
    chunks, tiles = -(-N // CHUNK), -(-K // 32)
    direct = chunks == 1 and out_K.dtype == computed and out_K.flags.c_contiguous
    part_CK = out_K if direct else cupy.empty((chunks, K), computed)
    launch(kernel(SOURCE, "column_sum", x_NK.dtype), chunks * tiles, 256,
           (x_NK, np.uint64(0) if y_NK is None else y_NK, part_CK, np.int32(N), np.int32(K),
            np.int64(x_NK.strides[0] // x_NK.itemsize), np.int32(CHUNK)))
    if not direct:
        total_K = out_K if out_K.dtype == computed and out_K.flags.c_contiguous else cupy.empty(K, computed)
        launch(kernel(SOURCE, "add_parts", x_NK.dtype), -(-K // 256), 256,
               (part_CK, total_K, np.int32(chunks), np.int32(K)))
        if total_K is not out_K:
            out_K[...] = total_K
    return out_K

