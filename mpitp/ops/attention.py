"""Softmax attention of one sequence, in tiles of queries: memory grows with the sequence, not with its square.

A tile sees all keys that its queries may attend to at once, so that its softmax is the plain one; backward
computes the probabilities again from the logarithm of each row's sum (Dao et al., arXiv 2205.14135).

Dimension key: G key/value heads, H query heads of each, Q queries, S keys, K features of a head; T queries of one
tile, V the keys that it sees; g and h mark the heads that are computed at once.

The bits of a result depend on the content of a query head and of its key/value head alone, not on G, H or strides.
"""
from collections.abc import Callable, Iterator
from math import inf

import numpy as np

from ..arrays import Array
from .linear import NARROW
from .softcap import softcap_forward, softcap_slope
from .twin import cuda_twin

TILE = 64               # queries; fixed, since it is part of the bits
SCORES = 1 << 17        # scores of as many heads as are computed at once: these stay in cache. Not part of the bits
Keep = Callable[[int, int], Array]      # keep(first query, the one after the last): see attention_forward


@cuda_twin(by="q_GHQK")
def attention_forward(q_GHQK: Array, k_GSK: Array, v_GSK: Array, scale: float, *, out: Array, causal: bool = True,
                      window: int | None = None, softcap: float | None = None, slopes: Array | None = None,
                      mask: Array | None = None, keep: Keep | None = None) -> Array:
    """Compute out = (softmax(scale q k^T + slope (key - query)) keep) v, over the keys that each query may attend to.

    Query i stands at position S - Q + i and key j at j, so Q < S continues a sequence. A query that may attend to
    nothing gets 0.

    Parameters
    ----------
    q_GHQK : (G, H, Q, K) array
        With any strides, Q <= S.
    k_GSK, v_GSK : (G, S, K) arrays
        With any strides.
    scale : float
        Of the scores.
    out : (G, H, Q, K) array
        With any strides; the result is written to it.
    causal : bool
        Whether a query attends to no later key.
    window : int or None
        A query attends to keys less than `window` positions away from it; None for all.
    softcap : float or None
        c: scores are c tanh(score / c), before ALiBi's are added.
    slopes : (G, H) array or None
        Of ALiBi (Press et al., arXiv 2108.12409).
    mask : (S,) or (Q, S) array of bool or None
        True where a key may be attended to.
    keep : function or None
        keep(first, stop) gives what dropout multiplies the weights of these queries by, (G, H, stop - first, S) of q's
        dtype: 0 or 1/(1-p).

    Returns
    -------
    lse_GHQ : (G, H, Q) array
        The logarithm of the sum of e^score of each query, 0 where it may attend to nothing.
    """
    G, H, Q, K = q_GHQK.shape
    k_GSK, v_GSK = without_gaps(k_GSK), without_gaps(v_GSK)
    if Q == 1 and mask is None and keep is None and G * H:
        return attend_last_query(q_GHQK, k_GSK, v_GSK, scale, out, window, softcap, slopes)
    tiles = Tiles(q_GHQK, k_GSK, causal, window, slopes, mask)
    lse_GHQ, ones_S1 = np.empty((G, H, Q), q_GHQK.dtype), np.ones((tiles.S, 1), q_GHQK.dtype)
    for first, stop, seen in tiles:
        keep_GHTS = None if keep is None else keep(first, stop)
        for g, h in tiles.heads(stop - first, seen):
            q_ghTK = q_GHQK[g, h, first:stop].copy(order="C")
            q_ghTK *= float(scale)
            s_ghTV = tiles.product(0, q_ghTK, k_GSK[g, seen])
            if softcap is not None:
                softcap_forward(s_ghTV, softcap)
            tiles.bias_and_hide(s_ghTV, g, h, first, stop, seen)
            peak_ghT1 = s_ghTV.max(axis=-1, keepdims=True)
            if mask is not None:
                peak_ghT1[peak_ghT1 == -inf] = 0                # nothing to attend to: a row of e^-inf = 0
            s_ghTV -= peak_ghT1
            np.exp(s_ghTV, out=s_ghTV)
            sum_ghT1 = np.matmul(s_ghTV, ones_S1[seen])         # four times as fast as sum()
            if mask is not None:
                sum_ghT1[sum_ghT1 == 0] = 1
            if keep_GHTS is not None:
                s_ghTV *= keep_GHTS[g, h, :, seen]
            np.divide(np.matmul(s_ghTV, v_GSK[g, None, seen]), sum_ghT1, out=out[g, h, first:stop])
            lse_GHQ[g, h, first:stop] = (np.log(sum_ghT1) + peak_ghT1)[..., 0]
    return lse_GHQ


