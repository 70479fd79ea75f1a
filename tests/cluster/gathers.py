"""Measure the calls for equal counts against those for any counts, in turns: gathers.py [REPEATS].

Prints a line a size: bytes of the gathered array, the median seconds of MPI_Allgather, and the medians of the ratios
of a round: Allgatherv / Allgather, Alltoallv / Alltoall, and Allgather / an exchange of as many bytes by Sendrecv.
"""
import sys
import time

import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
repeats = int(sys.argv[1]) if sys.argv[1:] else 15
after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
if comm.rank == 0:
    print("bytes allgather_s allgatherv/allgather (quartiles) alltoallv/alltoall (quartiles) allgather/sendrecv")
for size in (1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24):
    part = size // 8 // comm.size
    send, whole = np.ones(part), np.empty(part * comm.size)
    counts = [part] * comm.size
    cases = {"allgather": lambda: comm.Allgather(send, whole), "allgatherv": lambda: comm.Allgatherv(send, [whole, counts]),
             "alltoall": lambda: comm.Alltoall(whole, other), "alltoallv": lambda: comm.Alltoallv([whole, counts], [other, counts]),
             "sendrecv": lambda: comm.Sendrecv(send, after, recvbuf=send2, source=before)}
    other, send2 = np.empty_like(whole), np.empty_like(send)
    calls = max(1, (1 << 18) // size)
    times = {name: [] for name in cases}
    for round in range(repeats + 2):
        names = list(cases)
        names = names[round % len(names):] + names[:round % len(names)]
        for name in names:
            comm.Barrier()
            started = time.perf_counter()
            for _ in range(calls):
                cases[name]()
            seconds = comm.allreduce(time.perf_counter() - started, MPI.MAX) / calls
            if round > 1:
                times[name].append(seconds)
    if comm.rank == 0:
        t = {name: np.array(values) for name, values in times.items()}
        def ratio(a, b):
            r = t[a] / t[b]
            return f"{np.median(r):.2f} ({np.quantile(r, .25):.2f}-{np.quantile(r, .75):.2f})"
        print(f"{size:9d} {np.median(t['allgather']) * 1e3:9.3f} ms  {ratio('allgatherv', 'allgather')}  "
              f"{ratio('alltoallv', 'alltoall')}  {ratio('allgather', 'sendrecv')}", flush=True)
