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
    by_node : bool
        Whether ranks change places where the launcher's order has tensor groups on several nodes that fit into one.
    **options
        Of TensorParallelGroup, for all three groups: device, reproducible, blocks, check, transport, ...

    Attributes
    ----------
    tensor : TensorParallelGroup
        The ranks that share this rank's copy of the model: what layers are made with. They follow each other in the
        world, and are on one node wherever `tensor` ranks of a node are left.
    data : TensorParallelGroup
        The ranks that hold the same slices as this one, in order.
    world : TensorParallelGroup
        All ranks of the grid: in the launcher's order, or one by nodes in which rank 0 is the same.

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

    def __init__(self, comm: Any = None, *, data: int = 1, tensor: int | None = None, by_node: bool = True,
                 **options: Any):
        self.world: Any = TensorParallelGroup(comm, **options)
        self._launched: Any = None                  # the world in the launcher's order, where that is another one
        try:
            require_everywhere(self.world.comm, "the grid",
                               lambda: f"{self._describe(data, tensor)} by_node={bool(by_node)}")
        except InputError:                          # raised on every rank
            self.world.close()
            raise
        columns = self.world.size // data
        if by_node and 1 < columns < self.world.size:
            self._order_by_node(columns)
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

    def _order_by_node(self, tensor: int) -> None:
        """Give the world an order that has tensor groups inside of nodes. Collective."""
        from .comm.grid_nodes import nodes_of, order_by_node
        with self.world.ledger.record_control("nodes"):
            order = order_by_node(nodes_of(self.world.comm), tensor)
        if order != list(range(self.world.size)):
            self._launched = self.world
            self.world = self._launched.subgroup(0, key=order.index(self._launched.rank))

    def close(self) -> None:
        """Free the groups. Collective."""
        self._close_parts()
        self.world.close()
        self._close_launched()

    def _close_launched(self) -> None:
        if self._launched:
            self._launched.close()

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
        if not self.world.comm:
            self._close_launched()


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
