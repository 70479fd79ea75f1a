"""Stored tensors that are no parameters: is what a checkpoint holds there what the model computes without them?"""
from __future__ import annotations

import numpy as np

from ..config import DecoderConfig
from .safetensors import StoredTensor

PIECE = 1 << 20         # numbers that are compared at a time
CLOSE = 0.01            # of frequencies, relative: they may have been stored in 16 bits


def differ(a: StoredTensor, b: StoredTensor) -> bool:
    """Return whether two stored tensors of one shape hold different numbers, or a NaN; reads both by rows."""
    rows = max(1, PIECE // max(1, a.shape[1]))
    pieces = (slice(start, start + rows) for start in range(0, a.shape[0], rows))
    return not all(np.array_equal(a[piece], b[piece]) for piece in pieces)


def is_computed(tensor: StoredTensor, config: DecoderConfig) -> bool:
    """Return whether a stored buffer holds what its name says: inverse frequencies, causal mask, masked score.

    The last is any number: whatever stands there, a masked key has no weight.
    """
    if tensor.name.endswith(".inv_freq"):
        return are_frequencies(tensor, config)
    if tensor.name.endswith(".masked_bias"):
        return tensor.shape in ((), (1,))
    return is_causal_mask(tensor)


def are_frequencies(tensor: StoredTensor, config: DecoderConfig) -> bool:
    """Return whether a stored tensor holds base^(-2 i / dim) of the config's rotary positions, before any scaling."""
    for rotary in {config.rotary_of(layer) for layer in range(config.num_layers)} - {None}:
        assert rotary is not None
        dim = rotary.dim or config.head_dim
        exact = rotary.base ** (-np.arange(0, dim, 2) / dim)
        if tensor.shape == exact.shape and np.allclose(tensor[:], exact, rtol=CLOSE, atol=0):
            return True
    return False


def is_causal_mask(tensor: StoredTensor) -> bool:
    """Return whether a stored tensor (1, 1, S, S) is 1, or true, on and below the diagonal alone; reads it in parts."""
    if len(tensor.shape) != 4 or tensor.shape[:2] != (1, 1) or tensor.shape[2] != tensor.shape[3]:
        return False
    size = tensor.shape[2]
    rows = max(1, PIECE // max(1, size))
    for start in range(0, size, rows):
        mask = tensor[0, 0, start:start + rows]
        if not np.array_equal(mask, np.tri(len(mask), size, start, dtype=mask.dtype)):
            return False
    return True
