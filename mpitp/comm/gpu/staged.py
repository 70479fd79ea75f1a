"""Transport: device arrays through pinned host memory, for an MPI that does not take device pointers.

Given a device array, such an MPI reads it as a host address: a segmentation fault. So each call copies to
pinned memory, lets MPI work there, and copies back.
"""
from ..mpi import MpiTransport, pieces

STAGE_BYTES = 4 << 20       # of one piece


def pinned_like(x):
    """Pinned host memory of the shape and dtype of a device array."""
    import cupyx
    return cupyx.empty_pinned(x.shape, x.dtype)


class StagedTransport:
    name = "staged"
    overlaps = False    # hardly any MPI makes progress while none of its functions runs

    def __init__(self, comm, synchronise, pinned=None, streams=None):
        """synchronise: waits for what the device was told to do. streams: two, for copies to the host and back."""
        self.host, self.synchronise, self.streams = MpiTransport(comm), synchronise, streams
        self.pinned_like = pinned or pinned_like

    @property
    def piece_bytes(self):
        return self.host.piece_bytes

    @piece_bytes.setter
    def piece_bytes(self, limit):
        self.host.piece_bytes = limit

    def to_host(self, x):
        """A host copy of x; get() waits for the kernels that still write x."""
        host = self.pinned_like(x)
        x.get(out=host)
        return host

    def to_device(self, host, x):
        x.set(host)
        self.synchronise()      # set() only starts the copy, and the pinned memory is given away when host is gone

    def all_reduce(self, x, op):
        if self.streams and x.nbytes > STAGE_BYTES:
            self.all_reduce_in_pieces(x.reshape(-1), op)
            return
        host = self.to_host(x)
        self.host.all_reduce(host, op)
        self.to_device(host, x)

    def all_reduce_in_pieces(self, x, op):
        """While MPI adds up one piece, the next ones come from the device and the last ones go back."""
        down, up = self.streams
        host, arrived = self.pinned_like(x), []
        self.synchronise()                      # what writes x is done
        parts = pieces(x.size, x.itemsize, STAGE_BYTES)
        for part in parts:
            x[part].get(out=host[part], stream=down, blocking=False)
            arrived.append(down.record())
        for part, event in zip(parts, arrived):
            event.synchronize()
            self.host.all_reduce(host[part], op)
            x[part].set(host[part], stream=up)
        up.synchronize()                        # before the pinned memory is given away

    def begin_all_reduce(self, x, op):
        host = self.to_host(x)
        wait = self.host.begin_all_reduce(host, op)

        def finish():
            wait()
            self.to_device(host, x)
        return finish

    def all_gather(self, send, receive, counts):
        host = self.pinned_like(receive)
        self.host.all_gather(self.to_host(send), host, counts)
        self.to_device(host, receive)

    def gather(self, send, receive, counts, root):
        host = None if receive is None else self.pinned_like(receive)
        self.host.gather(self.to_host(send), host, counts, root)
        if receive is not None:
            self.to_device(host, receive)

    def reduce_scatter(self, send, receive, counts, op):
        host = self.pinned_like(receive)
        self.host.reduce_scatter(self.to_host(send), host, counts, op)
        self.to_device(host, receive)

    def all_to_all(self, send, send_counts, receive, receive_counts):
        host = self.pinned_like(receive)
        self.host.all_to_all(self.to_host(send), send_counts, host, receive_counts)
        self.to_device(host, receive)

    def broadcast(self, x, root):
        host = self.to_host(x)
        self.host.broadcast(host, root)
        self.to_device(host, x)

    def close(self):
        """Nothing to give back."""
