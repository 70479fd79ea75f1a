"""The kernels of transport `peer`: GPUs of one node add up by writing into each other's memory. Source and geometry.

Blocks of threads of the same number on all ranks work together, in lock step, and know nothing of the others. What they
exchange is a tile of the array; `tick` counts a block's tiles over all calls, on the device, so that a CUDA graph can
hold a call. A rank can be one tile ahead of another and never two, since it waits for something of every rank in every
tile; so two slots, by the parity of the tick, are enough.

sum_words     few bytes: a rank writes its summands to every other one and adds up what arrives. They travel in words of
              8 bytes, half number and half tick, that arrive whole: no fence, no second message.
sum_shares    many bytes: a rank gets everybody's summands of its share of a tile, adds them up, rounds once, and writes
              the result to everybody: (P-1)/P (4 + bytes of a result) a number. The summands of a tile are under way
              while the tile before is added up.
gather_words  few bytes that are only moved.
The order of the additions is an expression, `total`: of the ranks, or in reproducible mode of the tree's nodes.
"""
from collections.abc import Sequence
from typing import NamedTuple

MOST_RANKS = 8
BLOCKS, WORDS = 128, 512        # of sum_words: blocks of threads, words of a tile that a rank sends to another one
SHARE_BLOCKS, SHARE = 256, 8192     # of sum_shares: blocks of threads, numbers of a tile that one of two ranks adds up

TYPES = {       # of a result, T, and of its summands, A
    "float32": "typedef float T; typedef float A; __device__ T down(A x) { return x; }",
    "float64": "typedef double T; typedef double A; __device__ T down(A x) { return x; }",
    "int32": "typedef int T; typedef int A; __device__ T down(A x) { return x; }",
    "int64": "typedef long long T; typedef long long A; __device__ T down(A x) { return x; }",
    "uint16": "typedef unsigned short T; typedef unsigned short A; __device__ T down(A x) { return x; }",
}

PRIMITIVES = r"""
#ifndef ON_HOST                                                 // tests/support/host_kernels.py has others
struct alignas(16) Word { unsigned a, f, b, g; };
__device__ __forceinline__ void put(Word* at, unsigned a, unsigned b, unsigned tick) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1,%2,%3,%4};"
                 :: "l"(at), "r"(a), "r"(tick), "r"(b), "r"(tick) : "memory");
}
__device__ __forceinline__ Word get(const Word* at) {
    Word w;
    asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(w.a), "=r"(w.f), "=r"(w.b), "=r"(w.g) : "l"(at) : "memory");
    return w;
}
__device__ __forceinline__ void tell(unsigned* flag, unsigned tick) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" :: "l"(flag), "r"(tick) : "memory");
}
__device__ __forceinline__ unsigned look(const unsigned* flag) {
    unsigned tick;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(tick) : "l"(flag) : "memory");
    return tick;
}
__device__ __forceinline__ unsigned long long nanoseconds() {
    unsigned long long t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}
__device__ __noinline__ void give_up(unsigned* error) {         // results would be wrong: nothing may go on
    *(volatile unsigned*)error = 1;
    __threadfence_system();
    __trap();
}
#define LOOKS 1023                                              // between two looks at the clock, less 1
#endif
__device__ __forceinline__ A most(A x, A y) { return x > y ? x : y; }
__device__ __forceinline__ A least(A x, A y) { return x < y ? x : y; }
struct Patience { unsigned long long limit, since; unsigned looks; unsigned* error; };
__device__ __forceinline__ bool is_over(Patience& patience) {
    if (++patience.looks & LOOKS) return false;
    const unsigned long long t = nanoseconds();
    if (!patience.since) patience.since = t;
    return t - patience.since > patience.limit;
}
// A rank's memory that the others write to: words, summands, results, flags, a flag of each rank for the trial.
#define REGION (SLOTS * WORDS + MOST_RANKS)         // words of a block and slot; the last for ranks without summands
#define SUMMANDS_AT (16LL * BLOCKS * 2 * REGION)
#define RESULTS_AT (SUMMANDS_AT + 4LL * SHARE_BLOCKS * 2 * SLOTS * SHARE)
#define FLAGS_AT (RESULTS_AT + 4LL * SHARE_BLOCKS * 2 * P * SHARE)
#define TRIAL_AT (FLAGS_AT + 256LL * SHARE_BLOCKS)
__device__ __forceinline__ Word* words_of(char* memory, int block, unsigned tick) {
    return (Word*)memory + (long long)(block * 2 + (tick & 1)) * REGION;
}
"""

