"""Waiting for rank 0 while it waits for a person: the other ranks sleep, and no limit of time counts."""
from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from ..errors import InputError
from .group import TensorParallelGroup

T = TypeVar("T")
ROUND = 0.005           # seconds that a rank sleeps between two looks


def on_root_in_its_time(group: TensorParallelGroup, function: Callable[[], T]) -> T | None:
    """Call function() on rank 0, and return its result there, None elsewhere, as group.on_root does.

    The others are not inside of a collective meanwhile: they use no processor, and the watchdog has nobody to warn of.
    Collective: an MPI_Ibarrier, then on_root.
    """
    result: T | None = None
    problem: str | None = None
    if group.rank == 0:
        try:
            result = function()
        except (ValueError, OSError) as error:
            problem = str(error)
    arrived = group.comm.Ibarrier()
    while not arrived.Test():
        time.sleep(ROUND)
    if group.any(problem is not None):
        raise InputError(group.comm.bcast(problem))
    return result
