"""Data x tensor: the ranks of a communicator as a grid, each row of which shares one copy of a model.

    6 ranks, data = 2, tensor = 3
                          tensor rank 0   tensor rank 1   tensor rank 2
    data rank 0               0               1               2             a copy of the model, the first sequences
    data rank 1               3               4               5             a copy of the model, the other sequences

A row is a tensor group, whose ranks hold different slices and see the same tokens. A column is a data group, whose
ranks hold the same slices and see different tokens: their gradients are added up once a step.
"""
from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from .comm.agreement import require_everywhere
from .comm.group import TensorParallelGroup
from .errors import InputError, require, require_positive


class Grid:
    """A grid of ranks: data groups times tensor groups.

    Parameters
    ----------
    comm : mpi4py communicator, optional
        Default MPI.COMM_WORLD.
    data : int
        Ranks of a data group, which is how many copies of the model there are.
    tensor : int, optional
        Ranks of a tensor group. None: the communicator's ranks over `data`.
    **options
        Of TensorParallelGroup, for all three groups: device, reproducible, blocks, check, transport, ...

    Attributes
    ----------
    tensor : TensorParallelGroup
        The ranks that share this rank's copy of the model: what layers are made with. They are neighbours, so that
        they are on one node where the launcher fills one node after the other and `tensor` divides its ranks.
    data : TensorParallelGroup
        The ranks that hold the same slices as this one, in order.
    world : TensorParallelGroup
        All ranks of the grid.

    Raises
    ------
    InputError
        On every rank, where data x tensor is not the number of ranks, where ranks disagree on these arguments, and as
        TensorParallelGroup does.

    Notes
    -----
    Collective: the constructor and close(). As a context manager it ends the whole job when the body raises on any
    rank, as TensorParallelGroup does.
    """

    def __init__(self, comm: Any = None, *, data: int = 1, tensor: int | None = None, **options: Any):
        self.world = TensorParallelGroup(comm, **options)
        try:
            require_everywhere(self.world.comm, "the grid", lambda: self._describe(data, tensor))
        except InputError:                          # raised on every rank
            self.world.close()
            raise
        columns = self.world.size // data
        self.tensor: Any = self.world.subgroup(self.world.rank // columns)
        self.data: Any = self.world.subgroup(self.world.rank % columns)

    def _describe(self, data: int, tensor: int | None) -> str:
        require_positive(data=data, tensor=1 if tensor is None else tensor)
        ranks = self.world.size
        if tensor is None:
            require(ranks % data == 0, f"{ranks} ranks for data = {data}", f"a multiple of {data}")
        else:
            require(data * tensor == ranks, f"data = {data} x tensor = {tensor} on {ranks} ranks",
                    f"a product of {ranks}")
        return f"data={data} tensor={tensor}"

    def close(self) -> None:
        """Free the three groups. Collective."""
        self._close_parts()
        self.world.close()

    def _close_parts(self) -> None:
        self.data.close()
        self.tensor.close()

    def __enter__(self) -> Grid:
        self.world.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if error is None:
            self._close_parts()
        self.world.__exit__(kind, error, trace)
        if error is not None and not self.world.comm:       # every rank leaves with the same bad input
            self._close_parts()


def on_first_copy(world: TensorParallelGroup, data: TensorParallelGroup, function: Callable[[], Any]) -> None:
    """Call function() on the ranks of data rank 0, which have rank 0 of the world among them.

    Collective: a broadcast, control. An InputError of theirs, which all of them raise, is raised on every rank.
    """
    problem = ""
    if data.rank == 0:
        try:
            function()
        except InputError as error:
            problem = str(error)
    with world.ledger.record_control("on_first_copy"):
        problem = world.comm.bcast(problem)
    if problem:
        raise InputError(problem)
