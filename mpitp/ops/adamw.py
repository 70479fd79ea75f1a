"""One step of AdamW on flat arrays, elementwise: the bits do not depend on who holds which part."""
import numpy as np

from .twin import cuda_twin

PIECE = 1 << 15     # numbers at a time: a step is memory traffic, so what it makes stays in cache


@cuda_twin(by="w")
def adamw_step(w, g, m, v, *, beta1, beta2, rate, root, eps, decay, scale, rounded=None):
    """m += (1 - beta1) (g - m), v += (1 - beta2) (g^2 - v), w = decay w - rate m / (root sqrt(v) + eps); in place.

    Parameters
    ----------
    w, g, m, v : flat arrays of one dtype: weights, gradients (times `scale`; not changed), and their averages
    rate, root : lr / (1 - beta1^t), (1 - beta2^t)^-1/2
    decay : 1 - lr weight_decay, or 1
    rounded : an array that w is copied to, rounded to its dtype; or None
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
