"""The activations on the GPU: bias, activation, gate and derivative in one pass over the data, 16 bytes a thread."""
from collections.abc import Callable, Sequence
from functools import partial, cache
from typing import Any

import cupy
import numpy as np

from ...arrays import DeviceArray
from ...errors import InputError
from .kernel import kernel, launch

# What computes A a = act(x) and A d = act'(x) from A x, by the formulas of mpitp/ops/activation.py.
BODIES = {
    "identity": "A a = x, d = 1;",
    "relu": "A a = x > 0 ? x : (x != x ? x : (A)0), d = x > 0;",
    "relu2": "A p = x > 0 ? x : (x != x ? x : (A)0), a = p * p, d = 2 * p;",
    "silu": "A s = over(1, 1 + exponential(-x)), a = x * s, d = s + a * (1 - s);",
    "gelu_tanh": """
        const A k = 0.7978845608028654, c = 0.044715;
        A square = x * x, s = over(1, 1 + exponential((square * (-2 * k * c) - 2 * k) * x));
        A a = x * s;
        A d = (1 - s) * ((square * (6 * k * c) + 2 * k) * a) + s;""",
    "gelu": """
        A F = normcdf(x), a = x * F, d = F + x * exp((A)-0.5 * x * x) * (A)0.3989422804014327;""",
}
VECTOR = r"""
struct alignas(sizeof(T) * WIDE) Vector { T at[WIDE]; };
#define AT(p) (*(Vector*)((p) + i))
#define EACH _Pragma("unroll") for (int v = 0; v < WIDE; v++)
"""
FORWARD = VECTOR + r"""
// a = act(h + b), slope = act'(h + b); with u: a = act(h + b) (u + c), act = act(h + b), and u + c in the place of u.
// Rows of `columns` numbers, WIDE of which lie in one row; act, u, b and c may be missing, and without SLOPE slope is
extern "C" __global__ void activate(T* h, T* u, T* a_out, T* act_out, T* slope, const T* b, const T* c, long long n,
                                    int columns) {
    const long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * WIDE;
    if (i >= n) return;
    const int column = b || c ? i % columns : 0;
    Vector in = AT(h), out, derivative;
    EACH {
        A x = up(in.at[v]) + (b ? up(b[column + v]) : (A)0);
        BODY
        out.at[v] = down(a);
        if (SLOPE) derivative.at[v] = down(d);
    }
    if (SLOPE) AT(slope) = derivative;
    if (u) {
        Vector gate = AT(u);
        if (act_out) AT(act_out) = out;
        if (c) {
            EACH gate.at[v] = down(up(gate.at[v]) + up(c[column + v]));
            AT(u) = gate;
        }
        EACH out.at[v] = down(up(out.at[v]) * up(gate.at[v]));
    }
    AT(a_out) = out;
}"""
PRODUCTS = VECTOR + r"""
// dh = da u slope and du = da act; without u and act: dh = da slope
extern "C" __global__ void derive(const T* da, const T* u, const T* slope, const T* act, T* dh, T* du, long long n) {
    const long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * WIDE;
    if (i >= n) return;
    Vector d = AT(da), by = AT(slope), out;
    EACH out.at[v] = down(up(d.at[v]) * up(by.at[v]));
    if (u) {
        Vector gate = AT(u), a = AT(act), of_gate;
        EACH of_gate.at[v] = down(up(d.at[v]) * up(a.at[v]));
        EACH out.at[v] = down(up(down(up(d.at[v]) * up(gate.at[v]))) * up(by.at[v]));
        AT(du) = of_gate;
    }
    AT(dh) = out;
}
extern "C" __global__ void add_to(T* y, const T* x, long long n) {
    const long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * WIDE;
    if (i >= n) return;
    Vector a = AT(y), b = AT(x);
    EACH a.at[v] = down(up(a.at[v]) + up(b.at[v]));
    AT(y) = a;
}"""
THREADS = 256
NOTHING = np.uint64(0)      # a null pointer


