"""The largest logit and its token on the GPU: one block of threads a sequence, then one thread.

Dimension key: P ranks, B sequences, V logits of a rank.
"""
import cupy
import numpy as np

from ...arrays import DeviceArray
from .kernel import INFINITY, kernel, launch

OF_RANK = rf"""
#define INF ((A){INFINITY})
""" + r"""
// Whether the number x in column i comes before y in column j: a larger one, a NaN before all, of equal ones the first.
__device__ bool before(A x, int i, A y, int j) {
    if (x != x || y != y) return x != x && (y == y || i < j);
    return x > y || (x == y && i < j);
}
// found[b] = (the largest of x[b], its column + first)
extern "C" __global__ void greatest_of_rank(const T* x, double* found, int V, long long pitch, long long first) {
    __shared__ A of_warps[32];
    __shared__ int columns[32];
    const int NO_COLUMN = 0x7fffffff, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    A most = -INF;
    int column = NO_COLUMN;
    x += blockIdx.x * pitch;
    #pragma unroll 8
    for (int i = threadIdx.x; i < V; i += blockDim.x) {
        const A y = up(x[i]);
        if (before(y, i, most, column)) { most = y; column = i; }
    }
    for (int round = 0; round < 2; round++) {               // within warps, then over the warps
        for (int other = 16; other; other >>= 1) {
            const A y = __shfl_xor_sync(0xffffffff, most, other);
            const int i = __shfl_xor_sync(0xffffffff, column, other);
            if (before(y, i, most, column)) { most = y; column = i; }
        }
        if (round) break;
        if (!lane) { of_warps[warp] = most; columns[warp] = column; }
        __syncthreads();
        most = lane < blockDim.x >> 5 ? of_warps[lane] : -INF;
        column = lane < blockDim.x >> 5 ? columns[lane] : NO_COLUMN;
    }
    if (!threadIdx.x) {
        found[2 * blockIdx.x] = most;
        found[2 * blockIdx.x + 1] = column == NO_COLUMN ? 0 : column + first;
    }
}"""
OF_RANKS = r"""
// ids[b] = the id of the largest of found[p, b] = (logit, id), of equal ones the first; -1 where it is not finite
extern "C" __global__ void greatest_of_ranks(const double* found, long long* ids, int P, int B) {
    for (int b = threadIdx.x; b < B; b += blockDim.x) {
        double most = found[2 * b], id = found[2 * b + 1];
        for (int p = 1; p < P; p++) {
            const double other = found[2 * (p * B + b)];
            if (most == most && (other > most || other != other)) { most = other; id = found[2 * (p * B + b) + 1]; }
        }
        ids[b] = most - most == 0 ? (long long)id : -1;
    }
}"""


def greatest_of_rank(logits_BV: DeviceArray, first: int) -> DeviceArray:
    """Compute as mpitp.ops.greatest.greatest_of_rank."""
    B, V = logits_BV.shape
    if V > 1 and logits_BV.strides[1] != logits_BV.itemsize:
        logits_BV = cupy.ascontiguousarray(logits_BV)
    found_B2 = cupy.ndarray((B, 2), np.float64)
    launch(kernel(OF_RANK, "greatest_of_rank", logits_BV.dtype), B, 1024,
           (logits_BV, found_B2, np.int32(V), np.int64(logits_BV.strides[0] // logits_BV.itemsize), np.int64(first)))
    return found_B2


def greatest_of_ranks(found_PB2: DeviceArray) -> DeviceArray:
    """Compute as mpitp.ops.greatest.greatest_of_ranks."""
    P, B, _ = found_PB2.shape
    ids_B = cupy.ndarray((B,), np.int64)
    launch(kernel(OF_RANKS, "greatest_of_ranks", np.dtype(np.float64)), 1 if B else 0, 32,
           (cupy.ascontiguousarray(found_PB2), ids_B, np.int32(P), np.int32(B)))
    return ids_B
