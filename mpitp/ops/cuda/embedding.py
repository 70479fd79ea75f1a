"""Lookup in a table of rows on the GPU, and its gradient: sorted by row and added segment by segment, no atomics.

Dimension key: N tokens, H features.
"""
import cupy
import numpy as np

from ...arrays import DeviceArray, sum_dtype
from .kernel import kernel, launch, threads_for

SOURCE = r"""
extern "C" __global__ void lookup(const T* w, const long long* ids, T* y, long long rows, int H) {
    const long long id = ids[blockIdx.x];
    const bool mine = id >= 0 && id < rows;
    for (int h = threadIdx.x; h < H; h += blockDim.x)
        y[(long long)blockIdx.x * H + h] = mine ? w[id * H + h] : (T)0;
}
// The first token of each row in sorted order adds up those of its row, which follow it in the order of the batch.
extern "C" __global__ void add_segments(const T* d, const long long* sorted, const long long* order, A* dw,
                                        long long rows, int N, int H) {
    const long long row = sorted[blockIdx.x];
    if (row < 0 || row >= rows || (blockIdx.x && sorted[blockIdx.x - 1] == row)) return;
    for (int h = threadIdx.x; h < H; h += blockDim.x) {
        A sum = 0;
        for (int n = blockIdx.x; n < N && sorted[n] == row; n++) sum += up(d[order[n] * H + h]);
        dw[row * H + h] = sum;
    }
}"""


def embedding_forward(w_RH: DeviceArray, ids_N: DeviceArray) -> DeviceArray:
    """Compute as mpitp.ops.embedding.embedding_forward."""
    (rows, H), N = w_RH.shape, len(ids_N)
    y_NH = cupy.empty((N, H), w_RH.dtype)
    launch(kernel(SOURCE, "lookup", w_RH.dtype), N, threads_for(H), (w_RH, ids_N, y_NH, np.int64(rows), np.int32(H)))
    return y_NH


def embedding_backward(d_NH: DeviceArray, ids_N: DeviceArray, rows: int, out: DeviceArray | None = None) -> DeviceArray:
    """Compute as mpitp.ops.embedding.embedding_backward; in float32 for 16-bit d."""
    N, H = d_NH.shape
    dw_RH = cupy.empty((rows, H), sum_dtype(d_NH.dtype)) if out is None else out
    dw_RH.fill(0)
    if N and rows:
        order_N = stable_argsort(ids_N)
        launch(kernel(SOURCE, "add_segments", d_NH.dtype), N, threads_for(H),
               (cupy.ascontiguousarray(d_NH), ids_N[order_N], order_N, dw_RH, np.int64(rows), np.int32(N), np.int32(H)))
    return dw_RH


def stable_argsort(ids_N: DeviceArray) -> DeviceArray:
    """Sort the ids, equal ones in the order that they had, which CuPy's argsort does not promise; return the order."""
    N = len(ids_N)
    return cupy.argsort(ids_N * N + cupy.arange(N)).astype(np.int64)
