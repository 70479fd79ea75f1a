"""Transport: NCCL on device arrays, through CuPy, set up over MPI. Nothing waits on the host.

Calls are put on CuPy's current stream, behind the kernels that make what they send. Arrays are flat or C-contiguous;
counts are elements per rank. Every call is collective.
"""
from collections.abc import Callable
from types import ModuleType
from typing import Any

from mpi4py import MPI

from ...arrays import DeviceArray
from .mpi_device import runs

# NCCL moves bytes in these too, so that 16-bit arrays may come under the dtype that MPI knows for them, uint16.
TYPES = {"float32": "NCCL_FLOAT32", "float64": "NCCL_FLOAT64", "int32": "NCCL_INT32", "int64": "NCCL_INT64",
         "uint16": "NCCL_FLOAT16"}
OPERATIONS = {"sum": "NCCL_SUM", "max": "NCCL_MAX", "min": "NCCL_MIN"}
# {(ranks of the world, their devices): communicator}. Groups of the same ranks share one, in the order of the program:
# measured: 0.5 s to make one, and 0.5 s to destroy it.
_communicators: dict[tuple[tuple[int, ...], tuple[int, ...]], Any] = {}


def key_of(comm: MPI.Comm, cupy: ModuleType) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (ranks of the world, their current devices). Collective.

    Groups of a process for which they are equal may share a communicator. A rank not of the world is MPI.UNDEFINED.
    """
    own, world = comm.Get_group(), MPI.COMM_WORLD.Get_group()
    ranks = tuple(own.Translate_ranks(None, world))
    own.Free()
    world.Free()
    return ranks, tuple(comm.allgather(cupy.cuda.runtime.getDevice()))


def communicator(comm: MPI.Comm, cupy: ModuleType, nccl: ModuleType) -> Any:
    """Return this process's NCCL communicator of these ranks on their current devices. Collective over comm.

    It is made when a group has these ranks first, and ends with the process.
    """
    key = key_of(comm, cupy)
    if key not in _communicators or MPI.UNDEFINED in key[0]:    # the same answer on every rank of comm
        identity = comm.bcast(nccl.get_unique_id() if comm.rank == 0 else None)
        _communicators[key] = nccl.NcclCommunicator(comm.size, identity, comm.rank)
    return _communicators[key]


class NcclTransport:
    """This transport does what MpiTransport does by NCCL.

    Parameters
    ----------
    comm : mpi4py communicator
        Of ranks with a GPU each. The constructor is collective over it.
    cupy : module
    how : str
        Why it is this transport that a group has.
    """
    name = "nccl"
    overlaps = True
    records = True              # a CUDA graph can hold its calls
    message_bytes = 1 << 62       # nothing is too long: NCCL counts in 64 bits

    def __init__(self, comm: MPI.Comm, cupy: ModuleType, how: str) -> None:
        from cupy.cuda import nccl
        self.nccl, self.cupy, self.rank, self.size, self.how = nccl, cupy, comm.rank, comm.size, how
        self.comm = communicator(comm, cupy, nccl)
        self.side_stream: Any = None    # of sums that are under way while the device computes

    def arguments(self, x: DeviceArray) -> tuple[int, int, int]:
        """Return (pointer, elements, type) of an array."""
        return x.data.ptr, x.size, getattr(self.nccl, TYPES[x.dtype.name])

    def stream(self) -> int:
        """Return the handle of CuPy's current stream."""
        return self.cupy.cuda.get_current_stream().ptr

    def all_reduce(self, x: DeviceArray, op: str) -> None:
        """x becomes the sum (max, min) over the ranks, in place."""
        pointer, count, kind = self.arguments(x)
        if count:
            self.comm.allReduce(pointer, pointer, count, kind, getattr(self.nccl, OPERATIONS[op]), self.stream())

    def begin_all_reduce(self, x: DeviceArray, op: str) -> Callable[[], None]:
        """Start all_reduce(x, op) on a stream of its own; returns a function after which the current one may use x."""
        if self.side_stream is None:
            self.side_stream = self.cupy.cuda.Stream(non_blocking=True)
        self.side_stream.wait_event(self.cupy.cuda.get_current_stream().record())
        with self.side_stream:
            self.all_reduce(x, op)
        done = self.side_stream.record()
        return lambda: self.cupy.cuda.get_current_stream().wait_event(done)

    def all_gather(self, send: DeviceArray, receive: DeviceArray, counts: list[int]) -> None:
        """receive = the send arrays of all ranks, one after the other."""
        if len(set(counts)) == 1:
            pointer, count, kind = self.arguments(send)
            if count:
                self.comm.allGather(pointer, receive.data.ptr, count, kind, self.stream())
            return
        self.exchange([send] * self.size, runs(receive, counts))

    def gather(self, send: DeviceArray, receive: DeviceArray | None, counts: list[int], root: int) -> None:
        """receive on root = the send arrays of all ranks, one after the other; receive is None elsewhere."""
        nothing = send[:0]
        parts = [nothing] * self.size if receive is None else runs(receive, counts)
        self.exchange([send if p == root else nothing for p in range(self.size)], parts)

    def reduce_scatter(self, send: DeviceArray, receive: DeviceArray, counts: list[int], op: str) -> None:
        """receive = this rank's run of the sum (max, min) of the send arrays, cut by counts."""
        operation, stream = getattr(self.nccl, OPERATIONS[op]), self.stream()
        if len(set(counts)) == 1:
            pointer, _, kind = self.arguments(send)
            if counts[0]:
                self.comm.reduceScatter(pointer, receive.data.ptr, counts[0], kind, operation, stream)
            return
        self.nccl.groupStart()
        for root, part in enumerate(runs(send, counts)):
            if part.size:
                pointer, count, kind = self.arguments(part)
                target = receive.data.ptr if root == self.rank else 0
                self.comm.reduce(pointer, target, count, kind, operation, root, stream)
        self.nccl.groupEnd()

    def all_to_all(self, send: DeviceArray, send_counts: list[int], receive: DeviceArray,
                   receive_counts: list[int]) -> None:
        """Run p of send goes to rank p; receive = what every rank sent here, one after the other."""
        self.exchange(runs(send, send_counts), runs(receive, receive_counts))

    def exchange(self, outgoing: list[DeviceArray], incoming: list[DeviceArray]) -> None:
        """outgoing[p] goes to rank p, incoming[p] comes from it; one group of sends and receives."""
        stream = self.stream()
        if outgoing[self.rank].size:
            incoming[self.rank][...] = outgoing[self.rank]
        self.nccl.groupStart()
        for p in range(self.size):
            if p != self.rank and outgoing[p].size:
                self.comm.send(*self.arguments(outgoing[p]), p, stream)
            if p != self.rank and incoming[p].size:
                self.comm.recv(*self.arguments(incoming[p]), p, stream)
        self.nccl.groupEnd()

    def broadcast(self, x: DeviceArray, root: int) -> None:
        """x becomes root's x, in place."""
        pointer, count, kind = self.arguments(x)
        if count:
            self.comm.broadcast(pointer, pointer, count, kind, root, self.stream())

    def close(self) -> None:
        """Wait for what is pending; the communicator stays for the next group of these ranks."""
        self.cupy.cuda.get_current_stream().synchronize()
