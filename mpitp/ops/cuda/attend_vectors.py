"""Attention of the newest query where the keys and values of a head are read in vectors of 16 bytes.

All loads of a block of threads, of values too, are under way before the first score is known: one wait for memory.
"""
VECTORS = (4, 8, 16, 32)        # of a head's features, which as many lanes of a warp read
SOURCE = r"""
// Of one query head and one piece of its keys: the largest score, the sum of e^(score - largest), and that of e^... v.
// LANES lanes read a key; a warp has PIECE / 8 keys.
#define N (16 / (int)sizeof(T))
#define KEYS (32 / LANES)
#define READS (PIECE / 8 / KEYS)
struct alignas(16) Vector { T at[N]; };
extern "C" __global__ void __launch_bounds__(256) attend_vectors(
        const T* q, const T* k, const T* v, const long long* starts, A* tops, A* sums, A* parts, A scale,
        const A* slopes, int H, int share, int K, int window, long long q_b, long long q_h, long long k_b,
        long long k_c, long long k_g) {
    __shared__ A s[PIECE], of_warp[8][LANES * N];
    const int head = blockIdx.x % H, b = blockIdx.x / H, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int key = warp * (PIECE / 8) + lane / LANES, feature = lane % LANES * N;
    const long long length = starts[b] + 1, first = window > 0 && window < length ? length - window : 0;
    const long long from = max(first, (long long)blockIdx.y * PIECE), to = min(length, (blockIdx.y + 1LL) * PIECE);
    const int V = to - from;
    if (V <= 0) return;
    k += b * k_b + from * k_c + head / share * k_g + feature;
    v += b * k_b + from * k_c + head / share * k_g + feature;
    const Vector x = *(const Vector*)(q + b * q_b + head * q_h + feature);
    Vector keys[READS], values[READS];
    #pragma unroll
    for (int r = 0; r < READS; r++) keys[r] = *(const Vector*)(k + min(key + r * KEYS, V - 1) * k_c);
    #pragma unroll
    for (int r = 0; r < READS; r++) values[r] = *(const Vector*)(v + min(key + r * KEYS, V - 1) * k_c);
    #pragma unroll
    for (int r = 0; r < READS; r++) {
        const int j = key + r * KEYS;
        A dot = 0;
        #pragma unroll
        for (int i = 0; i < N; i++) dot += up(x.at[i]) * up(keys[r].at[i]);
        #pragma unroll
        for (int other = LANES / 2; other; other >>= 1) dot += __shfl_xor_sync(0xffffffff, dot, other);
        dot *= scale;
        if (slopes) dot += slopes[head] * (A)(from + j - (length - 1));
        if (!feature && j < V) s[j] = dot;
    }
    __syncthreads();
    const A own = threadIdx.x < V ? s[threadIdx.x] : -INF, top = block_max(own);
    const A e = threadIdx.x < V ? exp(own - top) : (A)0, sum = block_sum(e);
    if (threadIdx.x < V) s[threadIdx.x] = e;
    const long long at = blockIdx.x * (long long)gridDim.y + blockIdx.y;
    if (!threadIdx.x) { tops[at] = top; sums[at] = sum; }
    __syncthreads();
    A total[N] = {};
    #pragma unroll
    for (int r = 0; r < READS; r++) {
        const int j = key + r * KEYS;
        if (j < V)
            #pragma unroll
            for (int i = 0; i < N; i++) total[i] += s[j] * up(values[r].at[i]);
    }
    #pragma unroll
    for (int i = 0; i < N; i++) {
        #pragma unroll
        for (int other = LANES; other < 32; other <<= 1) total[i] += __shfl_xor_sync(0xffffffff, total[i], other);
        if (lane < LANES) of_warp[warp][feature + i] = total[i];
    }
    __syncthreads();
    if (threadIdx.x < K) {
        A all = of_warp[0][threadIdx.x];
        #pragma unroll
        for (int other = 1; other < 8; other++) all += of_warp[other][threadIdx.x];
        parts[at * K + threadIdx.x] = all;
    }
}"""
