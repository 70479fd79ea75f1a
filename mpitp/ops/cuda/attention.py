"""Softmax attention of one sequence on the GPU: cuBLAS for the products, one kernel for the softmax between them.

It works in tiles of queries, as on the CPU, so that memory grows with the sequence; the query heads that share keys go
through the products as one matrix. The number of heads in a product is part of its bits, so callers hand over the heads
of a block, whose number does not depend on the ranks.

Dimension key: G key/value heads, H query heads of each, Q queries, S keys, K features of a head; T queries of one
tile, V the keys that it sees.
"""
from collections.abc import Callable, Iterator

import cupy
import numpy as np

from ...arrays import DeviceArray, sum_dtype
from ..softcap import refuse_softcap
from .kernel import INFINITY, kernel, launch, threads_for
from .linear import product

NOTHING = np.uint64(0)  # a null pointer
Keep = Callable[[int, int], DeviceArray]        # as in mpitp/ops/attention.py
TILE = 1024             # queries; fixed, since it is part of the bits
COMMON = f"""
#define INF ((A){INFINITY})
""" + r"""
// Row blockIdx.x is query t, of `queries`, of head gh, whose statistics lie in lse[gh, first + t] of Q; V keys, the
// first of which is at position `key`.
#define RULES int queries, int V, int Q, int first, A scale, long long query, long long key, int causal, \
              long long window, const A* slopes, const bool* mask, long long mask_pitch, const A* keep
#define SCORE(s) score((s) * scale, blockIdx.x / queries, blockIdx.x % queries, v, query, key, causal, window, slopes, \
                       mask, mask_pitch)
// The score of query t of head gh for the key in column v: scaled already; biased, -inf where it may not be attended.
__device__ A score(A s, int gh, int t, int v, long long query, long long key, int causal, long long window,
                   const A* slopes, const bool* mask, long long mask_pitch) {
    const long long distance = (key + v) - (query + t);                 // key - query
    if (slopes) s += slopes[gh] * (A)distance;
    if (causal && distance > 0) return -INF;
    if (window > 0 && (distance >= window || -distance >= window)) return -INF;
    if (mask && !mask[t * mask_pitch + v]) return -INF;
    return s;
}
"""
FORWARD = COMMON + r"""
// p = e^(score - max) keep / sum, the sum without keep; s is overwritten
extern "C" __global__ void softmax(A* s, T* p, A* lse, RULES) {
    const long long row = (long long)blockIdx.x * V;
    A top = -INF, sum = 0;
    for (int v = threadIdx.x; v < V; v += blockDim.x) {
        const A x = SCORE(s[row + v]);
        s[row + v] = x;
        top = (x > top || x != x) ? x : top;
    }
    top = block_max(top);
    if (top == -INF) top = 0;                                           // nothing to attend to: e^-inf = 0
    for (int v = threadIdx.x; v < V; v += blockDim.x) {
        const A e = exponential(s[row + v] - top);
        s[row + v] = e;
        sum += e;
    }
    sum = block_sum(sum);
    if (sum == 0) sum = 1;
    if (!threadIdx.x) lse[(blockIdx.x / queries) * (long long)Q + first + blockIdx.x % queries] = log(sum) + top;
    const A part = 1 / sum;
    for (int v = threadIdx.x; v < V; v += blockDim.x) {
        const A e = s[row + v] * part;
        p[row + v] = down(keep ? e * keep[row + v] : e);
    }
}"""
BACKWARD = COMMON + r"""
#define STRIDES(x) long long x##_g, long long x##_h, long long x##_q, long long x##_k
// ds = scale p (keep dp - delta), and what dv is made with: kept = p keep, p = e^(score - lse); delta = sum(dout out)
extern "C" __global__ void softmax_backward(const A* s, const A* dp, const A* lse, const T* dout, const T* out, T* ds,
                                            T* kept, int K, int H, STRIDES(d), STRIDES(o), RULES) {
    const long long row = (long long)blockIdx.x * V;
    const int head = blockIdx.x / queries, t = first + blockIdx.x % queries;
    dout += head / H * d_g + head % H * d_h + t * d_q;
    out += head / H * o_g + head % H * o_h + t * o_q;
    A delta = 0;
    for (int k = threadIdx.x; k < K; k += blockDim.x) delta += up(dout[k * d_k]) * up(out[k * o_k]);
    delta = block_sum(delta);
    const A l = lse[head * (long long)Q + t];
    for (int v = threadIdx.x; v < V; v += blockDim.x) {
        const A p = exponential(SCORE(s[row + v]) - l), k = keep ? keep[row + v] : (A)1;
        ds[row + v] = down(scale * p * (k * dp[row + v] - delta));
        kept[row + v] = down(p * k);
    }
}"""


