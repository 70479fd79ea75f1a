"""Softmax attention of one sequence on the GPU: cuBLAS for the products, one kernel for the softmax between them.

As the NumPy, in tiles of queries, so that memory grows with the sequence; the query heads that share keys go through the
products as one matrix. The number of heads in a product is part of its bits, so callers hand over as many whatever the
number of ranks is (a block's).

Dimension key: G key/value heads, H query heads of each, Q queries, S keys, K features of a head; T queries of one
tile, V the keys that it sees.
"""
import cupy
import numpy as np

from ...arrays import sum_dtype
from .kernel import INFINITY, kernel, launch, threads_for
from .last_query import fits, last_query_forward
from .linear import batched_product

NOTHING = np.uint64(0)  # a null pointer
TILE = 512              # queries; fixed, since it is part of the bits
COMMON = f"""
#define INF ((A){INFINITY})
""" + r"""
// What hides a key, and biases its score: `queries` from position `query`, V keys from position `key`.
#define RULES int queries, int V, long long query, long long key, int causal, long long window, const A* slopes, \
              const bool* mask, long long mask_pitch, const A* keep
// The score of query t of head gh for the key in column v: scaled already, biased, -inf where it may not be attended.
#define SCORE(s) score(s, blockIdx.x / queries, blockIdx.x % queries, v, query, key, causal, window, slopes, \
                       mask, mask_pitch)
__device__ A score(A s, int gh, int t, int v, long long query, long long key, int causal, long long window,
                   const A* slopes, const bool* mask, long long mask_pitch) {
    const long long distance = (key + v) - (query + t);                 // key - query
    if (slopes) s += slopes[gh] * (A)distance;
    if (causal && distance > 0) return -INF;
    if (window > 0 && -distance >= window) return -INF;
    if (mask && !mask[t * mask_pitch + v]) return -INF;
    return s;
}
"""
FORWARD = COMMON + r"""
// p = e^(score - max) keep, rounded; the sum is that of what is not rounded yet, without keep
extern "C" __global__ void softmax(const A* s, T* p, A* sums, A* lse, RULES) {
    const long long row = (long long)blockIdx.x * V;
    A top = -INF, sum = 0;
    for (int v = threadIdx.x; v < V; v += blockDim.x) {
        A x = SCORE(s[row + v]);
        top = (x > top || x != x) ? x : top;
    }
    top = block_max(top);
    if (top == -INF) top = 0;                                           // nothing to attend to: e^-inf = 0
    for (int v = threadIdx.x; v < V; v += blockDim.x) {
        A e = exp(SCORE(s[row + v]) - top);
        sum += e;
        p[row + v] = down(keep ? e * keep[row + v] : e);
    }
    sum = block_sum(sum);
    if (sum == 0) sum = 1;
    if (!threadIdx.x) { sums[blockIdx.x] = sum; lse[blockIdx.x] = log(sum) + top; }
}"""
BACKWARD = COMMON + r"""
// ds = p (keep dp - delta), and what dv is made with: kept = p keep, p = e^(score - lse); delta = sum(dout out)
extern "C" __global__ void softmax_backward(const A* s, const A* dp, const A* lse, const A* delta, T* ds, T* kept,
                                            RULES) {
    const long long row = (long long)blockIdx.x * V;
    const A l = lse[blockIdx.x], d = delta[blockIdx.x];
    for (int v = threadIdx.x; v < V; v += blockDim.x) {
        A p = exp(SCORE(s[row + v]) - l);
        A k = keep ? keep[row + v] : (A)1;
        ds[row + v] = down(p * (k * dp[row + v] - d));
        kept[row + v] = down(p * k);
    }
}"""


def attention_forward(q_GHQK, k_GSK, v_GSK, scale, *, out, causal=True, window=None, slopes=None, mask=None, keep=None):
    """As mpitp.ops.attention.attention_forward; scores and lse in float32 for 16-bit q."""
    (G, H, Q, K), dtype = q_GHQK.shape, q_GHQK.dtype
    if fits(q_GHQK, k_GSK, v_GSK, out, mask, keep):
        return last_query_forward(q_GHQK, k_GSK, v_GSK, scale, out, window, slopes)
    lse_GHQ = cupy.empty((G, H, Q), sum_dtype(dtype))
    for first, stop, seen, rules in tiles(q_GHQK, k_GSK, causal, window, slopes, mask, keep):
        T, V = stop - first, seen.stop - seen.start
        s_GHTV = scores(q_GHQK[:, :, first:stop], k_GSK[:, seen], scale)
        p_GHTV, sum_GHT, lse_GHT = (cupy.empty(shape, d) for shape, d in (
            ((G, H, T, V), dtype), ((G, H, T), lse_GHQ.dtype), ((G, H, T), lse_GHQ.dtype)))
        launch(kernel(FORWARD, "softmax", dtype), G * H * T, threads_for(V),
               (s_GHTV, p_GHTV, sum_GHT, lse_GHT, *rules))
        o_GHTK = batched_product(p_GHTV.reshape(G, H * T, V), v_GSK[:, seen], dtype=lse_GHQ.dtype)
        cupy.divide(o_GHTK.reshape(G, H, T, K), sum_GHT[..., None], out=out[:, :, first:stop])
        lse_GHQ[:, :, first:stop] = lse_GHT
    return lse_GHQ


