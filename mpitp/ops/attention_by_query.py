"""Attention one query at a time: its bits do not depend on how many queries come at once, as a token or as a prompt.

Dimension key: G key/value heads, H query heads of each, Q queries, S keys, K features of a head.
"""
from typing import Any

import numpy as np

from ..arrays import Array
from .attention import attention_forward


def attention_by_query(q_GHQK: Array, k_GSK: Array, v_GSK: Array, scale: float, *, out: Array, causal: bool = True,
                       mask: Array | None = None, keep: Any = None, **options: Any) -> Array:
    """Compute as attention_forward; causal, without mask and dropout each query as generation computes its token."""
    if not causal or mask is not None or keep is not None:
        return attention_forward(q_GHQK, k_GSK, v_GSK, scale, out=out, causal=causal, mask=mask, keep=keep, **options)
    Q, S = q_GHQK.shape[2], k_GSK.shape[1]
    lse_GHQ = np.empty(q_GHQK.shape[:3], q_GHQK.dtype)
    for i in range(Q):
        one, seen = slice(i, i + 1), slice(0, S - Q + i + 1)
        lse_GHQ[:, :, one] = attention_forward(q_GHQK[:, :, one], k_GSK[:, seen], v_GSK[:, seen], scale,
                                               out=out[:, :, one], **options)
    return lse_GHQ
