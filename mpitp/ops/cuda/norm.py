"""Norms on the GPU: one block of threads a row, one pass to read it and one to write.

Dimension key: N rows, K features.
"""
import cupy
import numpy as np

from ...arrays import DeviceArray, sum_dtype
from ...errors import InputError
from ..norm import KINDS
from .kernel import kernel, launch, threads_for
from .sums import column_sum

MOST_EACH = 8       # numbers of a row that a thread of norm_forward keeps
FORWARD = r"""
// xhat = (x - mean) rstd, y = xhat g + b: the mean first, then the squares of what is left, as the NumPy does.
extern "C" __global__ void norm_forward(const T* x, const T* w, const T* b, T* xhat, A* rstd, T* y, int K, A epsilon,
                                        int layernorm, int zero_centered, int has_bias) {
    const long long row = (long long)blockIdx.x * K;
    A mean = 0, squares = 0;
#if EACH                                                        // numbers of a thread: all are read once, at the start
    A value[EACH], weight[EACH], bias[EACH];
    #pragma unroll
    for (int m = 0; m < EACH; m++) {
        const int k = threadIdx.x + m * blockDim.x;
        value[m] = k < K ? up(x[row + k]) : (A)0;
        weight[m] = k < K ? up(w[k]) : (A)0;
        bias[m] = k < K && has_bias ? up(b[k]) : (A)0;
    }
#define TIMES EACH
#define X value[m]
#define W weight[m]
#define B bias[m]
#else
#define TIMES (K + (int)blockDim.x - 1) / (int)blockDim.x
#define X up(x[row + k])
#define W up(w[k])
#define B (has_bias ? up(b[k]) : (A)0)
#endif
    if (layernorm) {
        #pragma unroll
        for (int m = 0; m < TIMES; m++) {
            const int k = threadIdx.x + m * blockDim.x;
            if (k < K) mean += X;
        }
        mean = block_sum(mean) / K;
    }
    #pragma unroll
    for (int m = 0; m < TIMES; m++) {
        const int k = threadIdx.x + m * blockDim.x;
        const A d = k < K ? X - mean : (A)0;
        squares += d * d;
    }
    A r = 1 / sqrt(block_sum(squares) / K + epsilon);
    if (r == 0) r /= r;                                         // squares that overflow: NaN, which is seen later
    if (!threadIdx.x) rstd[blockIdx.x] = r;
    #pragma unroll
    for (int m = 0; m < TIMES; m++) {
        const int k = threadIdx.x + m * blockDim.x;
        if (k >= K) continue;
        const A hat = (X - mean) * r, g = W + (zero_centered ? 1 : 0);
        xhat[row + k] = down(hat);
        y[row + k] = down(hat * g + B);
    }
}"""
BACKWARD = r"""
// dx = rstd (dyg - mean(dyg) - xhat mean(dyg xhat)), dyg = dy g
extern "C" __global__ void norm_backward(const T* dy, const T* xhat, const A* rstd, const T* w, T* dx, int K,
                                         int layernorm, int zero_centered) {
    const long long row = (long long)blockIdx.x * K;
    A sum = 0, dot = 0;
    for (int k = threadIdx.x; k < K; k += blockDim.x) {
        A d = up(dy[row + k]) * (up(w[k]) + (zero_centered ? 1 : 0));
        sum += d;
        dot += d * up(xhat[row + k]);
    }
    dot = block_sum(dot) / K;
    sum = layernorm ? block_sum(sum) / K : (A)0;
    for (int k = threadIdx.x; k < K; k += blockDim.x) {
        A d = up(dy[row + k]) * (up(w[k]) + (zero_centered ? 1 : 0));
        dx[row + k] = down((d - sum - up(xhat[row + k]) * dot) * rstd[blockIdx.x]);
    }
}"""


def norm_forward(x: DeviceArray, w: DeviceArray, b: DeviceArray | None, kind: str, epsilon: float,
                 zero_centered: bool = False) -> tuple[DeviceArray, tuple]:
    """Compute as mpitp.ops.norm.norm_forward, computed in float32 for 16-bit x."""
    if kind not in KINDS:
        raise InputError(f"found norm kind {kind!r}, expected one of {', '.join(KINDS)}")
    K = x.shape[-1]
    x_NK = cupy.ascontiguousarray(x).reshape(-1, K)
    y_NK, xhat_NK = cupy.ndarray(x_NK.shape, x.dtype), cupy.ndarray(x_NK.shape, x.dtype)
    rstd_N1 = cupy.ndarray((len(x_NK), 1), sum_dtype(x.dtype))
    threads = threads_for(K)
    each = -(-K // threads) if MOST_EACH * threads >= K else 0
    launch(kernel(FORWARD, "norm_forward", x.dtype, (f"-DEACH={each}",)), len(x_NK) if K else 0, threads,
           (x_NK, w, w if b is None else b, xhat_NK, rstd_N1, y_NK, np.int32(K), sum_dtype(x.dtype).type(epsilon),
            np.int32(kind == "layernorm"), np.int32(zero_centered), np.int32(b is not None)))
    return y_NK.reshape(x.shape), (xhat_NK, rstd_N1, w, kind, zero_centered, b is not None)


def norm_backward(dy: DeviceArray, saved: tuple, dw_out: DeviceArray | None = None,
                  db_out: DeviceArray | None = None) -> tuple[DeviceArray, DeviceArray, DeviceArray | None]:
    """Compute as mpitp.ops.norm.norm_backward; dw and db in float32 for 16-bit dy."""
    xhat_NK, rstd_N1, w, kind, zero_centered, has_bias = saved
    K = dy.shape[-1]
    dy_NK = cupy.ascontiguousarray(dy).reshape(-1, K)
    dx_NK = cupy.ndarray(dy_NK.shape, dy.dtype)
    launch(kernel(BACKWARD, "norm_backward", dy.dtype), len(dy_NK) if K else 0, threads_for(K),
           (dy_NK, xhat_NK, rstd_N1, w, dx_NK, np.int32(K), np.int32(kind == "layernorm"), np.int32(zero_centered)))
    dw_K = column_sum(dy_NK, xhat_NK, out=dw_out)
    db_K = column_sum(dy_NK, out=db_out) if has_bias else None
    return dx_NK.reshape(dy.shape), dw_K, db_K
