"""One clock for all ranks: how far each rank's is ahead of rank 0's, at the start and at the end."""
import time
from typing import Any, NamedTuple

ROUNDS = 30         # of a message there and back; the quickest one says most
TAG = 71


class Reading(NamedTuple):
    """A reading is how far rank 0's clock is ahead of this rank's, in nanoseconds, when this rank's showed `at`."""
    at: int
    ahead: float


def read_clock(comm: Any) -> Reading:
    """Compare this rank's clock with rank 0's. Collective: ROUNDS small messages from and to each rank.

    Rank 0's time is taken to be read halfway between question and answer (Cristian, Distributed Computing 3, 1989);
    the error is at most half of the quickest round.
    """
    now = time.perf_counter_ns
    if comm.rank == 0:
        for other in range(1, comm.size):
            for _ in range(ROUNDS):
                comm.recv(source=other, tag=TAG)
                comm.send(now(), dest=other, tag=TAG)
        return Reading(now(), 0.0)
    quickest, reading = float("inf"), Reading(now(), 0.0)
    for _ in range(ROUNDS):
        asked = now()
        comm.send(None, dest=0, tag=TAG)
        of_root = comm.recv(source=0, tag=TAG)
        answered = now()
        if answered - asked < quickest:
            quickest = answered - asked
            middle = asked + quickest / 2
            reading = Reading(int(middle), of_root - middle)
    return reading


class Clock:
    """This rank's clock as rank 0 would read it: the offset at the start, and the drift until the end.

    Parameters
    ----------
    start, end : Reading
    """

    def __init__(self, start: Reading, end: Reading):
        self.start, apart = start, end.at - start.at
        self.drift = (end.ahead - start.ahead) / apart if apart > 0 else 0.0

    def __call__(self, at: int) -> float:
        """Return rank 0's time, in nanoseconds, when this rank's clock shows `at`."""
        return at + self.start.ahead + self.drift * (at - self.start.at)
