"""What makes the bits of a group's results the same for any number of ranks: one tree, one BLAS thread, one machine."""
from collections.abc import Callable
from functools import partial
from typing import Any

from ..errors import InputError
from . import launch
from .agreement import require_everywhere
from .tree import TreeSum
from .workers import Workers, one_blas_thread


def hold_bits(group: Any) -> Callable[[], None] | None:
    """Have a group sum in the tree, and on a CPU compute each block by one BLAS thread, spare cores other blocks.

    Collective. Raises InputError on every rank where BLAS cannot be held to one thread on any, or machines differ.

    Returns
    -------
    function or None
        Gives BLAS its threads back; None on a GPU.
    """
    group.sum_class, group.workers = getattr(group.transport, "sums", (None, TreeSum))[1], Workers(1)
    if group.device != "cpu":
        return None
    held: list[Callable[[], None]] = []
    try:
        require_everywhere(group.comm, "the machine type, and with it the bits of a product",
                           partial(hold_and_describe, held))
    except InputError:
        for give_back in held:
            give_back()
        raise
    group.workers = Workers(launch.share_of_cores(group.comm))
    return held[0]


def hold_and_describe(held: list) -> str:
    """Hold BLAS to one thread, add what gives its threads back to the list, and describe the machine."""
    held.append(one_blas_thread())
    return launch.machine()
