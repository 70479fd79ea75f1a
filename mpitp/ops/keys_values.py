"""Keys and values of the tokens so far: new ones go behind them, and the query of the newest attends to all.

Dimension key: B sequences, C capacity (positions), S new positions, G key/value heads, H query heads, K features of
a head.
"""
import numpy as np

from .attention import attention_forward
from .twin import cuda_twin


@cuda_twin(by="starts_B")
def append(held_BCGK, new_BSGK, starts_B):
    """held[b, starts[b]:starts[b] + S] = new[b], for each pair in two lists of arrays.

    starts_B : (B,) integers, where the arrays are
    """
    for held, new in zip(held_BCGK, new_BSGK):
        for b, start in enumerate(starts_B):
            held[b, start:start + new.shape[1]] = new[b]


@cuda_twin(by="q_BHK")
def last_query_forward(q_BHK, k_BCGK, v_BCGK, starts_B, scale, *, out, window=None, slopes=None):
    """out[b] = softmax(scale q[b] k^T + slope (key - query)) v over keys 0..starts[b]; the last key is the query's own.

    Parameters
    ----------
    q_BHK, out : H a multiple of G; query heads in the order of the key/value heads that they share
    starts_B : (B,) integers, where the arrays are: on a GPU they may change between the replays of a graph
    window, slopes : as attention_forward's, slopes (G, H / G)
    """
    (B, H, K), G = q_BHK.shape, k_BCGK.shape[2]
    for b in range(B):
        q, a = (x[b].reshape(G, H // G, 1, K) for x in (q_BHK, out))        # views: heads are split, not moved
        k, v = (x[b, :starts_B[b] + 1].swapaxes(0, 1) for x in (k_BCGK, v_BCGK))
        attention_forward(q, k, v, scale, out=a, window=window, slopes=slopes)
