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
    """The records of the ranks of one host, which each of them writes and all read. The constructor is collective.

    Parameters
    ----------
    comm : mpi4py communicator
        Of all ranks.

    Attributes
    ----------
    hosts : list of str
        Of all ranks.
    here : list of int
        The ranks of this host, in order.

    Notes
    -----
    The file has no name once all have opened it, so that a job that is killed leaves nothing. Where no file can be
    made, each rank knows of itself alone.
    """

    def __init__(self, comm: MPI.Comm):
        self.rank = comm.rank
        self.hosts = comm.allgather(socket.gethostname())
        node = comm.Split_type(MPI.COMM_TYPE_SHARED)
        here = node.allgather(self.rank)
        memory, path = None, None
        if node.rank == 0:
            with contextlib.suppress(OSError):
                number, path = tempfile.mkstemp(prefix="mpitp-heartbeats-")
                os.truncate(number, SLOT * len(here))
                os.close(number)
        path = node.bcast(path)
        if path:
            with contextlib.suppress(OSError), open(path, "r+b") as file:
                memory = mmap.mmap(file.fileno(), SLOT * len(here))
        everywhere = all(node.allgather(memory is not None))
        if path and node.rank == 0:
            os.unlink(path)
        node.Free()
        self.here: list[int] = sorted(here) if everywhere else [self.rank]
        self.slots = {rank: index for index, rank in enumerate(here)} if everywhere else {self.rank: 0}
        self.memory: Any = memory if everywhere else bytearray(SLOT)

    def write(self, record: dict) -> None:
        """Put this rank's record into its slot."""
        content = json.dumps(record).encode()[:SLOT - LENGTH]
        start = self.slots[self.rank] * SLOT
        self.memory[start:start + LENGTH] = bytes(LENGTH)
        self.memory[start + LENGTH:start + LENGTH + len(content)] = content
        self.memory[start:start + LENGTH] = len(content).to_bytes(LENGTH, "little")

    def read(self, rank: int) -> dict | None:
        """Return the record of a rank of this host; None where there is none yet, or while it is being written."""
        start = self.slots[rank] * SLOT
        length = int.from_bytes(self.memory[start:start + LENGTH], "little")
        try:
            return json.loads(bytes(self.memory[start + LENGTH:start + LENGTH + length])) if length else None
        except ValueError:                      # half of one
            return None
