"""The transport of host arrays: MPI on the buffers themselves, in messages that its 32-bit counts can hold."""
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from mpi4py import MPI

from ..arrays import Array, module_of
from ..errors import require

TRANSPORTS = ("auto", "mpi", "nccl", "staged", "peer")
OPERATIONS = {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}
# MPI counts are 32-bit integers, and some libraries count bytes in them on the way.
MESSAGE_BYTES = 1 << 30


def messages(length: int, itemsize: int, message_bytes: int) -> list[slice]:
    """Return slices that cut `length` elements into messages of at most message_bytes."""
    step = max(1, message_bytes // itemsize)
    return [slice(at, min(at + step, length)) for at in range(0, length, step)]


def requested_transport(transport: str) -> str:
    """Return the name asked for: the argument, or MPITP_TRANSPORT where that is "auto"."""
    if transport == "auto":
        transport = os.environ.get("MPITP_TRANSPORT", "auto")
    require(transport in TRANSPORTS, f"transport {transport!r}", f"one of {', '.join(TRANSPORTS)}")
    return transport


def host_transport(comm: MPI.Comm, transport: str) -> "MpiTransport":
    """Return the transport of host arrays. Raises InputError where another one is asked for."""
    asked = requested_transport(transport)
    require(asked in ("auto", "mpi"), f"transport {asked!r} on device 'cpu'", "'mpi', which host arrays travel by")
    return MpiTransport(comm)


def concatenate(parts: list[Array]) -> Array:
    """Return the parts of one array module, one after the other."""
    xp: Any = module_of(parts[0])
    return xp.concatenate(parts)


class MpiTransport:
    """MPI on the arrays themselves, which lie on the host.

    Arrays are flat or C-contiguous; counts are elements per rank. Every method but close() is collective.

    Parameters
    ----------
    comm : mpi4py communicator
        Of the ranks.
    """
    name = "mpi"
    how = "host arrays"         # why it is this transport, for `doctor`
    overlaps = records = False  # hardly any MPI makes progress while none of its functions runs, in no CUDA graph

    def __init__(self, comm: MPI.Comm):
        self.comm, self.message_bytes = comm, MESSAGE_BYTES

    def all_reduce(self, x: Array, op: str) -> None:
        """Make x the sum (max, min) over the ranks, in place."""
        flat = x.reshape(-1)
        if flat.nbytes <= self.message_bytes:
            self.comm.Allreduce(MPI.IN_PLACE, flat, OPERATIONS[op])
            return
        for part in messages(flat.size, flat.itemsize, self.message_bytes):
            self.comm.Allreduce(MPI.IN_PLACE, flat[part], OPERATIONS[op])

    def begin_all_reduce(self, x: Array, op: str) -> Callable[[], object]:
        """Start all_reduce(x, op); returns a function that waits for it. x must be left alone until then."""
        flat = x.reshape(-1)
        requests = [self.comm.Iallreduce(MPI.IN_PLACE, flat[part], OPERATIONS[op])
                    for part in messages(flat.size, flat.itemsize, self.message_bytes)]
        return partial(MPI.Request.Waitall, requests)

    def all_gather(self, send: Array, receive: Array, counts: list[int]) -> None:
        """Make `receive` the send arrays of all ranks, one after the other. Equal counts take MPI_Allgather."""
        if min(counts) == max(counts) and receive.nbytes <= self.message_bytes:
            self.comm.Allgather(send, receive)
            return
        for part, part_counts, offsets in self.vector_messages(counts, receive.itemsize):
            self.comm.Allgatherv(send[part], [receive, (part_counts, offsets)])

    def gather(self, send: Array, receive: Array | None, counts: list[int], root: int) -> None:
        """Make `receive` on root the send arrays of all ranks, one after the other; it is None elsewhere."""
        for part, part_counts, offsets in self.vector_messages(counts, send.itemsize):
            self.comm.Gatherv(send[part], None if receive is None else [receive, (part_counts, offsets)], root)

    def reduce_scatter(self, send: Array, receive: Array, counts: list[int], op: str) -> None:
        """Make `receive` this rank's run of the sum (max, min) of the send arrays, which `counts` cut."""
        for part, part_counts, offsets in self.vector_messages(counts, send.itemsize):
            if part_counts == list(counts):
                message = send
            else:                                           # what each rank gets of it lies apart
                message = concatenate([send[at:at + n] for at, n in zip(offsets, part_counts)])
            self.reduce_scatter_message(message, receive[part], part_counts, op)

    def reduce_scatter_message(self, message: Array, receive: Array, counts: list[int], op: str) -> None:
        """Call MPI_Reduce_scatter on one message."""
        self.comm.Reduce_scatter(message, receive, counts, OPERATIONS[op])

    def all_to_all(self, send: Array, send_counts: list[int], receive: Array, receive_counts: list[int]) -> None:
        """Send run p of `send` to rank p; `receive` becomes what every rank sent here, one after the other."""
        # Counts that are all one number must be that number on every rank, or on none: those of the tree are.
        if send_counts[0] and send_counts == receive_counts and min(send_counts) == max(send_counts):
            self.comm.Alltoall(send, receive)
        else:
            self.comm.Alltoallv([send, send_counts], [receive, receive_counts])

    def broadcast(self, x: Array, root: int) -> None:
        """Make x root's x, in place."""
        flat = x.reshape(-1)
        for part in messages(flat.size, flat.itemsize, self.message_bytes):
            self.comm.Bcast(flat[part], root)

    def close(self) -> None:
        """Give nothing back: the communicator is the group's."""

    def vector_messages(self, counts: list[int], itemsize: int) -> Iterator[tuple[slice, list[int], list[int]]]:
        """Cut a gather of `counts` elements a rank: yield (this rank's slice, counts, offsets) of each message."""
        starts = [sum(counts[:p]) for p in range(len(counts))]
        step = max(1, self.message_bytes // itemsize // len(counts))
        mine = counts[self.comm.rank]
        for at in range(0, max(max(counts), 1), step):
            part_counts = [max(0, min(step, n - at)) for n in counts]
            offsets = [start + min(at, n) for start, n in zip(starts, counts)]
            yield slice(min(at, mine), min(at + step, mine)), part_counts, offsets