def attention_forward(q_GHQK: DeviceArray, k_GSK: DeviceArray, v_GSK: DeviceArray, scale: float, *, out: DeviceArray,
                      causal: bool = True, window: int | None = None, softcap: float | None = None,
                      slopes: DeviceArray | None = None, mask: DeviceArray | None = None,
                      keep: Keep | None = None) -> DeviceArray:
    """Compute as mpitp.ops.attention.attention_forward; scores and lse in float32 for 16-bit q. No softcap."""
    refuse_softcap(softcap)
    (G, H, Q, _), dtype = q_GHQK.shape, q_GHQK.dtype
    lse_GHQ = cupy.ndarray((G, H, Q), sum_dtype(dtype))
    for first, stop, seen, rules in tiles(q_GHQK, k_GSK, scale, causal, window, slopes, mask, keep):
        s_GnV = product(rows_of_heads(q_GHQK, first, stop), k_GSK[:, seen].swapaxes(1, 2), dtype=lse_GHQ.dtype)
        p_GnV = cupy.ndarray(s_GnV.shape, dtype)
        launch(kernel(FORWARD, "softmax", dtype), G * H * (stop - first), threads_for(s_GnV.shape[2]),
               (s_GnV, p_GnV, lse_GHQ, *rules))
        write_rows_of_heads(out, first, stop, p_GnV, v_GSK[:, seen])
    return lse_GHQ


def attention_backward(dout_GHQK: DeviceArray, lse_GHQ: DeviceArray, q_GHQK: DeviceArray, k_GSK: DeviceArray,
                       v_GSK: DeviceArray, out: DeviceArray, scale: float, *, dq: DeviceArray,
                       dk: DeviceArray | None = None, dv: DeviceArray | None = None, causal: bool = True,
                       window: int | None = None, softcap: float | None = None, slopes: DeviceArray | None = None,
                       mask: DeviceArray | None = None, keep: Keep | None = None) -> tuple[DeviceArray, DeviceArray]:
    """Compute as mpitp.ops.attention.attention_backward; dk and dv in float32 for 16-bit q. No softcap."""
    refuse_softcap(softcap)
    (G, H, _, K), dtype = q_GHQK.shape, q_GHQK.dtype
    computed = sum_dtype(dtype)
    dk_GSK, dv_GSK = (cupy.ndarray(k_GSK.shape, computed) if d is None else d for d in (dk, dv))
    add = False
    # The last tile first: where it sees all keys it writes dk and dv, to which the others add.
    for first, stop, seen, rules in reversed(list(tiles(q_GHQK, k_GSK, scale, causal, window, slopes, mask, keep))):
        if not add and seen != slice(0, k_GSK.shape[1]):
            dk_GSK.fill(0)
            dv_GSK.fill(0)
            add = True
        q_GnK, dout_GnK = rows_of_heads(q_GHQK, first, stop), rows_of_heads(dout_GHQK, first, stop)
        s_GnV = product(q_GnK, k_GSK[:, seen].swapaxes(1, 2), dtype=computed)
        dp_GnV = product(dout_GnK, v_GSK[:, seen].swapaxes(1, 2), dtype=computed)
        ds_GnV, kept_GnV = (cupy.ndarray(dp_GnV.shape, dtype) for _ in range(2))
        launch(kernel(BACKWARD, "softmax_backward", dtype), G * H * (stop - first), threads_for(s_GnV.shape[2]),
               (s_GnV, dp_GnV, lse_GHQ, dout_GHQK, out, ds_GnV, kept_GnV, np.int32(K), np.int32(H),
                *strides_of(dout_GHQK), *strides_of(out), *rules))
        product(kept_GnV.swapaxes(1, 2), dout_GnK, dv_GSK[:, seen], add=add)
        product(ds_GnV.swapaxes(1, 2), q_GnK, dk_GSK[:, seen], add=add)
        write_rows_of_heads(dq, first, stop, ds_GnV, k_GSK[:, seen])
        add = True
    if not add:
        dk_GSK.fill(0)
        dv_GSK.fill(0)
    return dk_GSK, dv_GSK


