"""Latency and bandwidth between ranks of one host and of two, and the network interface that carried the bytes.

Two ranks at a time send to each other while the others wait: the links as they are when nobody else uses them.
"""
import glob
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..comm.group import TensorParallelGroup
from .rounds import Case

LARGE = 4 << 20             # bytes of a message that is all bandwidth
PINGS, LARGE_PINGS = 100, 3


@dataclass
class Link:
    """What two ranks found: seconds of a message of 8 bytes, the rate of a large one, and what carried it."""
    ranks: tuple[int, int]
    hosts: tuple[str, str]
    latency_seconds: float
    bytes_per_second: float
    interface: str          # "" inside a host, and where no counter of the kernel moved


def pairs(hosts: list[str]) -> list[tuple[int, int]]:
    """Return the ranks to compare: the first two of each host, and the first of each host and of the next one.

    Parameters
    ----------
    hosts : list of str
        The host of every rank.
    """
    of_host: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        of_host.setdefault(host, []).append(rank)
    inside = [(ranks[0], ranks[1]) for ranks in of_host.values() if len(ranks) > 1]
    first = [ranks[0] for ranks in of_host.values()]
    around = list(zip(first, first[1:] + first[:1])) if len(first) > 2 else list(zip(first, first[1:]))
    return inside + around


def links(comm: Any, hosts: list[str]) -> list[Link]:
    """Return the links between pairs(hosts), on every rank. Collective.

    Parameters
    ----------
    comm : mpi4py communicator
    hosts : list of str
        The host of every rank.
    """
    found = []
    for first, second in pairs(hosts):
        mine = None
        if comm.rank in (first, second):
            mine = between(comm, first, second, hosts[first] != hosts[second])
        found.append(comm.bcast(mine, first))       # those who wait poll, so they wait where nothing is measured
    return [Link(ranks, (hosts[ranks[0]], hosts[ranks[1]]), *measured) for ranks, measured in zip(pairs(hosts), found)]


def between(comm: Any, first: int, second: int, network: bool) -> tuple[float, float, str]:
    """Return latency, rate and interface of the link of this rank and another one. Collective on these two."""
    other, sends = (second, True) if comm.rank == first else (first, False)
    small, large = np.zeros(1), np.zeros(LARGE // 8)
    half_seconds(comm, other, sends, small)                                     # connects
    latency = sorted(half_seconds(comm, other, sends, small) for _ in range(PINGS))[PINGS // 2]
    half_seconds(comm, other, sends, large)
    before = bytes_by_interface()
    seconds = min(half_seconds(comm, other, sends, large) for _ in range(LARGE_PINGS))
    after = bytes_by_interface()
    return latency, LARGE / seconds, busiest(before, after, LARGE_PINGS * LARGE // 2) if network else ""


def exchange_case(group: TensorParallelGroup, size: int) -> Case:
    """Return a case in which every rank sends `size` bytes to the next rank, and gets as many from the one before.

    Parameters
    ----------
    group : TensorParallelGroup
        Of two ranks or more, on the CPU.
    size : int
        A multiple of 8.
    """
    comm, send, receive = group.comm, np.ones(size // 8), np.empty(size // 8)
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    return partial(comm.Sendrecv, send, after, recvbuf=receive, source=before)


def latency_and_rate(times: Mapping[int, float]) -> tuple[float, float]:
    """Return alpha and beta of the line alpha + beta n nearest to the times, by the squares of relative errors.

    Parameters
    ----------
    times : mapping of int to float
        Seconds by bytes n, of two sizes or more.

    Returns
    -------
    (float, float)
        Seconds, and seconds a byte, which is positive.
    """
    n, t = np.array(list(times), float), np.array(list(times.values()))
    alpha, beta = np.linalg.lstsq(np.stack([1 / t, n / t], axis=1), np.ones(len(n)), rcond=None)[0]
    return max(float(alpha), 0.0), max(float(beta), 1e-15)


def half_seconds(comm: Any, other: int, sends: bool, x: np.ndarray) -> float:
    """Return half the time in which x goes to the other rank and comes back."""
    start = time.perf_counter()
    if sends:
        comm.Send(x, other)
        comm.Recv(x, other)
    else:
        comm.Recv(x, other)
        comm.Send(x, other)
    return (time.perf_counter() - start) / 2


def bytes_by_interface(network: str = "/proc/net/dev", infiniband: str = "/sys/class/infiniband") -> dict[str, int]:
    """Return the bytes that each network interface and each port of InfiniBand has sent so far."""
    sent = {}
    try:
        with open(network) as lines:
            for line in lines.readlines()[2:]:
                name, numbers = line.split(":")
                sent[name.strip()] = int(numbers.split()[8])
    except (OSError, ValueError, IndexError):
        pass                                        # not Linux
    for path in glob.glob(os.path.join(infiniband, "*", "ports", "*", "counters", "port_xmit_data")):
        device, _, port = path.split(os.sep)[-5:-2]
        try:
            with open(path) as file:
                sent[f"{device} port {port}"] = 4 * int(file.read())            # it counts words
        except (OSError, ValueError):
            pass
    return sent


def busiest(before: Mapping[str, int], after: Mapping[str, int], least: int) -> str:
    """Return the interface that sent the most meanwhile, "" where none sent as much as `least` bytes."""
    sent = {name: count - before.get(name, 0) for name, count in after.items()}
    name = max(sent, key=sent.__getitem__, default="")
    return name if name and sent[name] >= least else ""
