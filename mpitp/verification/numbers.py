"""Random inputs that are the same on every rank and for any number of ranks: addressed by seed and name."""
from typing import Any

import numpy as np

from ..arrays import Array
from ..sharding import rng


def standard_normals(seed: int, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
    """Return standard normals on the host."""
    return rng.normals(rng.key(seed, name), 0, int(np.prod(shape))).reshape(shape).astype(dtype)


def token_ids(seed: int, name: str, shape: tuple[int, ...], vocab_size: int) -> Array:
    """Return token ids below vocab_size on the host."""
    words = rng.words(rng.key(seed, name), 0, int(np.prod(shape)))
    return (words % np.uint64(vocab_size)).astype(np.int64).reshape(shape)
