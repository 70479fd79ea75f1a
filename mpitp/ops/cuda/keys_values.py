"""Keys and values on the GPU, whose lengths are there too: what a token costs is recorded once and replayed.

Attention of the newest query: each piece of the keys is one block of threads, then one block a head adds the pieces up.

Dimension key: B sequences, C capacity (positions), S new positions, G key/value heads, H query heads, K features of
a head.
"""
from typing import Any

import cupy
import numpy as np

from ...arrays import DeviceArray, sum_dtype
from ..softcap import refuse_softcap
from . import attend_vectors
from .kernel import ALIGNED, INFINITY, kernel, launch

NOTHING = np.uint64(0)      # a null pointer
PIECE = 128                 # keys; fixed, since it is part of the bits
APPEND = r"""
// held[b, starts[b] + s] = new[b, s], of keys and of values, n numbers each; a few blocks of threads a new position
extern "C" __global__ void append(T* keys, const T* new_keys, T* values, const T* new_values, const long long* starts,
                                  int S, int n, long long capacity) {
    const long long b = blockIdx.x / S, to = (b * capacity + starts[b] + blockIdx.x % S) * n;
    const long long from = blockIdx.x * (long long)n;
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < n; i += gridDim.y * blockDim.x) {
        keys[to + i] = new_keys[from + i];
        values[to + i] = new_values[from + i];
    }
}"""
DEFINED = rf"""
#define INF ((A){INFINITY})
#define PIECE {PIECE}
#define EARLY 8
"""
ATTEND = DEFINED + r"""
// Of one query head and one piece of its keys: the largest score, the sum of e^(score - largest), and that of e^... v.
extern "C" __global__ void attend(const T* q, const T* k, const T* v, const long long* starts, A* tops, A* sums,
                                  A* parts, A scale, const A* slopes, int H, int share, int K, int window,
                                  long long q_b, long long q_h, long long k_b, long long k_c, long long k_g) {
    __shared__ A s[PIECE], of_warp[8][128];
    const int head = blockIdx.x % H, b = blockIdx.x / H, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const long long length = starts[b] + 1, first = window > 0 && window < length ? length - window : 0;
    const long long from = max(first, (long long)blockIdx.y * PIECE), to = min(length, (blockIdx.y + 1LL) * PIECE);
    const int V = to - from;
    if (V <= 0) return;
    q += b * q_b + head * q_h;
    k += b * k_b + from * k_c + head / share * k_g;
    v += b * k_b + from * k_c + head / share * k_g;
    for (int j = warp * 8; j < V; j += 64) {                // a warp takes 8 keys at once
        A dot[8] = {};
        for (int i = lane; i < K; i += 32) {
            const A x = up(q[i]);
            #pragma unroll
            for (int u = 0; u < 8; u++) dot[u] += x * up(k[min(j + u, V - 1) * k_c + i]);
        }
        #pragma unroll
        for (int u = 0; u < 8; u++) {
            A score = warp_sum(dot[u]) * scale;
            if (slopes) score += slopes[head] * (A)(from + j + u - (length - 1));
            if (!lane && j + u < V) s[j + u] = score;
        }
    }
    __syncthreads();
    const A own = threadIdx.x < V ? s[threadIdx.x] : -INF, top = block_max(own);
    const A e = threadIdx.x < V ? exp(own - top) : (A)0, sum = block_sum(e);
    if (threadIdx.x < V) s[threadIdx.x] = e;
    const long long at = blockIdx.x * (long long)gridDim.y + blockIdx.y;
    if (!threadIdx.x) { tops[at] = top; sums[at] = sum; }
    for (int chunk = 0; chunk < K; chunk += 128) {          // of the features, 4 a lane
        A total[4] = {};
        __syncthreads();
        #pragma unroll 4
        for (int j = warp; j < V; j += 8)
            #pragma unroll
            for (int f = 0; f < 4; f++) {
                const int i = chunk + f * 32 + lane;
                if (i < K) total[f] += s[j] * up(v[j * k_c + i]);
            }
        for (int f = 0; f < 4; f++) of_warp[warp][f * 32 + lane] = total[f];
        __syncthreads();
        if (threadIdx.x < 128 && chunk + threadIdx.x < K) {
            A all = of_warp[0][threadIdx.x];
            for (int other = 1; other < 8; other++) all += of_warp[other][threadIdx.x];
            parts[at * K + chunk + threadIdx.x] = all;
        }
    }
}
// out = sum of the pieces' e^(top - largest top) part, over the same sum of their sums
extern "C" __global__ void add_pieces(const A* tops, const A* sums, const A* parts, const long long* starts, T* out,
                                      int H, int K, int window, int pieces, long long out_b, long long out_h) {
    __shared__ A weight[EARLY];
    const int head = blockIdx.x % H, b = blockIdx.x / H;
    const long long length = starts[b] + 1, first = window > 0 && window < length ? length - window : 0;
    const int from = first / PIECE, to = (length - 1) / PIECE + 1;
    const long long row = blockIdx.x * (long long)pieces;
    // What most calls need is read at the start: of a thread's feature, and of its piece.
    const int count = to - from;
    const bool mine = threadIdx.x < count;
    const A own_top = mine ? tops[row + from + threadIdx.x] : -INF;
    const A own_sum = mine ? sums[row + from + threadIdx.x] : (A)0;
    A early[EARLY];
    #pragma unroll
    for (int u = 0; u < EARLY; u++)
        early[u] = u < count && threadIdx.x < K ? parts[(row + from + u) * K + threadIdx.x] : (A)0;
    A top = own_top;
    for (int p = from + threadIdx.x + blockDim.x; p < to; p += blockDim.x)
        top = (tops[row + p] > top || tops[row + p] != tops[row + p]) ? tops[row + p] : top;
    top = block_max(top);
    const A own = mine ? exp(own_top - top) : (A)0;
    if (threadIdx.x < EARLY) weight[threadIdx.x] = own;
    A sum = mine ? own * own_sum : (A)0;
    for (int p = from + threadIdx.x + blockDim.x; p < to; p += blockDim.x)
        sum += exp(tops[row + p] - top) * sums[row + p];
    sum = block_sum(sum);
    for (int i = threadIdx.x; i < K; i += blockDim.x) {
        A total = 0;
        #pragma unroll
        for (int u = 0; u < EARLY; u++)
            if (u < count) total += weight[u] * (i == threadIdx.x ? early[u] : parts[(row + from + u) * K + i]);
        #pragma unroll 8
        for (int p = from + EARLY; p < to; p++) total += exp(tops[row + p] - top) * parts[(row + p) * K + i];
        out[b * out_b + head * out_h + i] = down(total / sum);
    }
}"""