def attend_last_query(q_GH1K: Array, k_GSK: Array, v_GSK: Array, scale: float, out: Array, window: int | None,
                      softcap: float | None, slopes: Array | None) -> Array:
    """Do attention_forward for Q = 1, a token of generation: the same steps, without tiles and hidden keys."""
    V = k_GSK.shape[1] if window is None else min(window, k_GSK.shape[1])
    k_GVK, v_GVK = k_GSK[:, -V:], v_GSK[:, -V:]
    s_GH1V = np.matmul(q_GH1K * float(scale), transposed(k_GVK)[:, None])
    if softcap is not None:
        softcap_forward(s_GH1V, softcap)
    if slopes is not None:
        s_GH1V += np.asarray(slopes, s_GH1V.dtype)[..., None, None] * np.arange(1 - V, 1, dtype=s_GH1V.dtype)
    peak_GH11 = s_GH1V.max(axis=-1, keepdims=True)
    s_GH1V -= peak_GH11
    np.exp(s_GH1V, out=s_GH1V)
    sum_GH11 = np.matmul(s_GH1V, np.ones((V, 1), s_GH1V.dtype))
    np.divide(np.matmul(s_GH1V, v_GVK[:, None]), sum_GH11, out=out)
    return (np.log(sum_GH11) + peak_GH11)[..., 0]


@cuda_twin(by="q_GHQK")
def attention_backward(dout_GHQK: Array, lse_GHQ: Array, q_GHQK: Array, k_GSK: Array, v_GSK: Array, out: Array,
                       scale: float, *, dq: Array, dk: Array | None = None, dv: Array | None = None,
                       causal: bool = True, window: int | None = None, softcap: float | None = None,
                       slopes: Array | None = None, mask: Array | None = None,
                       keep: Keep | None = None) -> tuple[Array, Array]:
    """Compute the gradients of attention_forward.

    p = e^(score - lse), dv = (p keep)^T dout, ds = p (keep dout v^T - delta) where delta = sum(dout out) of each row,
    dq = scale ds k, dk = scale ds^T q.

    Parameters
    ----------
    dout_GHQK : (G, H, Q, K) array
        The gradient of out.
    lse_GHQ : (G, H, Q) array
        What attention_forward returned.
    q_GHQK, k_GSK, v_GSK, out, scale, causal, window, softcap, slopes, mask, keep
        As in attention_forward; `out` is its result.
    dq : (G, H, Q, K) array
        The gradient of q is written to it.
    dk, dv : (G, S, K) arrays or None
        Where the gradients of k and v go; None for new arrays.

    Returns
    -------
    dk_GSK, dv_GSK : (G, S, K) arrays
        Summed tile by tile, and in each tile over the H query heads in their order.
    """
    K = q_GHQK.shape[-1]
    k_GSK, v_GSK = without_gaps(k_GSK), without_gaps(v_GSK)
    dk_GSK, dv_GSK = np.zeros(k_GSK.shape, k_GSK.dtype), np.zeros(v_GSK.shape, v_GSK.dtype)
    tiles, ones_K1 = Tiles(q_GHQK, k_GSK, causal, window, slopes, mask), np.ones((K, 1), q_GHQK.dtype)
    for first, stop, seen in tiles:
        keep_GHTS = None if keep is None else keep(first, stop)
        for g, h in tiles.heads(stop - first, seen):
            q_ghTK = q_GHQK[g, h, first:stop].copy(order="C")
            q_ghTK *= float(scale)
            p_ghTV = tiles.product(0, q_ghTK, k_GSK[g, seen])
            if softcap is not None:
                softcap_forward(p_ghTV, softcap)
                slope_ghTV = softcap_slope(p_ghTV, softcap)
            tiles.bias_and_hide(p_ghTV, g, h, first, stop, seen)
            p_ghTV -= lse_GHQ[g, h, first:stop, None]
            np.exp(p_ghTV, out=p_ghTV)

            dout_ghTK, out_ghTK = (x[g, h, first:stop].copy(order="C") for x in (dout_GHQK, out))
            delta_ghT1 = np.matmul(np.multiply(out_ghTK, dout_ghTK, out=out_ghTK), ones_K1)
            ds_ghTV, kept_ghTV = tiles.product(1, dout_ghTK, v_GSK[g, seen]), p_ghTV
            if keep_GHTS is not None:
                ds_ghTV *= keep_GHTS[g, h, :, seen]
                kept_ghTV = p_ghTV * keep_GHTS[g, h, :, seen]
            ds_ghTV -= delta_ghT1
            ds_ghTV *= p_ghTV
            if softcap is not None:
                ds_ghTV *= slope_ghTV

            add_heads(dv_GSK[g, seen], np.matmul(transposed(kept_ghTV), dout_ghTK))
            add_heads(dk_GSK[g, seen], np.matmul(transposed(ds_ghTV), q_ghTK))
            np.multiply(np.matmul(ds_ghTV, k_GSK[g, None, seen]), float(scale), out=dq[g, h, first:stop])
    return written(dk_GSK, dk), written(dv_GSK, dv)         # which are added up without gaps


def written(x: Array, out: Array | None) -> Array:
    """Copy x to `out` if given; return the array that holds it."""
    if out is None:
        return x
    out[...] = x
    return out


