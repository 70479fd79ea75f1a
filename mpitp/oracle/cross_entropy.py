"""The cross entropy loss on one process.

Dimension key: V vocabulary; ... any number of axes of tokens.

Source of label smoothing: C. Szegedy et al., arXiv 1512.00567, section 7.
"""
from typing import Any

import numpy as np

from ..arrays import Array
from .embedding import one_hot
from .magnitude import numbers_of


def forward(logits: Array, targets: Array, label_smoothing: float = 0.0, ignore_index: int = -100,
            z_loss: float = 0.0) -> tuple[Array, Any]:
    """Compute the mean over counted tokens of (1 - s) (lse - z_target) + s (lse - mean z) + w lse^2, lse = ln sum e^z.

    Parameters
    ----------
    logits : (..., V) array or Magnitude
        z of every token.
    targets : (...) array of int
        The right token, or `ignore_index` for a token that does not count.
    label_smoothing : float
        s, the part of the label that is spread evenly over the vocabulary.
    ignore_index : int
    z_loss : float
        w, the weight of lse^2 (Chowdhery et al., arXiv 2204.02311, section 5).

    Returns
    -------
    loss : () array or Magnitude
        0 where no token counts.
    saved : object
        What `backward` needs.
    """
    V, counted = logits.shape[-1], targets != ignore_index
    count = max(1, int(counted.sum()))
    highest = numbers_of(logits).max(axis=-1, keepdims=True)
    e = np.exp(logits - highest)
    total = e.sum(axis=-1, keepdims=True)
    lse = (np.log(total) + highest)[..., 0]
    label = one_hot(np.where(counted, targets, 0), V, logits.dtype) * (1 - label_smoothing)
    label = label + np.asarray(label_smoothing / V, logits.dtype)
    of_token, slope = lse - (logits * label).sum(axis=-1), e / total
    if z_loss:
        weight = logits.dtype.type(z_loss)
        of_token, slope = of_token + lse * lse * weight, slope * (lse[..., None] * (2 * weight) + 1)
    loss = (of_token * counted.astype(logits.dtype)).sum() / count
    return loss, (slope, label, (counted / count).astype(logits.dtype))


def backward(saved: Any, d_loss: float = 1.0) -> Array:
    """dz = d_loss ((1 + 2 w lse) softmax z - label) / counted tokens

    Parameters
    ----------
    saved : object
        From `forward`.
    d_loss : float
        The gradient of the loss.

    Returns
    -------
    d_logits : (..., V) array or Magnitude
    """
    slope, label, share = saved                 # slope: of what depends on lse alone; share: of each token in the mean
    return (slope - label) * (share * share.dtype.type(d_loss))[..., None]
