"""The page that `doctor` prints: what the ranks found, host by host and rank by rank, and what is wrong with it."""
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from .. import tables
from ..comm.facts import RankFacts, by_host
from ..measure import Link


@dataclass
class Finding:
    """Something that is wrong, what was found, and the line to change."""
    name: str
    found: str
    fix: str


def page(ranks: list[RankFacts]) -> Iterator[str]:
    """Return the lines about the machine."""
    first = ranks[0]
    yield f"Python       {first.python}, NumPy {first.numpy}, mpi4py {first.mpi4py}"
    yield f"BLAS         {first.blas}"
    yield f"MPI          {first.mpi}, transport: {first.transport}"
    yield f"launcher     {first.launcher or 'none'}"
    yield f"ranks        {first.launcher_ranks} started, MPI sees {first.world}"
    how = first.cuda_aware_how.split("; ")
    yield f"CUDA-aware   {'yes' if first.cuda_aware else 'no'}: {how[0]}"
    yield from (f"             {reason}" for reason in how[1:])
    yield f"GPUs         {'no CuPy' if first.gpus is None else first.gpus}"
    if first.gpu_transport:
        yield from (f"             rank {number}: {rank.gpu}" for number, rank in enumerate(ranks))
        yield f"             transport: {first.gpu_transport} ({first.gpu_transport_how})"
    settings = [f"{name}={value}" for name, value in first.variables.items()] or ["nothing that matters"]
    yield f"environment  {settings[0]}"
    yield from (f"             {setting}" for setting in settings[1:])
    yield ""
    yield from tables.table(
        ("host", "ranks", "/dev/shm", "cores allowed", "memory allowed", "may lock"),
        [(host, tables.ranges([number for number, rank in enumerate(ranks) if rank.host == host]),
          limit_of(here[0].shared_memory, "unknown", " free"),
          "all" if here[0].quota is None else f"{here[0].quota:.1f}",
          limit_of(here[0].memory_limit, "all"), limit_of(here[0].locked_memory, "all"))
         for host, here in by_host(ranks).items()])
    yield ""
    yield "Look at `share`: as many cores, and BLAS threads, are a rank's own if nothing else runs there."
    yield from tables.table(
        ("rank", "host", "may run on", "share", "BLAS threads"),
        [(number, rank.host, f"{len(rank.cores)} of {rank.machine_cores} cores", f"{rank.share} of them",
          rank.blas_threads or "unknown") for number, rank in enumerate(ranks)])


def limit_of(size: int | None, otherwise: str, more: str = "") -> str:
    """Return a size in bytes, or the word for none."""
    return otherwise if size is None else f"{tables.size(size)}{more}"


def table_of_links(links: list[Link]) -> Iterator[str]:
    """Return the lines about how ranks reach each other."""
    if links:
        yield ""
        yield "Look at `rate`: what all-reduces of large arrays can reach; small ones take a few latencies."
        yield from tables.table(
            ("from rank", "to rank", "latency", "rate", "by"),
            [(f"{link.ranks[0]} on {link.hosts[0]}", f"{link.ranks[1]} on {link.hosts[1]}",
              tables.seconds(link.latency_seconds), tables.rate(link.bytes_per_second),
              "shared memory, or what this MPI has for it" if len(set(link.hosts)) == 1 else
              link.interface or "no interface that the kernel counts") for link in links])


def verdict(found: list[Finding]) -> Iterator[str]:
    """Return the lines about what is wrong."""
    if not found:
        yield "nothing is wrong"
    for finding in found:
        yield from textwrap.wrap(f"WRONG  {finding.name}: {finding.found}", 96, subsequent_indent="       ")
        yield from textwrap.wrap(f"  fix  {finding.fix}", 98, subsequent_indent="       ", break_on_hyphens=False)
