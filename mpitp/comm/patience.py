"""Waiting for rank 0 while it waits for something else: the other ranks sleep, and leave it their cores.

MPI's own waiting is busy: measured, a tokenizer that takes 1.0 s on two cores of a job takes 1.8 s where a rank waits.
"""
from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

from ..errors import InputError
from .group import TensorParallelGroup

T = TypeVar("T")
SHORTEST, LONGEST = 0.002, 0.05         # seconds that a rank sleeps between two looks
SHARE = 0.02                            # of the time that it has waited, which the last look may be late


def on_root_asleep(group: TensorParallelGroup, function: Callable[[], T], in_its_time: bool = False) -> T | None:
    """Call function() on rank 0, and return its result there, None elsewhere, as group.on_root does, for long waits.

    The others use no processor meanwhile. Collective: an MPI_Ibarrier, then group.any.

    Parameters
    ----------
    group : TensorParallelGroup
    function : function of nothing
        What rank 0 does.
    in_its_time : bool, optional
        Whether that waits for a person: then the others are not inside of a collective, and no limit of time counts.
    """
    result: T | None = None
    problem: str | None = None
    if group.rank == 0:
        try:
            result = function()
        except (ValueError, OSError) as error:
            problem = str(error)
    sleep_until_all(group, None if in_its_time else "on_root")
    if group.any(problem is not None):
        raise InputError(group.comm.bcast(problem))
    return result


def sleep_until_all(group: TensorParallelGroup, name: str | None) -> None:
    """Return when every rank has called this. Collective: an MPI_Ibarrier, which the ledger records under this name."""
    with nullcontext() if name is None else group.ledger.record_control(name):
        arrived, began = group.comm.Ibarrier(), time.monotonic()
        while not arrived.Test():
            time.sleep(min(max(SHORTEST, SHARE * (time.monotonic() - began)), LONGEST))
