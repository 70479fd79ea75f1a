"""Cross entropy on the GPU: one block of threads a row, nothing as large as the logits but their gradient.

Dimension key: N rows (tokens), V these columns.
"""
import cupy
import numpy as np

from ...arrays import DeviceArray, sum_dtype
from .kernel import kernel, launch, threads_for

SOURCE = r"""
extern "C" __global__ void row_maximum(const T* z, A* out, int V, long long pitch) {
    A best = -1 / (A)0;
    for (int v = threadIdx.x; v < V; v += blockDim.x) {
        A x = up(z[blockIdx.x * pitch + v]);
        best = (x > best || x != x) ? x : best;
    }
    best = block_max(best);
    if (!threadIdx.x) out[blockIdx.x] = best;
}
extern "C" __global__ void row_sums(const T* z, const A* top, const long long* targets, A* sums, int N, int V,
                                    long long pitch, int with_sum) {
    const T* row = z + blockIdx.x * pitch;
    const A most = top[blockIdx.x];
    A exponentials = 0, sum = 0;
    for (int v = threadIdx.x; v < V; v += blockDim.x) {
        A x = up(row[v]) - most;
        exponentials += exp(x);
        sum += x;
    }
    exponentials = block_sum(exponentials);
    if (with_sum) sum = block_sum(sum);
    if (!threadIdx.x) {
        const long long t = targets[blockIdx.x];
        sums[blockIdx.x] = exponentials;
        sums[N + blockIdx.x] = t >= 0 && t < V ? up(row[t]) - most : (A)0;
        if (with_sum) sums[2 * N + blockIdx.x] = sum;
    }
}
extern "C" __global__ void row_gradient(const T* z, const A* top, const long long* targets, const A* factor,
                                        const A* at_target, const A* everywhere, T* out, int V, long long pitch,
                                        long long out_pitch) {
    const T* row = z + blockIdx.x * pitch;
    T* d = out + blockIdx.x * out_pitch;
    const A most = top[blockIdx.x], f = factor[blockIdx.x], e = everywhere ? everywhere[blockIdx.x] : (A)0;
    const A own = at_target[blockIdx.x];
    const bool counts = f != 0 || own != 0 || e != 0;       // 0 times NaN would not be 0
    const long long t = targets[blockIdx.x];
    for (int v = threadIdx.x; v < V; v += blockDim.x)
        d[v] = counts ? down(f * exp(up(row[v]) - most) - e - (v == t ? own : (A)0)) : down(0);
}"""


def row_maximum(z_NV: DeviceArray) -> DeviceArray:
    """Compute as mpitp.ops.cross_entropy.row_maximum, in float32 for 16-bit logits. A NaN stays."""
    N, V = z_NV.shape
    out_N = cupy.empty(N, sum_dtype(z_NV.dtype))
    launch(kernel(SOURCE, "row_maximum", z_NV.dtype), N, threads_for(V), (z_NV, out_N, np.int32(V), pitch(z_NV)))
    return out_N


def row_sums(z_NV: DeviceArray, max_N: DeviceArray, targets_N: DeviceArray, with_sum: bool) -> DeviceArray:
    """Compute as mpitp.ops.cross_entropy.row_sums, in float32 for 16-bit logits."""
    N, V = z_NV.shape
    sums = cupy.empty((3 if with_sum else 2, N), sum_dtype(z_NV.dtype))
    launch(kernel(SOURCE, "row_sums", z_NV.dtype), N, threads_for(V),
           (z_NV, max_N, targets_N, sums, np.int32(N), np.int32(V), pitch(z_NV), np.int32(with_sum)))
    return sums


def row_gradient(z_NV: DeviceArray, max_N: DeviceArray, targets_N: DeviceArray, factor_N: DeviceArray,
                 at_target_N: DeviceArray, everywhere_N: DeviceArray | None, out: DeviceArray) -> DeviceArray:
    """Compute as mpitp.ops.cross_entropy.row_gradient."""
    N, V = z_NV.shape
    launch(kernel(SOURCE, "row_gradient", z_NV.dtype), N if V else 0, threads_for(V),
           (z_NV, max_N, targets_N, factor_N, at_target_N, np.uint64(0) if everywhere_N is None else everywhere_N,
            out, np.int32(V), pitch(z_NV), pitch(out)))
    return out


def pitch(x: DeviceArray) -> np.int64:
    """Count the numbers from one row to the next; inside a row there is no gap."""
    return np.int64(x.strides[0] // x.itemsize)