@cache
def activate(name: str, dtype: np.dtype, with_slope: bool, wide: int) -> Any:
    """Find the kernel of an activation, with or without its derivative. Raises InputError for an unknown name."""
    if name not in BODIES:
        raise InputError(f"found activation {name!r}, expected one of {', '.join(BODIES)}")
    return kernel(FORWARD.replace("BODY", BODIES[name]), "activate", dtype,
                  (f"-DWIDE={wide}", f"-DSLOPE={int(with_slope)}"))


@cache
def elementwise(name: str, dtype: np.dtype, wide: int) -> Any:
    """Find a kernel of PRODUCTS."""
    return kernel(PRODUCTS, name, dtype, (f"-DWIDE={wide}",))


def over_vectors(function: Callable[[int], Any], arrays: Sequence[DeviceArray | None], *more: Any) -> None:
    """Launch a kernel on arrays of one size and dtype, 16 bytes a thread where rows and addresses allow it.

    Parameters
    ----------
    function : function
        function(wide) is the kernel that takes `wide` numbers a thread.
    arrays : sequence of arrays or None
        C-contiguous; None for a null pointer.
    *more
        The kernel's other arguments.
    """
    given = [x for x in arrays if x is not None]
    first, pointers = given[0], 0
    for x in given:
        pointers |= x.data.ptr
    wide = 16 // first.itemsize
    if first.shape[-1] % wide or pointers % 16:
        wide = 1
    launch(function(wide), -(-first.size // (wide * THREADS)), THREADS,
           tuple(NOTHING if x is None else x for x in (*arrays, *more)))


def activation_forward(name: str, h: DeviceArray, out: DeviceArray | None = None, derivative: DeviceArray | None = None,
                       bias: DeviceArray | None = None) -> tuple[DeviceArray, DeviceArray | None]:
    """Compute as mpitp.ops.activation.activation_forward."""
    out = cupy.empty_like(h) if out is None else out
    over_vectors(partial(activate, name, h.dtype, derivative is not None), (h, None, out, None, derivative),
                 bias, None, np.int64(h.size), np.int32(h.shape[-1]))
    return out, derivative


def activation_backward(da: DeviceArray, saved: DeviceArray, out: DeviceArray | None = None) -> DeviceArray:
    """Compute as mpitp.ops.activation.activation_backward."""
    out = cupy.empty_like(da) if out is None else out
    over_vectors(partial(elementwise, "derive", da.dtype), (da, None, saved, None, out, None), np.int64(da.size))
    return out


def gated_forward(name: str, h: DeviceArray, up: DeviceArray, bias: DeviceArray | None = None,
                  up_bias: DeviceArray | None = None, saved: bool = True) -> tuple[DeviceArray, tuple | None]:
    """Compute as mpitp.ops.activation.gated_forward."""
    a, act, slope = (cupy.empty_like(h), cupy.empty_like(h), h) if saved else (h, None, None)
    over_vectors(partial(activate, name, h.dtype, saved), (h, up, a, act, slope), bias, up_bias, np.int64(h.size),
                 np.int32(h.shape[-1]))
    return a, ((act, slope, up) if saved else None)


def gated_backward(da: DeviceArray, saved: tuple) -> tuple[DeviceArray, DeviceArray]:
    """Compute as mpitp.ops.activation.gated_backward."""
    (act, slope, up), du = saved, cupy.empty_like(da)
    over_vectors(partial(elementwise, "derive", da.dtype), (da, up, slope, act, da, du), np.int64(da.size))
    return da, du


def add_to(y: DeviceArray, x: DeviceArray) -> None:
    """Compute as mpitp.ops.activation.add_to."""
    if y.dtype == x.dtype and y.flags.c_contiguous and x.flags.c_contiguous:
        over_vectors(partial(elementwise, "add_to", y.dtype), (y, x), np.int64(y.size))
    else:
        y += x
