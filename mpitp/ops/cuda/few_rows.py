"""y = x w^T of one row, or a few, on the GPU: what it costs is reading w once.

Kernels of our own, since they can be recorded as a graph, where CuPy refuses cuBLAS, and since cuBLAS takes up to twice
the time of the reading for 2 to 16 rows of float32. Which thread adds what does not depend on the number of rows.

Dimension key: N rows (tokens), I in features, O out features.
"""
from functools import cache
from typing import Any

import cupy
import numpy as np
from numpy.typing import DTypeLike

from ...arrays import DeviceArray
from .kernel import ALIGNED, kernel, launch

WARPS = 8           # of a block of few_rows
MOST = 16           # rows of x, of float32: of 16 and 64 bits cuBLAS reads w as fast
GEMV = r"""
// y[o] = sum over i of w[o, i] x[i], WARPS warps for ROWS rows, for which x is read once; 16 bytes of w at a time.
// Which thread adds what of a row, and so its bits, depends on WARPS alone. gridDim.y: matrices, each with its y.
struct alignas(16) Vector { T at[16 / sizeof(T)]; };
extern "C" __global__ void gemv(const T* w_0, const T* w_1, const T* x, Y* y, int O, int I, long long pitch) {
    const int V = 16 / sizeof(T), warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int o = (blockIdx.x * (4 / WARPS) + warp / WARPS) * ROWS, part = (warp % WARPS) * 32 + lane;
    const T* w = blockIdx.y ? w_1 : w_0;
    y += blockIdx.y * O;
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
FEW = r"""
// y[n, o] = sum over i of w[o, i] x[n, i]: a warp for R rows of w, a lane 4 numbers of each. x goes through shared
// memory, CHUNK columns at a time, the next ones of which are under way while these are used; so are those of w.
struct alignas(16) Vector { float at[4]; };
__device__ void copy_to_shared(Vector* to, const float* from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"((unsigned)__cvta_generic_to_shared(to)), "l"(from));
#else
    *to = *(const Vector*)from;
#endif
}
__device__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
    __syncthreads();
}
__device__ void fetch(Vector (*part)[CHUNK / 4], const float* x, int N, int I, long long x_pitch, int start) {
    for (int j = threadIdx.x; j < NR * (CHUNK / 4); j += 32 * WARPS) {
        const int n = j / (CHUNK / 4), i = j % (CHUNK / 4);
        if (start + 4 * i < I) copy_to_shared(&part[n][i], x + min(n, N - 1) * x_pitch + start + 4 * i);
    }
}
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) few_rows(
        const float* w, const float* x, float* y, int N, int O, int I, long long pitch, long long x_pitch,
        long long y_pitch) {
    __shared__ Vector part[2][NR][CHUNK / 4];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, o = (blockIdx.x * WARPS + warp) * R;
    const float* row[R];
    float sum[R][NR] = {};
    Vector next[R], a[R];
    fetch(part[0], x, N, I, x_pitch, 0);
    #pragma unroll
    for (int r = 0; r < R; r++) {
        row[r] = w + min(o + r, O - 1) * pitch + lane * 4;
        if (lane * 4 < I) next[r] = *(const Vector*)row[r];
    }
    wait_for_copies();
    for (int start = 0, now = 0; start < I; start += CHUNK, now ^= 1) {
        if (start + CHUNK < I) fetch(part[now ^ 1], x, N, I, x_pitch, start + CHUNK);
        for (int i = 0; i < CHUNK && start + i + lane * 4 < I; i += 128) {
            #pragma unroll
            for (int r = 0; r < R; r++) {
                a[r] = next[r];
                if (start + i + 128 + lane * 4 < I) next[r] = *(const Vector*)(row[r] + start + i + 128);
            }
            #pragma unroll
            for (int n = 0; n < NR; n++) {
                const Vector b = part[now][n][i / 4 + lane];
                #pragma unroll
                for (int r = 0; r < R; r++)
                    #pragma unroll
                    for (int v = 0; v < 4; v++) sum[r][n] += a[r].at[v] * b.at[v];
            }
        }
        wait_for_copies();
    }
    #pragma unroll
    for (int n = 0; n < NR; n++)
        #pragma unroll
        for (int r = 0; r < R; r++) {
            const float total = warp_sum(sum[r][n]);
            if (!lane && n < N && o + r < O) y[n * y_pitch + o + r] = total;
        }
}
"""


def one_row(x_1I: DeviceArray, w_OI: DeviceArray, out: DeviceArray | None = None,
            dtype: DTypeLike | None = None) -> DeviceArray:
    """Compute y = x w^T of one row, to `out` or a new array of `dtype` (x's)."""
    y_1O = cupy.ndarray((1, len(w_OI)), x_1I.dtype if dtype is None else dtype) if out is None else out
    w_OI = in_rows(w_OI)
    y = y_1O if y_1O.flags.c_contiguous else cupy.empty(y_1O.shape, y_1O.dtype)
    start_gemv(in_rows(x_1I), (w_OI, w_OI), y)
    if y is not y_1O:
        y_1O[...] = y
    return y_1O


def one_row_of_two(x_1I: DeviceArray, v_OI: DeviceArray, w_OI: DeviceArray) -> DeviceArray:
    """Compute x v^T and x w^T (2, 1, O) by one kernel, with the bits of one_row; v and w as in_rows returns them."""
    y_21O = cupy.ndarray((2, 1, len(w_OI)), x_1I.dtype)
    start_gemv(in_rows(x_1I), (v_OI, w_OI), y_21O)
    return y_21O


def start_gemv(x_1I: DeviceArray, matrices: tuple[DeviceArray, DeviceArray], y: DeviceArray) -> None:
    """Start the kernel of one row for as many of the matrices as y has rows for; both have the same layout."""
    O, I = matrices[0].shape
    pitch = matrices[0].strides[0] // x_1I.itemsize
    # More warps a row where rows are few, so that enough of w is under way. By the shape alone: it is part of the bits.
    warps = 1 if O >= 1 << 14 else 4
    rows = 4 if 1 << 12 <= O < 1 << 14 else 2
    function = gemv(x_1I.dtype, warps, rows, I * x_1I.itemsize % ALIGNED == 0, y.dtype == x_1I.dtype)
    function((-(-O * warps // (4 * rows)), y.size // O), (128,),
             (*matrices, x_1I, y, np.int32(O), np.int32(I), np.int64(pitch)))


@cache
def gemv(dtype: np.dtype, warps: int, rows: int, in_vectors: bool, rounded: bool) -> Any:
    """Find the kernel of one row; `rounded`: y has the dtype of w, not that of sums."""
    return kernel(GEMV, "gemv", dtype, (f"-DWARPS={warps}", f"-DROWS={rows}", f"-DVECTORS={int(in_vectors)}",
                                        *(("-DY=T", "-DROUND_Y=down") if rounded else ("-DY=A", "-DROUND_Y="))))


def takes(x_NI: DeviceArray, w_OI: DeviceArray) -> bool:
    """Return whether few_rows is for these: up to MOST rows of float32, which are read in vectors."""
    return len(x_NI) <= MOST and w_OI.dtype == np.float32 and w_OI.size > 0 and w_OI.shape[1] % 4 == 0


def few_rows(x_NI: DeviceArray, w_OI: DeviceArray, out: DeviceArray | None = None) -> DeviceArray:
    """Compute y = x w^T of a few rows, to `out` or a new array."""
    (N, I), O = x_NI.shape, len(w_OI)
    y_NO = cupy.empty((N, O), np.float32) if out is None else out
    if N:
        w_OI, x_NI = in_rows(w_OI), in_rows(x_NI)
        y = y_NO if y_NO.strides[1] == 4 else cupy.empty((N, O), np.float32)
        # Fewer rows of w a warp where there are few: all multiprocessors should have some. Not part of the bits.
        rows = 4 if O >= 1 << 13 else 2 if O >= 1 << 11 else 1
        launch(few(1 << (N - 1).bit_length(), rows), -(-O // (WARPS * rows)), 32 * WARPS,
               (w_OI, x_NI, y, np.int32(N), np.int32(O), np.int32(I),
                *(np.int64(array.strides[0] // 4) for array in (w_OI, x_NI, y))))
        if y is not y_NO:
            y_NO[...] = y
    return y_NO


@cache
def few(padded: int, rows: int) -> Any:
    """Find the kernel of up to `padded` rows of x, which takes `rows` rows of w a warp."""
    chunk = 512 if padded <= 8 else 256                     # 2 x padded x chunk numbers of shared memory
    return kernel(FEW, "few_rows", np.dtype(np.float32),
                  (f"-DNR={padded}", f"-DR={rows}", f"-DWARPS={WARPS}", f"-DCHUNK={chunk}"))


def in_rows(x: DeviceArray) -> DeviceArray:
    """Return x, or a copy where its rows have gaps inside or, to be read in vectors, are not aligned."""
    gap, step = x.strides
    whole = x.shape[1] * x.itemsize % ALIGNED       # then rows are read number by number
    good = step == x.itemsize and (whole or not (x.data.ptr | (gap if len(x) > 1 else 0)) % ALIGNED)
    return x if good else x.copy(order="C")
