"""Rotary positions on the GPU: one block of threads a token, or several where tokens are few, one thread a pair.

Dimension key: B sequences, S positions, K features of a head.
"""
import cupy
import numpy as np

from ...arrays import DeviceArray
from .kernel import kernel, threads_for

NOTHING = np.uint64(0)      # a null pointer
FEW = 64                    # tokens, below which each has several blocks of threads
SOURCE = r"""
// (u, v) -> (u cos - v sin, v cos + u sin), of sin times `sign`. Token n is at position starts[n / S] + n % S.
extern "C" __global__ void rotary(const T* x, const A* cosine, const A* sine, const long long* starts, T* y, int S,
                                  int heads, int K, int half, int interleaved, A sign) {
    const long long n = blockIdx.x, row = n * heads * K, at = (starts ? starts[n / S] : 0) + n % S;
    const int thread = blockIdx.y * blockDim.x + threadIdx.x, threads = gridDim.y * blockDim.x;
    for (int i = thread; i < heads * half; i += threads) {
        const int head = i / half, pair = i % half;
        const long long first = row + head * K + (interleaved ? 2 * pair : pair);
        const long long second = first + (interleaved ? 1 : half);
        A u = up(x[first]), v = up(x[second]), c = cosine[at * half + pair], s = sign * sine[at * half + pair];
        y[first] = down(u * c - v * s);
        y[second] = down(v * c + u * s);
    }
    const int rest = K - 2 * half;
    for (int i = thread; i < heads * rest; i += threads) {
        const long long k = row + i / rest * K + 2 * half + i % rest;
        y[k] = x[k];
    }
}"""


def rotary_forward(x: DeviceArray, cos: DeviceArray, sin: DeviceArray, interleaved: bool,
                   starts: DeviceArray | None = None, sign: float = 1) -> DeviceArray:
    """Compute as mpitp.ops.rotary.rotary_forward; cos and sin in float32 for 16-bit x."""
    half, (S, heads, K) = cos.shape[-1], x.shape[-3:]
    x, y = cupy.ascontiguousarray(x), cupy.ndarray(x.shape, x.dtype)
    if x.size:
        tokens, threads = x.size // (heads * K), threads_for(heads * half)
        if tokens < FEW:
            threads = min(threads, 128)
        kernel(SOURCE, "rotary", x.dtype)(
            (tokens, -(-heads * half // threads) if tokens < FEW and half else 1), (threads,),
            (x, cos, sin, NOTHING if starts is None else starts, y, np.int32(S), np.int32(heads), np.int32(K),
             np.int32(half), np.int32(interleaved), cos.dtype.type(sign)))
    return y


def rotary_backward(dy: DeviceArray, cos: DeviceArray, sin: DeviceArray, interleaved: bool) -> DeviceArray:
    """Compute as mpitp.ops.rotary.rotary_backward."""
    return rotary_forward(dy, cos, sin, interleaved, sign=-1)
