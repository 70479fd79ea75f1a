"""The largest logit and its token, of one rank's part of the vocabulary and then of all ranks.

Dimension key: P ranks, B sequences, V logits of a rank.
"""
import numpy as np

from ..arrays import Array
from .twin import cuda_twin

NONE = -1       # in the place of a token where the largest logit is not finite


@cuda_twin(by="logits_BV")
def greatest_of_rank(logits_BV: Array, first: int) -> Array:
    """Find the largest logit of each sequence and its id (B, 2), both float64; of equal ones the lowest id.

    A NaN is larger than all others. Where there are no logits it is -inf, of id 0.

    logits_BV : this rank's; column v is of id `first` + v
    """
    found_B2 = np.zeros((len(logits_BV), 2))
    found_B2[:, 0] = -np.inf
    if logits_BV.shape[1]:
        columns_B = logits_BV.argmax(axis=1)
        found_B2[:, 0] = logits_BV[np.arange(len(columns_B)), columns_B]
        found_B2[:, 1] = columns_B + first
    return found_B2


@cuda_twin(by="found_PB2")
def greatest_of_ranks(found_PB2: Array) -> Array:
    """Find the ids (B,), int64, of the largest of the ranks' (logit, id), of equal ones the lowest; or NONE."""
    rank_B = found_PB2[..., 0].argmax(axis=0)           # the first of equal ones, so the lowest id; NaN before all
    logits_B, ids_B = found_PB2[rank_B, np.arange(len(rank_B))].T
    return np.where(np.isfinite(logits_B), ids_B, NONE).astype(np.int64)
