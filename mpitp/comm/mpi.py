"""Transport: MPI on the buffers themselves, host arrays or, where the MPI is CUDA-aware, device arrays.

Arrays are flat or C-contiguous; counts are elements per rank. Every call is collective.
"""
from itertools import accumulate

from mpi4py import MPI

from ..arrays import module_of

OPERATIONS = {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}
# MPI counts are 32-bit integers, and some libraries count bytes in them on the way.
PIECE_BYTES = 1 << 30


def pieces(length, itemsize, piece_bytes):
    """Slices that cut `length` elements into messages of at most piece_bytes."""
    step = max(1, piece_bytes // itemsize)
    return [slice(at, min(at + step, length)) for at in range(0, length, step)]


class MpiTransport:
    name = "mpi"
    overlaps = False    # hardly any MPI makes progress while none of its functions runs

    def __init__(self, comm, synchronise=lambda: None, in_pairs=False, how="host arrays"):
        """Parameters
        ----------
        synchronise : called before MPI reads or writes a buffer (a device's pending kernels)
        in_pairs : gather and exchange by sends and receives: with device buffers, a CUDA-aware MPI may take these
            through the host in its Allgather and Alltoall (Intel MPI: 180 ms for 128 MiB, by pairs 0.6)
        how : why it is this transport that a group has
        """
        self.comm, self.synchronise, self.in_pairs, self.how = comm, synchronise, in_pairs, how
        self.piece_bytes = PIECE_BYTES

    def all_reduce(self, x, op):
        """x becomes the sum (max, min) over the ranks, in place."""
        self.synchronise()
        flat = x.reshape(-1)
        for part in pieces(flat.size, flat.itemsize, self.piece_bytes):
            self.comm.Allreduce(MPI.IN_PLACE, flat[part], OPERATIONS[op])

    def begin_all_reduce(self, x, op):
        """Start all_reduce(x, op); returns a function that waits for it. x must be left alone until then."""
        self.synchronise()
        flat = x.reshape(-1)
        requests = [self.comm.Iallreduce(MPI.IN_PLACE, flat[part], OPERATIONS[op])
                    for part in pieces(flat.size, flat.itemsize, self.piece_bytes)]
        return lambda: MPI.Request.Waitall(requests)

    def all_gather(self, send, receive, counts):
        """receive = the send arrays of all ranks, one after the other."""
        if self.in_pairs:
            self.exchange([send] * self.comm.size, cut(receive, counts))
            return
        self.synchronise()
        for part, part_counts, offsets in self.vector_pieces(counts, receive.itemsize):
            self.comm.Allgatherv(send[part], [receive, (part_counts, offsets)])

    def gather(self, send, receive, counts, root):
        """receive on root = the send arrays of all ranks, one after the other; receive is None elsewhere."""
        if self.in_pairs:
            nothing, size, here = send[:0], self.comm.size, self.comm.rank == root
            self.exchange([send if p == root else nothing for p in range(size)],
                          cut(receive, counts) if here else [nothing] * size)
            return
        self.synchronise()
        for part, part_counts, offsets in self.vector_pieces(counts, send.itemsize):
            self.comm.Gatherv(send[part], None if receive is None else [receive, (part_counts, offsets)], root)

    def reduce_scatter(self, send, receive, counts, op):
        """receive = this rank's run of the sum (max, min) of the send arrays, cut by counts."""
        for part, part_counts, offsets in self.vector_pieces(counts, send.itemsize):
            if part_counts == list(counts):
                piece = send
            else:                                           # what each rank gets of this piece lies apart
                piece = module_of(send).concatenate([send[at:at + n] for at, n in zip(offsets, part_counts)])
            self.synchronise()
            self.comm.Reduce_scatter(piece, receive[part], part_counts, OPERATIONS[op])

    def all_to_all(self, send, send_counts, receive, receive_counts):
        """Run p of send goes to rank p; receive = what every rank sent here, one after the other."""
        if self.in_pairs:
            self.exchange(cut(send, send_counts), cut(receive, receive_counts))
            return
        self.synchronise()
        self.comm.Alltoallv([send, send_counts], [receive, receive_counts])

    def broadcast(self, x, root):
        """x becomes root's x, in place."""
        self.synchronise()
        flat = x.reshape(-1)
        for part in pieces(flat.size, flat.itemsize, self.piece_bytes):
            self.comm.Bcast(flat[part], root)

    def exchange(self, outgoing, incoming):
        """outgoing[p] goes to rank p, incoming[p] comes from it: with the rank `shift` above and below at a time."""
        rank, size = self.comm.rank, self.comm.size
        incoming[rank][...] = outgoing[rank]
        self.synchronise()
        for shift in range(1, size):
            to, source = (rank + shift) % size, (rank - shift) % size
            requests = [self.comm.Irecv(incoming[source][part], source) for part in self.cuts(incoming[source])]
            requests += [self.comm.Isend(outgoing[to][part], to) for part in self.cuts(outgoing[to])]
            MPI.Request.Waitall(requests)

    def cuts(self, x):
        return pieces(x.size, x.itemsize, self.piece_bytes)

    def close(self):
        """Nothing to give back: the communicator is the group's."""

    def vector_pieces(self, counts, itemsize):
        """Cut a gather of `counts` elements a rank: (this rank's slice, counts, offsets) for each message."""
        starts = [sum(counts[:p]) for p in range(len(counts))]
        step = max(1, self.piece_bytes // itemsize // len(counts))
        mine = counts[self.comm.rank]
        for at in range(0, max(max(counts), 1), step):
            part_counts = [max(0, min(step, n - at)) for n in counts]
            offsets = [start + min(at, n) for start, n in zip(starts, counts)]
            yield slice(min(at, mine), min(at + step, mine)), part_counts, offsets


def cut(x, counts):
    """The runs of a flat array, one a rank."""
    ends = list(accumulate(counts))
    return [x[end - count:end] for end, count in zip(ends, counts)]
