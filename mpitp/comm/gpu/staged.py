"""Transport: device arrays through pinned host memory, for an MPI that does not take device pointers.

Given a device array, such an MPI reads it as a host address: a segmentation fault. So each call copies to
pinned memory, lets MPI work there, and copies back.
"""
from collections.abc import Callable
from functools import partial
from typing import Any

from mpi4py import MPI

from ...arrays import Array, DeviceArray
from ..mpi import MpiTransport, messages

STAGE_BYTES = 4 << 20       # of one message


def pinned_like(x: DeviceArray) -> Array:
    """Make a pinned host array of the shape and dtype of a device array."""
    import cupyx
    return cupyx.empty_pinned(x.shape, x.dtype)


class StagedTransport:
    """This transport does what MpiTransport does on host copies of device arrays.

    Parameters
    ----------
    comm : mpi4py communicator
    synchronise : function
        Waits for what the device was told to do.
    how : str
        Why it is this transport that a group has.
    pinned_like : function
        Makes the host array for a device array.
    streams : pair of CuPy streams or None
        For copies to the host and back while MPI adds up; None: nothing overlaps.
    """
    name = "staged"
    overlaps = False    # hardly any MPI makes progress while none of its functions runs
    records = False     # nor can a CUDA graph hold them

    def __init__(self, comm: MPI.Comm, synchronise: Callable[[], None], how: str,
                 pinned_like: Callable[[DeviceArray], Array] = pinned_like,
                 streams: tuple[Any, Any] | None = None) -> None:
        self.host, self.synchronise, self.how = MpiTransport(comm), synchronise, how
        self.pinned_like, self.streams = pinned_like, streams

    @property
    def message_bytes(self) -> int:
        """The bytes that one message has at most."""
        return self.host.message_bytes

    @message_bytes.setter
    def message_bytes(self, limit: int) -> None:
        self.host.message_bytes = limit

    def to_host(self, x: DeviceArray) -> Array:
        """Copy x to the host; get() waits for the kernels that still write x."""
        host = self.pinned_like(x)
        x.get(out=host)
        return host

    def to_device(self, host: Array, x: DeviceArray) -> None:
        """Copy host to x, and wait for that: the pinned memory is given away when `host` is gone."""
        x.set(host)
        self.synchronise()

    def all_reduce(self, x: DeviceArray, op: str) -> None:
        """x becomes the sum (max, min) over the ranks, in place."""
        if self.streams is not None and x.nbytes > STAGE_BYTES:
            self.all_reduce_in_messages(x.reshape(-1), op, *self.streams)
            return
        host = self.to_host(x)
        self.host.all_reduce(host, op)
        self.to_device(host, x)

    def all_reduce_in_messages(self, x: DeviceArray, op: str, to_host: Any, to_device: Any) -> None:
        """Do all_reduce of a long flat array: while MPI adds up one message, others are copied to the host and back."""
        host, arrived = self.pinned_like(x), []
        self.synchronise()                      # what writes x is done
        parts = messages(x.size, x.itemsize, STAGE_BYTES)
        for part in parts:
            x[part].get(out=host[part], stream=to_host, blocking=False)
            arrived.append(to_host.record())
        for part, event in zip(parts, arrived):
            event.synchronize()
            self.host.all_reduce(host[part], op)
            x[part].set(host[part], stream=to_device)
        to_device.synchronize()                 # before the pinned memory is given away

    def begin_all_reduce(self, x: DeviceArray, op: str) -> Callable[[], None]:
        """Start all_reduce(x, op); returns a function that waits for it. x must be left alone until then."""
        host = self.to_host(x)
        return partial(self.finish_all_reduce, self.host.begin_all_reduce(host, op), host, x)

    def finish_all_reduce(self, wait: Callable[[], object], host: Array, x: DeviceArray) -> None:
        """Wait for a sum on the host, and copy it to x."""
        wait()
        self.to_device(host, x)

    def all_gather(self, send: DeviceArray, receive: DeviceArray, counts: list[int]) -> None:
        """receive = the send arrays of all ranks, one after the other."""
        host = self.pinned_like(receive)
        self.host.all_gather(self.to_host(send), host, counts)
        self.to_device(host, receive)

    def gather(self, send: DeviceArray, receive: DeviceArray | None, counts: list[int], root: int) -> None:
        """receive on root = the send arrays of all ranks, one after the other; receive is None elsewhere."""
        host = None if receive is None else self.pinned_like(receive)
        self.host.gather(self.to_host(send), host, counts, root)
        if host is not None:
            self.to_device(host, receive)

    def reduce_scatter(self, send: DeviceArray, receive: DeviceArray, counts: list[int], op: str) -> None:
        """receive = this rank's run of the sum (max, min) of the send arrays, cut by counts."""
        host = self.pinned_like(receive)
        self.host.reduce_scatter(self.to_host(send), host, counts, op)
        self.to_device(host, receive)

    def all_to_all(self, send: DeviceArray, send_counts: list[int], receive: DeviceArray,
                   receive_counts: list[int]) -> None:
        """Run p of send goes to rank p; receive = what every rank sent here, one after the other."""
        host = self.pinned_like(receive)
        self.host.all_to_all(self.to_host(send), send_counts, host, receive_counts)
        self.to_device(host, receive)

    def broadcast(self, x: DeviceArray, root: int) -> None:
        """x becomes root's x, in place."""
        host = self.to_host(x)
        self.host.broadcast(host, root)
        self.to_device(host, x)

    def close(self) -> None:
        """Do nothing: the communicator is the group's."""
