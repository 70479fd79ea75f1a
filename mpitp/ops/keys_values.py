"""The keys and values of the tokens so far: new ones go behind them, and the newest token's query attends to all.

Dimension key: B sequences, C capacity (positions), S new positions, G key/value heads, H query heads, K features of
a head.
"""
from collections.abc import Sequence

from ..arrays import Array
from .attention import attention_forward
from .twin import cuda_twin


@cuda_twin(by="starts_B")
def append(held_BCGK: Sequence[Array], new_BSGK: Sequence[Array], starts_B: Array) -> None:
    """Copy new[b] to held[b, starts[b]:starts[b] + S], for each of the keys and the values.

    Parameters
    ----------
    held_BCGK : pair of (B, C, G, K) arrays
        The keys and the values so far.
    new_BSGK : pair of (B, S, G, K) arrays
        The new ones.
    starts_B : (B,) array of integers
        On the arrays' device.
    """
    for held, new in zip(held_BCGK, new_BSGK):
        for b, start in enumerate(starts_B):
            held[b, start:start + new.shape[1]] = new[b]


@cuda_twin(by="q_BHK")
def last_query_forward(q_BHK: Array, k_BCGK: Array, v_BCGK: Array, starts_B: Array, scale: float, *, out: Array,
                       window: int | None = None, softcap: float | None = None, slopes: Array | None = None) -> None:
    """Compute out[b] = softmax(scale q[b] k^T + slope (key - query)) v over the keys 0 to starts[b].

    Parameters
    ----------
    q_BHK : (B, H, K) array
        The query of the newest token of each sequence, whose own key is the one at starts[b]. H is a multiple of G:
        the query heads lie in the order of the key/value heads that they share.
    k_BCGK, v_BCGK : (B, C, G, K) arrays
    starts_B : (B,) array of integers
        On the arrays' device: on a GPU they may change between the replays of a graph.
    scale : float
        Of the scores.
    out : (B, H, K) array
        Where the result goes.
    window, softcap : int or None, float or None
        As in attention_forward.
    slopes : (G, H / G) array or None
        As in attention_forward.
    """
    (B, H, K), G = q_BHK.shape, k_BCGK.shape[2]
    for b in range(B):
        q, a = (x[b].reshape(G, H // G, 1, K) for x in (q_BHK, out))        # views: heads are split, not moved
        k, v = (x[b, :starts_B[b] + 1].swapaxes(0, 1) for x in (k_BCGK, v_BCGK))
        attention_forward(q, k, v, scale, out=a, window=window, softcap=softcap, slopes=slopes)
