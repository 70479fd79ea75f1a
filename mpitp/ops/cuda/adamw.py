"""One step of AdamW on the GPU: every array is read and written once."""
import numpy as np

from ...arrays import DeviceArray
from .kernel import kernel, launch

THREADS, EACH = 256, 4      # numbers a thread moves
SOURCE = r"""
extern "C" __global__ void adamw(A* w, const A* g, A* m, A* v, T* rounded, long long n, A beta1, A beta2, A rate,
                                 A root, A eps, A decay, A scale) {
    #pragma unroll
    for (int j = 0; j < EACH; j++) {
        const long long i = ((long long)blockIdx.x * EACH + j) * blockDim.x + threadIdx.x;
        if (i >= n) return;
        const A grown = g[i] * scale, first = m[i] + (grown - m[i]) * (1 - beta1);
        const A second = v[i] + (grown * grown - v[i]) * (1 - beta2);
        const A moved = w[i] * decay - rate * (first / (sqrt(second) * root + eps));
        m[i] = first;
        v[i] = second;
        w[i] = moved;
        if (rounded) rounded[i] = down(moved);
    }
}"""


def adamw_step(w: DeviceArray, g: DeviceArray, m: DeviceArray, v: DeviceArray, *, beta1: float, beta2: float,
               rate: float, root: float, eps: float, decay: float, scale: float,
               rounded: DeviceArray | None = None) -> None:
    """Compute as mpitp.ops.adamw.adamw_step."""
    numbers = [w.dtype.type(number) for number in (beta1, beta2, rate, root, eps, decay, scale)]
    launch(kernel(SOURCE, "adamw", w.dtype if rounded is None else rounded.dtype, (f"-DEACH={EACH}",)),
           -(-w.size // (THREADS * EACH)), THREADS,
           (w, g, m, v, np.uint64(0) if rounded is None else rounded, np.int64(w.size), *numbers))