# T and A, P, RANK, NODES (summands, of which rank RANK has MINE from FIRST on), IDLE (mask of the ranks without any),
# TOTAL (their sum, of u[0], u[1], ...), X_PARAMETERS, X, IN_PARAMETERS and IN are defined before.
SUM_WORDS = r"""
#define PER (8 / (int)sizeof(A))                                // numbers in a word
union Numbers { A x[PER]; unsigned bits[2]; };
__device__ __forceinline__ Numbers load(const A* x, long long word, long long n) {
    Numbers v;
    #pragma unroll
    for (int e = 0; e < PER; e++) v.x[e] = PER * word + e < n ? x[PER * word + e] : (A)0;
    return v;
}
__device__ __forceinline__ Numbers wait(const Word* at, unsigned tick, Patience& patience) {
    Word w = get(at);
    while (w.f != tick || w.g != tick) {
        if (is_over(patience)) give_up(patience.error);
        w = get(at);
    }
    Numbers v;
    v.bits[0] = w.a, v.bits[1] = w.b;
    return v;
}
"""

SUM_WORDS_KERNEL = SUM_WORDS + r"""
// y[n] = the total of x[n]; `width` words a tile
extern "C" __global__ void sum_words(X_PARAMETERS, T* y, long long n, int width, IN_PARAMETERS, unsigned* ticks,
                                     unsigned* error, unsigned long long limit) {
    const A* const x[] = {X};
    char* const in[] = {IN};
    Patience patience = {limit, 0, 0, error};
    const long long words = (n + PER - 1) / PER;
    unsigned tick = ticks[blockIdx.x];
    for (long long first = (long long)blockIdx.x * width; first < words; first += (long long)gridDim.x * width) {
        tick++;
        const int count = (int)(words - first < width ? words - first : width);
        for (int i = threadIdx.x; i < count; i += blockDim.x)
            #pragma unroll
            for (int k = 0; k < MINE; k++) {
                const Numbers v = load(x[k], first + i, n);
                #pragma unroll
                for (int p = 0; p < P; p++)
                    if (p != RANK)
                        put(words_of(in[p], blockIdx.x, tick) + (FIRST + k) * WORDS + i, v.bits[0], v.bits[1], tick);
            }
        if (!MINE && threadIdx.x < P && threadIdx.x != RANK)    // others must not get ahead of this rank
            put(words_of(in[threadIdx.x], blockIdx.x, tick) + SLOTS * WORDS + RANK, 0, 0, tick);
        Word* const here = words_of(in[RANK], blockIdx.x, tick);
        for (int i = threadIdx.x; i < count; i += blockDim.x) {
            Numbers v[NODES];
            #pragma unroll
            for (int k = 0; k < NODES; k++) {
                const int own = k - FIRST;
                if (own >= 0 && own < MINE) v[k] = load(x[own], first + i, n);
                else v[k] = wait(here + k * WORDS + i, tick, patience);
            }
            #pragma unroll
            for (int e = 0; e < PER; e++) {
                A u[NODES];
                #pragma unroll
                for (int k = 0; k < NODES; k++) u[k] = v[k].x[e];
                const long long at = PER * (first + i) + e;
                if (at < n) y[at] = down(TOTAL);
            }
        }
        if (threadIdx.x < P && threadIdx.x != RANK && (IDLE >> threadIdx.x & 1))
            wait(here + SLOTS * WORDS + threadIdx.x, tick, patience);
        __syncthreads();                                        // the slot has been read when the next tile is sent
    }
    if (!threadIdx.x) ticks[blockIdx.x] = tick;
}
"""

