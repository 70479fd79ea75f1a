"""What the ranks of a host tell each other while they wait in MPI: one slot of a shared file a rank, no message."""
import contextlib
import json
import mmap
import os
import socket
import tempfile
from typing import Any

from mpi4py import MPI

SLOT = 4096         # bytes of a rank; a page, so that ranks do not write into each other's cache lines
LENGTH = 4          # of them, in front, the length of what follows; 0 while it is written


class Heartbeats:
    """The records of all ranks, which the ranks of one host share. The constructor is collective.

    Each rank writes its own; those of other hosts are written by the rank of this host that has mail of them (mail.py).

    Parameters
    ----------
    comm : mpi4py communicator
        Of all ranks.
    node : mpi4py communicator, optional
        Of the ranks of this host. None: the ranks that can share memory.

    Attributes
    ----------
    hosts, processes : list of str, list of int
        Of all ranks.
    here : list of int
        The ranks of this host, in order.
    heads : {int: list of int}
        The lowest rank of each host, and its ranks.

    Notes
    -----
    The file has no name once all have opened it, so that a job that is killed leaves nothing. Where no file can be
    made, each rank counts as a host of its own.
    """

    def __init__(self, comm: MPI.Comm, node: MPI.Comm | None = None):
        self.rank = comm.rank
        found = comm.allgather((socket.gethostname(), os.getpid()))
        self.hosts, self.processes = [host for host, _ in found], [process for _, process in found]
        node = comm.Split_type(MPI.COMM_TYPE_SHARED) if node is None else node.Dup()
        here = node.allgather(self.rank)
        memory, path = None, None
        if node.rank == 0:
            with contextlib.suppress(OSError):
                number, path = tempfile.mkstemp(prefix="mpitp-heartbeats-")
                os.truncate(number, SLOT * comm.size)           # without blocks until they are written
                os.close(number)
        path = node.bcast(path)
        if path:
            with contextlib.suppress(OSError), open(path, "r+b") as file:
                memory = mmap.mmap(file.fileno(), SLOT * comm.size)
        everywhere = all(node.allgather(memory is not None))
        if path and node.rank == 0:
            os.unlink(path)
        node.Free()
        self.memory: Any = memory if everywhere else bytearray(SLOT * comm.size)
        self.here: list[int] = sorted(here) if everywhere else [self.rank]
        heads = comm.allgather(self.here[0])
        self.heads: dict[int, list[int]] = {}
        for rank, head in enumerate(heads):
            self.heads.setdefault(head, []).append(rank)

    def write(self, record: dict, rank: int | None = None) -> None:
        """Put a record into the slot of a rank, which is this one by default."""
        content = json.dumps(record).encode()[:SLOT - LENGTH]
        start = (self.rank if rank is None else rank) * SLOT
        self.memory[start:start + LENGTH] = bytes(LENGTH)
        self.memory[start + LENGTH:start + LENGTH + len(content)] = content
        self.memory[start:start + LENGTH] = len(content).to_bytes(LENGTH, "little")

    def read(self, rank: int) -> dict | None:
        """Return the record of a rank; None where there is none yet, or while it is being written."""
        start = rank * SLOT
        length = int.from_bytes(self.memory[start:start + LENGTH], "little")
        try:
            return json.loads(bytes(self.memory[start + LENGTH:start + LENGTH + length])) if length else None
        except ValueError:                      # half of one
            return None
