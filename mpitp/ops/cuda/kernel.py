"""How kernels are written here: in terms of T, what an array holds, and A, what is computed in.

T is float, double or one of the 16-bit types, of which a kernel sees the bits; A is double for double, else float.
up(T) -> A is exact, down(A) -> T rounds to nearest even.
"""
from functools import cache
from typing import Any

import cupy
import numpy as np

ROUND = {
    "float32": "typedef float T; typedef float A;"
               "__device__ A up(T x) { return x; } __device__ T down(A x) { return x; }",
    "float64": "typedef double T; typedef double A;"
               "__device__ A up(T x) { return x; } __device__ T down(A x) { return x; }",
    "float16": """
        typedef unsigned short T; typedef float A;
        __device__ A up(T x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
        __device__ T down(A x) { T y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }""",
    "bfloat16": """
        typedef unsigned short T; typedef float A;
        __device__ A up(T x) { return __uint_as_float((unsigned)x << 16); }
        __device__ T down(A x) {
        #if __CUDA_ARCH__ >= 800
            T y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y;
        #else
            unsigned bits = __float_as_uint(x);
            if (x != x) return 0x7fff;                                      // NaN stays one
            return (T)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
        #endif
        }""",
}
# A 16-bit result keeps 8 or 11 bits, for which the GPU's own exponential and division are exact enough and twice as
# fast.
FAST = {False: "__device__ A exponential(A x) { return exp(x); } __device__ A over(A x, A y) { return x / y; }",
        True: "__device__ A exponential(A x) { return __expf(x); } "
              "__device__ A over(A x, A y) { return __fdividef(x, y); }"}
# The sum over a block of threads, on every thread: within warps, then over the warps. The order is that of the threads.
REDUCE = """
__device__ A warp_sum(A x) {
    for (int lane = 16; lane; lane >>= 1) x += __shfl_xor_sync(0xffffffff, x, lane);
    return x;
}
__device__ A warp_max(A x) {                    // a NaN stays
    for (int lane = 16; lane; lane >>= 1) {
        A other = __shfl_xor_sync(0xffffffff, x, lane);
        x = (other > x || other != other) ? other : x;
    }
    return x;
}
__device__ A block_sum(A x) {
    __shared__ A of_warps[32];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    x = warp_sum(x);
    __syncthreads();
    if (!lane) of_warps[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? of_warps[lane] : (A)0);
}
__device__ A block_max(A x) {
    __shared__ A of_warps[32];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    x = warp_max(x);
    __syncthreads();
    if (!lane) of_warps[warp] = x;
    __syncthreads();
    return warp_max(of_warps[lane < warps ? lane : 0]);
}
"""
ALIGNED = 16        # bytes that one instruction reads
INFINITY = "__int_as_float(0x7f800000)"


@cache
def kernel(source: str, name: str, dtype: np.dtype, options: tuple[str, ...] = ()) -> Any:
    """Make the kernel `name` of a CUDA source, for arrays of this dtype; CuPy compiles it at its first call."""
    whole = ROUND[dtype.name] + FAST[dtype.itemsize == 2] + REDUCE + source
    return cupy.RawKernel(whole, name, options=("--std=c++14", *options))


def threads_for(length: int) -> int:
    """Choose the threads of a block that goes over so many numbers: whole warps, enough of them to hide memory."""
    return 32 if length <= 128 else 128 if length <= 512 else 256 if length <= 1024 else 512


def launch(function: Any, blocks: int, threads: int, arguments: tuple) -> None:
    """Start a kernel, unless there is nothing to do: a grid of no blocks is an error."""
    if blocks:
        function((blocks,), (threads,), arguments)