def rows_of_heads(x_GHQK: DeviceArray, first: int, stop: int) -> DeviceArray:
    """Put these queries of all heads of a key/value head in one matrix, (G, H T, K): a view where strides allow."""
    G, H, _, K = x_GHQK.shape
    return x_GHQK[:, :, first:stop].reshape(G, H * (stop - first), K)


def write_rows_of_heads(out_GHQK: DeviceArray, first: int, stop: int, a_GnV: DeviceArray, b_GVK: DeviceArray) -> None:
    """Compute out[:, :, first:stop] = a b, whose rows lie as in rows_of_heads; in place where strides allow."""
    part_GHTK = out_GHQK[:, :, first:stop]
    if part_GHTK.shape[1] == 1:
        product(a_GnV, b_GVK, part_GHTK[:, 0])
    else:
        part_GHTK[...] = product(a_GnV, b_GVK).reshape(part_GHTK.shape)


def strides_of(x_GHQK: DeviceArray) -> list[np.int64]:
    """Count strides in numbers instead of bytes."""
    return [np.int64(stride // x_GHQK.itemsize) for stride in x_GHQK.strides]


def tiles(q_GHQK: DeviceArray, k_GSK: DeviceArray, scale: float, causal: bool, window: int | None,
          slopes: DeviceArray | None, mask: DeviceArray | None,
          keep: Keep | None) -> Iterator[tuple[int, int, slice, tuple]]:
    """Yield the first query of each tile, the one after its last, the slice of its keys, and the arguments of RULES."""
    (G, H, Q, _), S, computed = q_GHQK.shape, k_GSK.shape[1], sum_dtype(q_GHQK.dtype)
    slopes = None if slopes is None else cupy.ascontiguousarray(slopes, computed)
    for first in range(0, Q, TILE) if G * H else ():
        stop = min(first + TILE, Q)
        start = 0 if window is None else max(0, S - Q + first - window + 1)
        seen = slice(start, S - Q + stop if causal else S)
        tile_mask, mask_pitch = None, 0
        if mask is not None:
            tile_mask = cupy.ascontiguousarray(mask[first:stop, seen] if mask.ndim == 2 else mask[seen])
            mask_pitch = seen.stop - seen.start if mask.ndim == 2 else 0
        tile_keep = None if keep is None else cupy.ascontiguousarray(keep(first, stop)[..., seen])
        yield first, stop, seen, (
            np.int32(stop - first), np.int32(seen.stop - seen.start), np.int32(Q), np.int32(first),
            computed.type(scale), np.int64(S - Q + first), np.int64(seen.start),
            np.int32(causal), np.int64(0 if window is None else window), NOTHING if slopes is None else slopes,
            NOTHING if mask is None else tile_mask, np.int64(mask_pitch), NOTHING if keep is None else tile_keep)