def attention_backward(dout_GHQK, lse_GHQ, q_GHQK, k_GSK, v_GSK, out, scale, *, dq, causal=True, window=None,
                       slopes=None, mask=None, keep=None):
    """As mpitp.ops.attention.attention_backward; dk and dv in float32 for 16-bit q."""
    (G, H, Q, K), dtype = q_GHQK.shape, q_GHQK.dtype
    computed = sum_dtype(dtype)
    dk_GSK, dv_GSK = cupy.zeros(k_GSK.shape, computed), cupy.zeros(v_GSK.shape, computed)
    for first, stop, seen, rules in tiles(q_GHQK, k_GSK, causal, window, slopes, mask, keep):
        T, V = stop - first, seen.stop - seen.start
        q_GnK = rows_of_heads(q_GHQK[:, :, first:stop])
        dout_GnK, out_GnK = (rows_of_heads(x[:, :, first:stop]) for x in (dout_GHQK, out))
        s_GHTV = scores(q_GHQK[:, :, first:stop], k_GSK[:, seen], scale)
        dp_GnV = batched_product(dout_GnK, v_GSK[:, seen].swapaxes(1, 2), dtype=computed)
        delta_Gn = cupy.multiply(dout_GnK, out_GnK, dtype=computed).sum(axis=-1)
        ds_GnV, kept_GnV = (cupy.empty(dp_GnV.shape, dtype) for _ in range(2))
        lse_GHT = cupy.ascontiguousarray(lse_GHQ[:, :, first:stop])
        launch(kernel(BACKWARD, "softmax_backward", dtype), G * H * T, threads_for(V),
               (s_GHTV, dp_GnV, lse_GHT, delta_Gn, ds_GnV, kept_GnV, *rules))
        dv_GSK[:, seen] += batched_product(kept_GnV.swapaxes(1, 2), dout_GnK, dtype=computed)
        dk_GVK = batched_product(ds_GnV.swapaxes(1, 2), q_GnK, dtype=computed)
        dk_GVK *= float(scale)
        dk_GSK[:, seen] += dk_GVK
        dq_GnK = batched_product(ds_GnV, k_GSK[:, seen], dtype=computed)
        cupy.multiply(dq_GnK.reshape(G, H, T, K), float(scale), out=dq[:, :, first:stop])
    return dk_GSK, dv_GSK


def scores(q_GHTK, k_GVK, scale):
    """scale q k^T in float32 (float64), (G, H, T, V)."""
    G, H, T, _ = q_GHTK.shape
    s_GnV = batched_product(rows_of_heads(q_GHTK), k_GVK.swapaxes(1, 2), dtype=sum_dtype(q_GHTK.dtype))
    s_GnV *= float(scale)
    return s_GnV.reshape(G, H, T, k_GVK.shape[1])


def rows_of_heads(x_GHTK):
    """The query heads of a key/value head as one matrix each, (G, H T, K), without gaps."""
    G, H, T, K = x_GHTK.shape
    return cupy.ascontiguousarray(x_GHTK).reshape(G, H * T, K)


def tiles(q_GHQK, k_GSK, causal, window, slopes, mask, keep):
    """Yield (first query, the one after the last, slice of the keys seen, arguments of RULES)."""
    (G, H, Q, _), S = q_GHQK.shape, k_GSK.shape[1]
    slopes = None if slopes is None else cupy.ascontiguousarray(slopes, sum_dtype(q_GHQK.dtype))
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
            np.int32(stop - first), np.int32(seen.stop - seen.start), np.int64(S - Q + first), np.int64(seen.start),
            np.int32(causal), np.int64(0 if window is None else window), NOTHING if slopes is None else slopes,
            NOTHING if mask is None else tile_mask, np.int64(mask_pitch), NOTHING if keep is None else tile_keep)