def append(held_BCGK: tuple[DeviceArray, DeviceArray], new_BSGK: tuple[DeviceArray, DeviceArray],
           starts_B: DeviceArray) -> None:
    """Compute as mpitp.ops.keys_values.append, of a pair of arrays each."""
    (keys, values), (new_keys, new_values) = held_BCGK, (cupy.ascontiguousarray(new) for new in new_BSGK)
    (B, S), n = new_keys.shape[:2], new_keys.shape[2] * new_keys.shape[3]
    if B * S * n:
        kernel(APPEND, "append", keys.dtype)(
            (B * S, -(-n // 256) if B * S < 64 else 1), (256,),
            (keys, new_keys, values, new_values, starts_B, np.int32(S), np.int32(n), np.int64(keys.shape[1])))


def last_query_forward(q_BHK: DeviceArray, k_BCGK: DeviceArray, v_BCGK: DeviceArray, starts_B: DeviceArray,
                       scale: float, *, out: DeviceArray, window: int | None = None, softcap: float | None = None,
                       slopes: DeviceArray | None = None) -> None:
    """Compute as mpitp.ops.keys_values.last_query_forward. No softcap."""
    refuse_softcap(softcap)
    (B, H, K), (_, C, G, _), computed = q_BHK.shape, k_BCGK.shape, sum_dtype(q_BHK.dtype)
    if not q_BHK.size:
        return
    pieces, size = -(-C // PIECE), q_BHK.itemsize
    q_BHK = q_BHK if q_BHK.strides[2] == size else cupy.ascontiguousarray(q_BHK)
    result = out if out.strides[2] == size else cupy.ndarray(out.shape, out.dtype)
    tops, sums, parts = (cupy.ndarray((B * H, pieces, n), computed) for n in (1, 1, K))
    seen = np.int32(0 if window is None else window)
    attend_kernel(q_BHK, k_BCGK, v_BCGK)(
        (B * H, pieces), (256,),
        (q_BHK, k_BCGK, v_BCGK, starts_B, tops, sums, parts, computed.type(scale),
         NOTHING if slopes is None else cupy.ascontiguousarray(slopes, computed), np.int32(H), np.int32(H // G),
         np.int32(K), seen, *numbers(q_BHK.strides[:2], size), *numbers(k_BCGK.strides[:3], size)))
    launch(kernel(ATTEND, "add_pieces", q_BHK.dtype), B * H, min(256, -(-K // 32) * 32),
           (tops, sums, parts, starts_B, result, np.int32(H), np.int32(K), seen, np.int32(pieces),
            *numbers(result.strides[:2], size)))
    if result is not out:
        out[...] = result


def attend_kernel(q_BHK: DeviceArray, k_BCGK: DeviceArray, v_BCGK: DeviceArray) -> Any:
    """Find the kernel for pieces of the keys: the one that reads in vectors where all of them are aligned for that."""
    lanes, rest = divmod(q_BHK.shape[2] * q_BHK.itemsize, ALIGNED)
    aligned = not rest and lanes in attend_vectors.VECTORS
    for x in (q_BHK, k_BCGK, v_BCGK):
        aligned = aligned and not x.data.ptr % ALIGNED and not any(stride % ALIGNED for stride in x.strides[:-1])
    if not aligned:
        return kernel(ATTEND, "attend", q_BHK.dtype)
    return kernel(DEFINED + attend_vectors.SOURCE, "attend_vectors", q_BHK.dtype, (f"-DLANES={lanes}",))


def numbers(strides: tuple[int, ...], size: int) -> list[np.int64]:
    """Count strides in numbers instead of bytes."""
    return [np.int64(stride // size) for stride in strides]