GATHER_WORDS = SUM_WORDS + r"""
// y = the x of the ranks, counts[p] numbers of rank p, one after the other; y is 0 where nothing is received, and x
// goes to the ranks in the mask `to`. Of each tile the first word is always sent, so that no rank gets ahead.
extern "C" __global__ void gather_words(const A* x, A* y, int to, long long words, int width, COUNT_PARAMETERS,
                                        IN_PARAMETERS, unsigned* ticks, unsigned* error, unsigned long long limit) {
    const long long counts[] = {COUNTS};
    char* const in[] = {IN};
    Patience patience = {limit, 0, 0, error};
    unsigned tick = ticks[blockIdx.x];
    for (long long first = (long long)blockIdx.x * width; first < words; first += (long long)gridDim.x * width) {
        tick++;
        const int most = (int)(words - first < width ? words - first : width);
        for (int i = threadIdx.x; i < most; i += blockDim.x) {
            const bool mine = PER * (first + i) < counts[RANK];
            Numbers v = {};
            if (mine) v = load(x, first + i, counts[RANK]);
            #pragma unroll
            for (int p = 0; p < P; p++)
                if (p != RANK && (!i || mine && (to >> p & 1)))
                    put(words_of(in[p], blockIdx.x, tick) + RANK * WORDS + i, v.bits[0], v.bits[1], tick);
        }
        long long start = 0;
        #pragma unroll
        for (int p = 0; p < P; p++) {
            for (int i = threadIdx.x; i < most; i += blockDim.x) {
                const bool wanted = y && PER * (first + i) < counts[p];
                Numbers v;
                if (p == RANK) {
                    if (!wanted) continue;
                    v = load(x, first + i, counts[p]);
                } else {
                    if (i && !wanted) continue;
                    v = wait(words_of(in[RANK], blockIdx.x, tick) + p * WORDS + i, tick, patience);
                }
                #pragma unroll
                for (int e = 0; e < PER; e++) {
                    const long long at = PER * (first + i) + e;
                    if (wanted && at < counts[p]) y[start + at] = v.x[e];
                }
            }
            start += counts[p];
        }
        __syncthreads();
    }
    if (!threadIdx.x) ticks[blockIdx.x] = tick;
}
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

TRIAL = r"""
// arrived[p] = whether rank p's stamp came in time: what shows that GPUs can write to each other at all
extern "C" __global__ void trial(unsigned stamp, unsigned* arrived, IN_PARAMETERS, unsigned* ticks, unsigned* error,
                                 unsigned long long limit) {
    char* const in[] = {IN};
    if (threadIdx.x >= P) return;
    Patience patience = {limit, 0, 0, error};
    tell((unsigned*)(in[threadIdx.x] + TRIAL_AT) + RANK, stamp);
    bool over = false;
    while (!over && look((unsigned*)(in[RANK] + TRIAL_AT) + threadIdx.x) != stamp) over = is_over(patience);
    arrived[threadIdx.x] = !over;
}
"""
BODIES = {"sum_words": SUM_WORDS_KERNEL, "gather_words": GATHER_WORDS, "sum_shares": SUM_SHARES, "trial": TRIAL}
EXPRESSIONS = {"sum": "({} + {})", "max": "most({}, {})", "min": "least({}, {})"}


class Order(NamedTuple):
    """What a sum adds up, and in which order.

    Attributes
    ----------
    counts : tuple of int
        How many summands each rank has.
    total : str
        The sum of u[0], u[1], ... in C: the summands of rank 0, then of rank 1, and so on.
    """
    counts: tuple[int, ...]
    total: str


def order_of_ranks(size: int, op: str = "sum") -> Order:
    """Return the order of the ranks: ((u[0] + u[1]) + u[2]) for three."""
    total = "u[0]"
    for rank in range(1, size):
        total = EXPRESSIONS[op].format(total, f"u[{rank}]")
    return Order((1,) * size, total)


def order_of_tree(nodes: Sequence[Sequence[tuple[int, int]]], width: int) -> Order:
    """Return the order of a tree over `width` leaves of which rank p has nodes[p], (first leaf, leaves): tree.py's."""
    number = {node: k for k, node in enumerate(node for of_rank in nodes for node in of_rank)}
    return Order(tuple(map(len, nodes)), node_total(number, 0, width) or "0")


