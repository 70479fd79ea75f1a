"""Attention of one new token on the GPU: one kernel, one block of threads a query head, the scores in shared memory.

Dimension key: G key/value heads, H query heads of each, S keys, K features of a head.
"""
import cupy
import numpy as np

from ...arrays import sum_dtype
from .kernel import INFINITY, kernel

MOST_BYTES = 40 << 10       # of scores that fit into shared memory beside the sums
THREADS = 256
SOURCE = f"""
#define INF ((A){INFINITY})
""" + r"""
// out = softmax(scale q k^T + slope (key - query)) v over keys first..S-1, of which the query is the last
extern "C" __global__ void last_query(const T* q, const T* k, const T* v, T* out, A* lse, A scale, const A* slopes,
                                      int H, int S, int K, int first, long long q_head, long long k_head,
                                      long long k_row, long long v_head, long long v_row, long long out_head) {
    extern __shared__ char memory[];
    A* s = (A*)memory;                                  // S - first scores, then THREADS partial sums
    A* part = s + (S - first);
    const int g = blockIdx.x / H, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, V = S - first;
    q += blockIdx.x * q_head;
    k += g * k_head + first * k_row;
    v += g * v_head + first * v_row;
    A top = -INF, sum = 0;
    for (int j = warp; j < V; j += blockDim.x >> 5) {   // a warp a key
        A dot = 0;
        for (int i = lane; i < K; i += 32) dot += up(q[i]) * up(k[j * k_row + i]);
        dot = warp_sum(dot) * scale;
        if (slopes) dot += slopes[blockIdx.x] * (A)(first + j - (S - 1));
        if (!lane) s[j] = dot;
    }
    __syncthreads();
    for (int j = threadIdx.x; j < V; j += blockDim.x) top = (s[j] > top || s[j] != s[j]) ? s[j] : top;
    top = block_max(top);
    for (int j = threadIdx.x; j < V; j += blockDim.x) { s[j] = exp(s[j] - top); sum += s[j]; }
    sum = block_sum(sum);
    // As many groups of threads as fit go over the keys, each thread one feature; their sums are added in order.
    const int wide = min(K, (int)blockDim.x), groups = blockDim.x / wide, group = threadIdx.x / wide;
    for (int i = threadIdx.x % wide; i < K; i += wide) {
        A total = 0;
        if (group < groups)
            for (int j = group; j < V; j += groups) total += s[j] * up(v[j * v_row + i]);
        __syncthreads();
        part[threadIdx.x] = total;
        __syncthreads();
        if (group == 0) {
            for (int other = 1; other < groups; other++) total += part[threadIdx.x + other * wide];
            out[blockIdx.x * out_head + i] = down(total / sum);
        }
    }
    if (!threadIdx.x) lse[blockIdx.x] = log(sum) + top;
}"""


def fits(q_GHQK, k_GSK, v_GSK, out, mask, keep):
    """Whether these are one query a head, with nothing to hide, and lie as the kernel reads them."""
    (G, H, Q, K), S = q_GHQK.shape, k_GSK.shape[1]
    item, scores = q_GHQK.itemsize, sum_dtype(q_GHQK.dtype).itemsize * (S + THREADS)
    compact = all(x.strides[-1] == item for x in (q_GHQK, k_GSK, v_GSK, out)) or K == 1
    in_a_row = all(G == 1 or H == 1 or x.strides[0] == H * x.strides[1] for x in (q_GHQK, out))
    whole = K <= THREADS or K % THREADS == 0            # else some threads would miss a barrier
    plain = Q == 1 and G * H and mask is None and keep is None
    return plain and compact and in_a_row and whole and scores <= MOST_BYTES


def last_query_forward(q_GH1K, k_GSK, v_GSK, scale, out, window, slopes):
    """attention_forward for Q = 1. Returns lse (G, H, 1)."""
    (G, H, _, K), S, computed = q_GH1K.shape, k_GSK.shape[1], sum_dtype(q_GH1K.dtype)
    lse_GH1 = cupy.empty((G, H, 1), computed)
    first = 0 if window is None else max(0, S - window)
    slopes = np.uint64(0) if slopes is None else cupy.ascontiguousarray(slopes, computed)

    def pitch(x, axis):
        return np.int64(x.strides[axis] // x.itemsize)
    head = 1 if H > 1 else 0                            # heads lie in a row: by either axis, where it has several
    kernel(SOURCE, "last_query", q_GH1K.dtype)(
        (G * H,), (THREADS,),
        (q_GH1K, k_GSK, v_GSK, out, lse_GH1, computed.type(scale), slopes, np.int32(H), np.int32(S), np.int32(K),
         np.int32(first), pitch(q_GH1K, head), pitch(k_GSK, 0), pitch(k_GSK, 1), pitch(v_GSK, 0), pitch(v_GSK, 1),
         pitch(out, head)), shared_mem=computed.itemsize * (S - first + THREADS))
    return lse_GH1