class Tiles:
    """The tiles of queries, what each may attend to, and the buffers that all use again.

    The parameters are those of attention_forward.
    """

    def __init__(self, q_GHQK: Array, k_GSK: Array, causal: bool, window: int | None, slopes: Array | None,
                 mask: Array | None) -> None:
        self.dtype = q_GHQK.dtype
        self.G, self.H, self.Q = q_GHQK.shape[:3]
        self.S, self.causal, self.window = k_GSK.shape[1], causal, window
        self.slopes_GH = None if slopes is None else np.asarray(slopes, self.dtype)
        self.mask = None if mask is None else np.broadcast_to(mask, (self.Q, self.S))
        self.above_TT = np.arange(min(TILE, self.Q)) > np.arange(min(TILE, self.Q))[:, None]
        self.buffers: dict[int, Array] = {}

    def __iter__(self) -> Iterator[tuple[int, int, slice]]:
        """Yield the first query of each tile, the one after its last, and the slice of the keys that it sees."""
        for first in range(0, self.Q, TILE):
            stop = min(first + TILE, self.Q)
            yield first, stop, slice(max(0, self.start(first)), min(self.S, self.end(stop - 1)))

    def start(self, query: int) -> int:
        """Find the first position in the query's window, which is negative if it lies before the first key."""
        return 0 if self.window is None else self.S - self.Q + query - self.window + 1

    def end(self, query: int) -> int:
        """Find the position behind the last one that the query sees, which may lie behind the last key."""
        ahead = 1 if self.causal else self.window or self.S
        return self.S - self.Q + query + ahead

    def heads(self, queries: int, seen: slice) -> Iterator[tuple[slice, slice]]:
        """Yield slices of G and of H: the heads that are computed at once."""
        most = max(1, SCORES // (queries * (seen.stop - seen.start)))
        groups, heads = max(1, most // max(1, self.H)), min(most, max(1, self.H))
        for g in range(0, self.G, groups):
            for h in range(0, self.H, heads):
                yield slice(g, min(g + groups, self.G)), slice(h, min(h + heads, self.H))

    def product(self, number: int, x_ghTK: Array, y_gVK: Array) -> Array:
        """Compute x y^T in buffer `number`, without gaps: fresh arrays of this size would cost page faults."""
        (g, h, T, _), V = x_ghTK.shape, y_gVK.shape[1]
        if number not in self.buffers or self.buffers[number].size < g * h * T * V:
            self.buffers[number] = np.empty(g * h * T * V, self.dtype)
        product_ghTV = self.buffers[number][:g * h * T * V].reshape(g, h, T, V)
        return np.matmul(x_ghTK, transposed(y_gVK)[:, None], out=product_ghTV)

    def bias_and_hide(self, s_ghTV: Array, g: slice, h: slice, first: int, stop: int, seen: slice) -> None:
        """Add slope (key - query) to the scores, and make them -inf where the query may not attend to the key."""
        T = stop - first
        if self.slopes_GH is not None:
            queries_T1 = np.arange(self.S - self.Q + first, self.S - self.Q + stop, dtype=self.dtype)[:, None]
            distance_TV = np.arange(seen.start, seen.stop, dtype=self.dtype) - queries_T1
            s_ghTV += self.slopes_GH[g, h, None, None] * distance_TV
        if self.causal:                                     # the tile ends at its last query: hide above the diagonal
            np.copyto(s_ghTV[..., -T:], -inf, where=self.above_TT[:T, :T])
        if self.start(stop - 1) > 0:                        # where the windows begin: hide below the diagonal
            before = seen.start - self.start(first)         # columns of the diagonal that lie before the first key
            np.copyto(s_ghTV[..., :T - before], -inf, where=self.above_TT.T[:T, before:T])
        if not self.causal and self.window is not None:     # where the windows end: hide above the diagonal
            behind_T1 = np.arange(self.end(first), self.end(stop))[:, None]
            np.copyto(s_ghTV, -inf, where=np.arange(seen.start, seen.stop) >= behind_T1)
        if self.mask is not None:
            np.copyto(s_ghTV, -inf, where=~self.mask[first:stop, seen])


def transposed(x: Array) -> Array:
    """Return a view of each matrix of a stack with its axes exchanged."""
    return x.swapaxes(-1, -2)


def without_gaps(x_GSK: Array) -> Array:
    """Return a C-contiguous copy of x, or x itself where BLAS adds up its rows as it would those of the copy.

    To copy all keys for every token would be what generation spends its time on.
    """
    (_, row, feature), K, size = x_GSK.strides, x_GSK.shape[-1], x_GSK.itemsize
    same_bits = K > NARROW and feature == size and row >= K * size and row % size == 0
    return x_GSK if same_bits else np.ascontiguousarray(x_GSK)


def add_heads(total_gVK: Array, parts_ghVK: Array) -> None:
    """Add each head's part to the total, head by head."""
    for h in range(parts_ghVK.shape[1]):
        total_gVK += parts_ghVK[:, h]
