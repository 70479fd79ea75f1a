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

from .peer_shares import SUM_SHARES
from .peer_words import GATHER_WORDS, SUM_WORDS

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
# TOTAL (their sum, of u[0], u[1], ...), X_PARAMETERS, X, IN_PARAMETERS and IN are defined before each of BODIES.
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
BODIES = {"sum_words": SUM_WORDS, "gather_words": GATHER_WORDS, "sum_shares": SUM_SHARES, "trial": TRIAL}
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
