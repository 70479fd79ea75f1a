"""What the hosts tell each other of their ranks, while those wait: small messages of a thread that does nothing else.

One rank of each host sends the records of all its ranks to one rank of each other host, on a communicator that nothing
else uses, and writes what it receives where the ranks of its own host read it. That needs MPI_THREAD_MULTIPLE. No call
waits; and where the library holds one up all the same, it holds up this thread alone.
"""
import json
import threading
import time
import zlib
from typing import Any

from mpi4py import MPI

from .heartbeats import Heartbeats

MANY = 64           # hosts that are written to in one round
PATIENCE = 1.0      # seconds that the main thread waits for this one before it leaves without a last word
UNANSWERED = 4      # messages without an answer after which the other ranks of a host are written to, too
DEPARTURE = 0.25    # seconds that a rank which leaves the program waits for those of other hosts to do so

_news = threading.Event()
_all: list["Mail"] = []


def obstacle(comm: MPI.Comm) -> str | None:
    """Return the lowest thread level of the ranks where it is too low for mail, else None. Collective."""
    level = comm.allreduce(MPI.Query_thread(), MPI.MIN)
    names = {getattr(MPI, name): name for name in ("THREAD_SINGLE", "THREAD_FUNNELED", "THREAD_SERIALIZED")}
    return f"MPI_{names[level]}" if level in names else None


def carry_for_ever() -> None:
    """Exchange the mail of every watch whenever there is news."""
    while True:
        _news.wait()
        _news.clear()
        for mail in list(_all):
            mail.carry()


class Mail:
    """The mail between the hosts of a communicator. The constructor is collective.

    Parameters
    ----------
    comm : mpi4py communicator
    beats : Heartbeats
        Of its ranks.

    Attributes
    ----------
    rounds : int
        In which each other host is written to once.
    """

    def __init__(self, comm: MPI.Comm, beats: Heartbeats):
        self.comm, self.beats, self.lock = comm.Dup(), beats, threading.Lock()
        self.head_of = {rank: head for head, ranks in beats.heads.items() for rank in ranks}
        self.to = {head: head for head in beats.heads if head not in beats.here}    # {lowest rank: who reads there}
        self.unanswered = dict.fromkeys(self.to, 0)
        self.sent: dict[int, tuple[MPI.Request, bytes]] = {}
        self.under_way: list[Any] = []
        self.rounds, self.round = -(-len(self.to) // MANY), 0
        self.records: dict[int, dict] | None = None
        self.is_open = False                        # while the thread may call MPI
        if not _all:
            threading.Thread(target=carry_for_ever, name="mpitp-mail", daemon=True).start()
        _all.append(self)

    def post(self, records: dict[int, dict]) -> None:
        """Have the thread send the records of this host's ranks, and receive those of others. Returns at once."""
        self.records = records
        _news.set()

    def carry(self) -> None:
        """Exchange what there is, in the thread."""
        with self.lock:
            if self.is_open and self.records is not None and not MPI.Is_finalized():
                self.receive()
                self.send(self.records)
                self.records = None

    def say_last(self, records: dict[int, dict]) -> None:
        """Send these records to all hosts, from the main thread; then the thread calls MPI no more until is_open."""
        if self.lock.acquire(timeout=PATIENCE):     # else MPI holds up the thread
            try:
                self.is_open = False
                self.receive()
                for _ in range(self.rounds):
                    self.send(records, last=True)
            finally:
                self.lock.release()

    def empty(self) -> None:
        """Receive, from the main thread, until the ranks of all other hosts have left, too, or DEPARTURE seconds.

        MPI_Finalize may warn of messages that were never received (seen, UCX).
        """
        until = time.monotonic() + DEPARTURE
        while any(self.readers(head) for head in self.to) and time.monotonic() < until:
            self.receive()
            time.sleep(0.001)

    def readers(self, head: int) -> list[int]:
        """Return the ranks of a host, which its lowest one stands for, that have not left."""
        return [rank for rank in self.beats.heads[head] if not (self.beats.read(rank) or {}).get("leaving")]

    def receive(self) -> None:
        """Put the records that have arrived where the ranks of this host read them."""
        status = MPI.Status()
        while self.comm.Iprobe(MPI.ANY_SOURCE, 0, status):
            content = bytearray(status.Get_count(MPI.BYTE))
            self.comm.Recv([content, MPI.BYTE], status.source, 0)
            head = self.head_of[status.source]
            self.to[head], self.unanswered[head] = status.source, 0
            for rank, record in json.loads(zlib.decompress(content)).items():
                self.beats.write(record, int(rank))

    def send(self, records: dict[int, dict], last: bool = False) -> None:
        """Begin to send the records to the next hosts; but for the last ones not to those with a message to take."""
        content = zlib.compress(json.dumps(records).encode())       # small messages leave without being asked for
        heads: list[Any] = sorted(self.to)[self.round * MANY:(self.round + 1) * MANY]
        self.round = (self.round + 1) % self.rounds
        for head in heads:
            readers = self.readers(head)
            if readers and (last or head not in self.sent or self.sent[head][0].Test()):
                self.unanswered[head] += 1
                others = readers[self.unanswered[head] % len(readers)]
                reader = others if self.unanswered[head] > UNANSWERED or self.to[head] not in readers else self.to[head]
                if last:
                    self.under_way.append(self.sent.get(head))              # MPI may still read its content
                self.sent[head] = self.comm.Isend([content, MPI.BYTE], reader, 0), content
