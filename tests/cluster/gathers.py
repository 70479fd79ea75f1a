"""Measure MPI's calls for equal counts against those for any counts, in turns: gathers.py [REPEATS].

Prints a line a size: bytes of the gathered array, the median seconds of MPI_Allgather, and medians (quartiles) of the
ratios of the rounds: Allgatherv / Allgather, Alltoallv / Alltoall, Allgather / an exchange of its parts by Sendrecv.
"""
import sys
import time

import numpy as np
from mpi4py import MPI

SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24)
AT_LEAST = 1 << 18          # bytes of the calls that are timed together
WARM_UP = 2                 # rounds
comm = MPI.COMM_WORLD


def cases(size):
    """{name: function} of the calls on arrays of `size` bytes."""
    part = size // 8 // comm.size
    send, received, whole, other = np.ones(part), np.empty(part), np.ones(part * comm.size), np.ones(part * comm.size)
    counts, after, before = [part] * comm.size, (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    return {"allgather": lambda: comm.Allgather(send, whole),
            "allgatherv": lambda: comm.Allgatherv(send, [whole, counts]),
            "alltoall": lambda: comm.Alltoall(whole, other),
            "alltoallv": lambda: comm.Alltoallv([whole, counts], [other, counts]),
            "sendrecv": lambda: comm.Sendrecv(send, after, recvbuf=received, source=before)}


def measured(size, repeats):
    """{name: seconds of the slowest rank, a round each}; every round begins with another call."""
    functions, times = cases(size), {name: [] for name in cases(size)}
    calls = max(1, AT_LEAST // size)
    for number in range(WARM_UP + repeats):
        names = [*functions][number % len(functions):] + [*functions][:number % len(functions)]
        for name in names:
            comm.Barrier()
            started = time.perf_counter()
            for _ in range(calls):
                functions[name]()
            seconds = comm.allreduce(time.perf_counter() - started, MPI.MAX) / calls
            if number >= WARM_UP:
                times[name].append(seconds)
    return {name: np.array(seconds) for name, seconds in times.items()}


def ratio(a, b):
    """The median of a / b, and its quartiles."""
    return f"{np.median(a / b):.2f} ({np.quantile(a / b, .25):.2f} to {np.quantile(a / b, .75):.2f})"


def main():
    """Print the table."""
    if comm.rank == 0:
        print(f"{'bytes':>9} {'allgather':>12}  {'allgatherv / allgather':24}{'alltoallv / alltoall':24}"
              "allgather / sendrecv")
    for size in SIZES:
        t = measured(size, int(sys.argv[1]) if sys.argv[1:] else 15)
        if comm.rank == 0:
            print(f"{size:9d} {np.median(t['allgather']) * 1e3:9.3f} ms  {ratio(t['allgatherv'], t['allgather']):24}"
                  f"{ratio(t['alltoallv'], t['alltoall']):24}{ratio(t['allgather'], t['sendrecv'])}", flush=True)


if __name__ == "__main__":
    main()