def node_total(number: dict[tuple[int, int], int], first: int, width: int) -> str | None:
    """Return the value of a node in C, as tree.finish computes it; None where all of it is absent."""
    if (first, width) in number:
        return f"u[{number[first, width]}]"
    if width == 1:
        return None
    left, right = node_total(number, first, width // 2), node_total(number, first + width // 2, width // 2)
    return EXPRESSIONS["sum"].format(left, right) if left and right else left or right


def source(name: str, types: str, rank: int, order: Order) -> str:
    """Return the source of a kernel for one rank.

    Parameters
    ----------
    name : str
        Of the kernel.
    types : str
        Definitions of T, A and down().
    rank : int
        Which.
    order : Order
        Of the additions.
    """
    size, first, mine = len(order.counts), sum(order.counts[:rank]), order.counts[rank]
    x = [f"x{k}" for k in range(max(mine, 1))]
    places, counts = [f"in{p}" for p in range(size)], [f"count{p}" for p in range(size)]
    idle = sum(1 << p for p, count in enumerate(order.counts) if not count)
    defined = {"SLOTS": slots(size), "MOST_RANKS": MOST_RANKS, "BLOCKS": BLOCKS, "WORDS": WORDS,
               "SHARE_BLOCKS": SHARE_BLOCKS, "SHARE": share(size), "P": size, "RANK": rank,
               "NODES": sum(order.counts), "FIRST": first, "MINE": mine, "IDLE": idle, "TOTAL": order.total,
               "X": ", ".join(x), "X_PARAMETERS": ", ".join(f"const A* {part}" for part in x),
               "IN": ", ".join(places), "IN_PARAMETERS": ", ".join(f"char* {place}" for place in places),
               "COUNTS": ", ".join(counts), "COUNT_PARAMETERS": ", ".join(f"long long {count}" for count in counts)}
    return "".join(f"#define {key} {value}\n" for key, value in defined.items()) + types + PRIMITIVES + BODIES[name]


def slots(size: int) -> int:
    """Return how many summands a sum over so many ranks may have: one a rank, or the nodes of the tree."""
    return 4 if size == 2 else 8


def share(size: int) -> int:
    """Return how many numbers of a tile a rank adds up at most."""
    return SHARE * 4 // slots(size)


def memory_bytes(size: int) -> int:
    """Return the bytes of a rank's memory that the others write to."""
    words = 16 * BLOCKS * 2 * (slots(size) * WORDS + MOST_RANKS)
    return words + 4 * SHARE_BLOCKS * 2 * (slots(size) + size) * share(size) + 256 * SHARE_BLOCKS + 4 * MOST_RANKS


def words_grid(words: int) -> tuple[int, int, int]:
    """Return (blocks, threads of a block, words of a tile) for so many words: the same on every rank."""
    threads = 32 if words <= 32 else 256 if words <= 256 * BLOCKS else 512
    threads = min(threads, WORDS)
    width = min(WORDS, threads * -(-words // (BLOCKS * threads)))
    return min(BLOCKS, -(-words // width)), threads, width


def shares_blocks(numbers: int) -> int:
    """Return how many blocks of threads a sum of so many numbers takes at most: what was the fastest on two H200."""
    return min(SHARE_BLOCKS, 128 if numbers <= 1 << 22 else 256)


def shares_grid(numbers: int, size: int, blocks: int) -> tuple[int, int, int]:
    """Return (blocks, threads of a block, numbers of a rank's share of a tile) for a sum over `size` ranks."""
    width = min(share(size), 128 * -(-numbers // (128 * size * blocks)))
    return min(blocks, -(-numbers // (size * width))), max(32, min(512, width // 4 // 32 * 32)), width
