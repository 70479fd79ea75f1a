"""Kernel of transport `peer` for sums of many bytes: each rank adds up its share of every tile, for all.

A block of threads sends its summands of the next tile, waits for everybody's of this one, adds up, rounds and sends the
results, and takes those of the tile before. Flags with release and acquire semantics say when a block has written. The
macros are those of peer_kernels.py.
"""
SUM_SHARES = r"""
struct alignas(4 * sizeof(T)) Four { T x[4]; };
struct alignas(16) FourSummands { float x[4]; };
template <typename V> __device__ __forceinline__ V fresh(const V* at) {        // not what the SM may have kept
#ifdef ON_HOST
    return *at;
#else
    V v;
    if (sizeof(V) == 16) *(uint4*)&v = __ldcg((const uint4*)at); else *(uint2*)&v = __ldcg((const uint2*)at);
    return v;
#endif
}
__device__ __forceinline__ FourSummands load_four(const A* x, long long at, long long n) {
    if (at + 4 <= n && !((unsigned long long)(x + at) & 15)) return *(const FourSummands*)(x + at);
    FourSummands v;
    #pragma unroll
    for (int e = 0; e < 4; e++) v.x[e] = at + e < n ? x[at + e] : 0;
    return v;
}
__device__ __forceinline__ void store_four(T* y, long long at, long long n, const Four& v) {
    if (at + 4 <= n && !((unsigned long long)(y + at) & (sizeof(Four) - 1))) *(Four*)(y + at) = v;
    else {
        #pragma unroll
        for (int e = 0; e < 4; e++) if (at + e < n) y[at + e] = v.x[e];
    }
}
__device__ __forceinline__ float* summands_of(char* memory, unsigned tick, int node) {
    return (float*)(memory + SUMMANDS_AT) + ((long long)(blockIdx.x * 2 + (tick & 1)) * SLOTS + node) * SHARE;
}
__device__ __forceinline__ T* results_of(char* memory, unsigned tick, int rank) {
    return (T*)(memory + RESULTS_AT) + ((long long)(blockIdx.x * 2 + (tick & 1)) * P + rank) * SHARE;
}
__device__ __forceinline__ unsigned* flag_of(char* memory, int kind, int rank) {
    return (unsigned*)(memory + FLAGS_AT) + blockIdx.x * 64 + kind * 32 + rank;
}
// Tell every rank that this block has written; wait until every rank's has.
__device__ __forceinline__ void tell_all(char* const* in, int kind, unsigned tick) {
    __syncthreads();
    if (threadIdx.x < P && threadIdx.x != RANK) tell(flag_of(in[threadIdx.x], kind, RANK), tick);
}
__device__ __forceinline__ void wait_all(char* const* in, int kind, unsigned tick, Patience& patience) {
    if (threadIdx.x < P && threadIdx.x != RANK)
        while ((int)(look(flag_of(in[RANK], kind, threadIdx.x)) - tick) < 0)
            if (is_over(patience)) give_up(patience.error);
    __syncthreads();
}
// A thread takes AT_ONCE fours of a share at a time, so that many loads are under way before the first store.
#define AT_ONCE 4
__device__ __forceinline__ int length(long long first, long long n, int width) {     // of a share that starts there
    return n <= first ? 0 : n - first < width ? (int)(n - first) : width;
}
__device__ __forceinline__ int place(int start, int j) { return start + 4 * j * (int)blockDim.x; }
__device__ __forceinline__ void send_summands(const A* const* x, long long n, int width, char* const* in,
                                              long long tile, unsigned tick) {
    #pragma unroll
    for (int p = 0; p < P; p++) {
        if (p == RANK) continue;
        const long long first = (tile * P + p) * width;
        const int count = length(first, n, width);
        #pragma unroll
        for (int k = 0; k < MINE; k++) {
            float* const to = summands_of(in[p], tick, FIRST + k);
            for (int start = 4 * threadIdx.x; start < count; start += 4 * AT_ONCE * blockDim.x) {
                FourSummands v[AT_ONCE];
                #pragma unroll
                for (int j = 0; j < AT_ONCE; j++)
                    if (place(start, j) < count) v[j] = load_four(x[k], first + place(start, j), n);
                #pragma unroll
                for (int j = 0; j < AT_ONCE; j++)
                    if (place(start, j) < count) *(FourSummands*)(to + place(start, j)) = v[j];
            }
        }
    }
    tell_all(in, 0, tick);
}
__device__ __forceinline__ Four total(const FourSummands* v) {
    Four sum;
    #pragma unroll
    for (int e = 0; e < 4; e++) {
        A u[NODES];
        #pragma unroll
        for (int k = 0; k < NODES; k++) u[k] = v[k].x[e];
        sum.x[e] = down(TOTAL);
    }
    return sum;
}
__device__ __forceinline__ void add_up(const A* const* x, T* y, long long n, int width, char* const* in, long long tile,
                                       unsigned tick) {
    const long long first = (tile * P + RANK) * width;
    const int count = length(first, n, width);
    for (int start = 4 * threadIdx.x; start < count; start += 4 * AT_ONCE * blockDim.x) {
        Four sum[AT_ONCE];
        #pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            const int i = place(start, j);
            if (i >= count) continue;
            FourSummands v[NODES];
            #pragma unroll
            for (int k = 0; k < NODES; k++) {
                const int own = k - FIRST;
                if (own >= 0 && own < MINE) v[k] = load_four(x[own], first + i, n);
                else v[k] = fresh((const FourSummands*)(summands_of(in[RANK], tick, k) + i));
            }
            sum[j] = total(v);
        }
        #pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            const int i = place(start, j);
            if (i >= count) continue;
            #pragma unroll
            for (int p = 0; p < P; p++)
                if (p != RANK) *(Four*)(results_of(in[p], tick, RANK) + i) = sum[j];
            store_four(y, first + i, n, sum[j]);
        }
    }
    tell_all(in, 1, tick);
}
__device__ __forceinline__ void take_results(T* y, long long n, int width, char* const* in, long long tile,
                                             unsigned tick) {
    #pragma unroll
    for (int p = 0; p < P; p++) {
        if (p == RANK) continue;
        const long long first = (tile * P + p) * width;
        const int count = length(first, n, width);
        for (int start = 4 * threadIdx.x; start < count; start += 4 * AT_ONCE * blockDim.x) {
            Four v[AT_ONCE];
            #pragma unroll
            for (int j = 0; j < AT_ONCE; j++)
                if (place(start, j) < count)
                    v[j] = fresh((const Four*)(results_of(in[RANK], tick, p) + place(start, j)));
            #pragma unroll
            for (int j = 0; j < AT_ONCE; j++)
                if (place(start, j) < count) store_four(y, first + place(start, j), n, v[j]);
        }
    }
}
// y[n] = the total of x[n], rounded to T; a tile has `width` numbers a rank, a multiple of 4
extern "C" __global__ void __launch_bounds__(512, 2) sum_shares(
        X_PARAMETERS, T* y, long long n, int width, IN_PARAMETERS, unsigned* ticks, unsigned* error,
        unsigned long long limit) {
    const A* const x[] = {X};
    char* const in[] = {IN};
    Patience patience = {limit, 0, 0, error};
    const long long tiles = (n + (long long)P * width - 1) / ((long long)P * width), step = gridDim.x;
    unsigned tick = ticks[BLOCKS + blockIdx.x];
    long long tile = blockIdx.x;
    send_summands(x, n, width, in, tile, tick + 1);
    if (tile + step < tiles) send_summands(x, n, width, in, tile + step, tick + 2);
    for (; tile < tiles; tile += step) {
        tick++;
        wait_all(in, 0, tick, patience);
        add_up(x, y, n, width, in, tile, tick);
        if (tile < step) continue;
        wait_all(in, 1, tick - 1, patience);                    // everybody is through with the slot that comes next
        take_results(y, n, width, in, tile - step, tick - 1);
        if (tile + step < tiles) send_summands(x, n, width, in, tile + step, tick + 1);
    }
    wait_all(in, 1, tick, patience);
    take_results(y, n, width, in, tile - step, tick);
    __syncthreads();
    if (!threadIdx.x) ticks[BLOCKS + blockIdx.x] = tick;
}
"""
