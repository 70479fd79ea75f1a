"""One step of AdamW on flat arrays, elementwise: the bits do not depend on who holds which part."""
import numpy as np

from ..arrays import Array
from .twin import cuda_twin

PIECE = 1 << 15     # numbers at a time: a step is memory traffic, so what it makes stays in cache


@cuda_twin(by="w")
def adamw_step(w: Array, g: Array, m: Array, v: Array, *, beta1: float, beta2: float, rate: float, root: float,
               eps: float, decay: float, scale: float, rounded: Array | None = None) -> None:
    """Move w by one step of AdamW (Loshchilov and Hutter, arXiv 1711.05101), in place.

    m += (1 - beta1) (scale g - m), v += (1 - beta2) ((scale g)^2 - v), w = decay w - rate m / (root sqrt(v) + eps).

    Parameters
    ----------
    w, g, m, v : (n,) arrays
        Of one dtype: the weights, their gradients, which are not changed, and the averages of these and of their
        squares.
    beta1, beta2 : float
        How much of an average stays.
    rate : float
        lr / (1 - beta1^t) in step t, counted from 1.
    root : float
        (1 - beta2^t)^-1/2.
    eps : float
        Added to the denominator.
    decay : float
        1 - lr weight_decay, or 1.
    scale : float
        The factor of the gradients, for clipping.
    rounded : (n,) array or None
        Where w is copied to, rounded to the array's dtype.
    """
    for at in range(0, w.size, PIECE):
        w_n, g_n, m_n, v_n = (array[at:at + PIECE] for array in (w, g, m, v))
        g_n = g_n * scale if scale != 1 else g_n
        change_n = g_n - m_n
        change_n *= 1 - beta1
        m_n += change_n
        np.multiply(g_n, g_n, out=change_n)
        change_n -= v_n
        change_n *= 1 - beta2
        v_n += change_n
        np.sqrt(v_n, out=change_n)
        change_n *= root
        change_n += eps
        np.divide(m_n, change_n, out=change_n)
        change_n *= rate
        if decay != 1:
            w_n *= decay
        w_n -= change_n
    if rounded is not None:
        rounded[...] = w
