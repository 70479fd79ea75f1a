"""Transport: device arrays through pinned host memory, for an MPI that does not take device pointers.

Given a device array, such an MPI reads it as a host address: a segmentation fault. So each call copies to
pinned memory, lets MPI work there, and copies back.
"""
from .mpi import MpiTransport


def to_host(x):
    """A pinned host copy of a device array. The copy waits for the kernels that still write x."""
    import cupyx
    host = cupyx.empty_pinned(x.shape, x.dtype)
    x.get(out=host)
    return host


class StagedTransport:
    name = "staged"

    def __init__(self, comm, to_host=to_host):
        self.host, self.to_host = MpiTransport(comm), to_host

    @property
    def piece_bytes(self):
        return self.host.piece_bytes

    @piece_bytes.setter
    def piece_bytes(self, limit):
        self.host.piece_bytes = limit

    def all_reduce(self, x, op):
        host = self.to_host(x)
        self.host.all_reduce(host, op)
        x.set(host)

    def begin_all_reduce(self, x, op):
        host = self.to_host(x)
        wait = self.host.begin_all_reduce(host, op)

        def finish():
            wait()
            x.set(host)
        return finish

    def all_gather(self, send, receive, counts):
        host = self.to_host(receive)
        self.host.all_gather(self.to_host(send), host, counts)
        receive.set(host)

    def gather(self, send, receive, counts, root):
        host = None if receive is None else self.to_host(receive)
        self.host.gather(self.to_host(send), host, counts, root)
        if receive is not None:
            receive.set(host)

    def reduce_scatter(self, send, receive, counts, op):
        host = self.to_host(receive)
        self.host.reduce_scatter(self.to_host(send), host, counts, op)
        receive.set(host)

    def all_to_all(self, send, send_counts, receive, receive_counts):
        host = self.to_host(receive)
        self.host.all_to_all(self.to_host(send), send_counts, host, receive_counts)
        receive.set(host)

    def broadcast(self, x, root):
        host = self.to_host(x)
        self.host.broadcast(host, root)
        x.set(host)
