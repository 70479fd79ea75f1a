"""Gather and scatter, the ways between a whole last axis and its parts, each beside its adjoint.

What the forward pass does not communicate, the backward pass does, and the other way round.
"""
from typing import Any

from ..arrays import Array
from ..sharding.partition import Partition


def gather_from_ranks_forward(x_local: Array, partition: Partition, group: Any) -> Array:
    """Put the ranks' parts of the last axis side by side, on every rank. Collective: one all-gather."""
    return group.all_gather(x_local, partition, axis=-1)


def gather_from_ranks_backward(dy: Array, partition: Partition, group: Any) -> Array:
    """Return the slice of dy that is this rank's: every rank uses the whole in the same way, so dy is complete."""
    return split(dy, partition, group)


def scatter_to_ranks_forward(x: Array, partition: Partition, group: Any) -> Array:
    """Take this rank's part of the last axis."""
    return split(x, partition, group)


def scatter_to_ranks_backward(dy_local: Array, partition: Partition, group: Any) -> Array:
    """Put the parts of dy side by side, on every rank, as each rank used its part only. Collective: one all-gather."""
    return group.all_gather(dy_local, partition, axis=-1)


def split(x: Array, partition: Partition, group: Any) -> Array:
    """Return this rank's part of the last axis, C-contiguous."""
    return group.xp.ascontiguousarray(x[..., partition.range(group.rank)])
