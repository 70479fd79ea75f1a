"""The activations on the GPU: bias, activation and derivative in one pass over the data, 16 bytes a thread."""
from functools import lru_cache

import cupy
import numpy as np

from .kernel import kernel, launch

# Of A x: A a = act(x) and A d = act'(x); the formulas are those of mpitp/ops/activation.py.
BODIES = {
    "identity": "A a = x, d = 1;",
    "relu": "A a = x > 0 ? x : (x != x ? x : (A)0), d = x > 0;",
    "silu": "A s = over(1, 1 + exponential(-x)), a = x * s, d = s + a * (1 - s);",
    "gelu_tanh": """
        const A k = 0.7978845608028654, c = 0.044715;
        A square = x * x, s = over(1, 1 + exponential((square * (-2 * k * c) - 2 * k) * x));
        A a = x * s;
        A d = (1 - s) * ((square * (6 * k * c) + 2 * k) * a) + s;""",
    "gelu": """
        A F = normcdf(x), a = x * F, d = F + x * exp((A)-0.5 * x * x) * (A)0.3989422804014327;""",
}
SOURCE = r"""
struct alignas(sizeof(T) * WIDE) Vector { T at[WIDE]; };
// a = act(h + b), slope = act'(h + b); rows of `columns` numbers, WIDE of which lie in one row
extern "C" __global__ void activate(const T* h, const T* b, T* a_out, T* slope, long long n, int columns) {
    const long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * WIDE;
    if (i >= n) return;
    Vector in = *(const Vector*)(h + i), out, derivative;
    const int column = b ? i % columns : 0;
    #pragma unroll
    for (int v = 0; v < WIDE; v++) {
        A x = up(in.at[v]) + (b ? up(b[column + v]) : (A)0);
        BODY
        out.at[v] = down(a);
        derivative.at[v] = down(d);
    }
    *(Vector*)(a_out + i) = out;
    if (slope) *(Vector*)(slope + i) = derivative;
}"""
THREADS = 256
NOTHING = np.uint64(0)      # a null pointer


@lru_cache(maxsize=None)
def activate(name, dtype, wide):
    return kernel(SOURCE.replace("BODY", BODIES[name]), "activate", dtype, (f"-DWIDE={wide}",))


def activation_forward(name, h, out=None, derivative=None, bias=None):
    """As mpitp.ops.activation.activation_forward."""
    out = cupy.empty_like(h) if out is None else out
    wide = 16 // h.itemsize
    pointers = h.data.ptr | out.data.ptr | (0 if derivative is None else derivative.data.ptr)
    if h.shape[-1] % wide or pointers % 16:
        wide = 1
    launch(activate(name, h.dtype, wide), -(-h.size // (wide * THREADS)), THREADS,
           (h, NOTHING if bias is None else bias, out, NOTHING if derivative is None else derivative,
            np.int64(h.size), np.int32(h.shape[-1])))
    return out, derivative


def activation_backward(da, saved, out=None):
    """As mpitp.ops.activation.activation_backward."""
    return cupy.multiply(da, saved, out=out)
