"""The transport of device arrays over a CUDA-aware MPI: it waits for kernels, and gathers go from rank to rank."""
from collections.abc import Callable
from itertools import accumulate

from mpi4py import MPI

from ...arrays import Array
from ..mpi import MpiTransport, messages


class DeviceMpiTransport(MpiTransport):
    """This transport calls MPI on device buffers.

    Gathers and exchanges go by sends and receives, as a CUDA-aware MPI may take device buffers through the host in its
    Allgather and Alltoall (measured: Intel MPI 180 ms for 128 MiB against 0.6 by pairs).

    Parameters
    ----------
    comm : mpi4py communicator
        Of the ranks.
    synchronise : callable
        Waits for a device's pending kernels; called before MPI reads or writes a buffer.
    how : str
        Why it is this transport, for `doctor`.
    """
    def __init__(self, comm: MPI.Comm, synchronise: Callable[[], None], how: str = ""):
        super().__init__(comm)
        self.synchronise, self.how = synchronise, how

    def all_reduce(self, x: Array, op: str) -> None:
        self.synchronise()
        super().all_reduce(x, op)

    def begin_all_reduce(self, x: Array, op: str) -> Callable[[], object]:
        self.synchronise()
        return super().begin_all_reduce(x, op)

    def all_gather(self, send: Array, receive: Array, counts: list[int]) -> None:
        self.exchange([send] * self.comm.size, runs(receive, counts))

    def gather(self, send: Array, receive: Array | None, counts: list[int], root: int) -> None:
        nothing, size = send[:0], self.comm.size
        self.exchange([send if p == root else nothing for p in range(size)],
                      [nothing] * size if receive is None else runs(receive, counts))

    def reduce_scatter_message(self, message: Array, receive: Array, counts: list[int], op: str) -> None:
        self.synchronise()
        super().reduce_scatter_message(message, receive, counts, op)

    def all_to_all(self, send: Array, send_counts: list[int], receive: Array, receive_counts: list[int]) -> None:
        self.exchange(runs(send, send_counts), runs(receive, receive_counts))

    def broadcast(self, x: Array, root: int) -> None:
        self.synchronise()
        super().broadcast(x, root)

    def exchange(self, outgoing: list[Array], incoming: list[Array]) -> None:
        """Send outgoing[p] to rank p, receive incoming[p] from it: the rank `shift` above and below at a time."""
        rank, size = self.comm.rank, self.comm.size
        incoming[rank][...] = outgoing[rank]
        self.synchronise()
        for shift in range(1, size):
            to, source = (rank + shift) % size, (rank - shift) % size
            requests = [self.comm.Irecv(incoming[source][part], source) for part in self.messages(incoming[source])]
            requests += [self.comm.Isend(outgoing[to][part], to) for part in self.messages(outgoing[to])]
            MPI.Request.Waitall(requests)

    def messages(self, x: Array) -> list[slice]:
        """Return the slices of a flat array that one message can hold."""
        return messages(x.size, x.itemsize, self.message_bytes)


def runs(x: Array, counts: list[int]) -> list[Array]:
    """Return the runs of a flat array, one a rank."""
    ends = list(accumulate(counts))
    return [x[end - count:end] for end, count in zip(ends, counts)]
