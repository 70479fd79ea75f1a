"""Choose the transport: what carries the arrays that the ranks add up. Rank 0 decides, from what all of them found.

mpi : MPI on the arrays themselves; on a GPU only where the MPI is CUDA-aware. The default wherever that is not slow
peer : GPUs of one node that write into each other's memory, and one of the others for what is beyond it
nccl : NCCL through CuPy, on device arrays
staged : MPI on copies in pinned host memory
"""
import sys
import time
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

from mpi4py import MPI

from ...errors import InputError
from ..mpi import requested_transport
from .alone import OneRankTransport
from .aware import cuda_aware_everywhere
from .binding import Gpu
from .mpi_device import DeviceMpiTransport
from .peer_memory import Peers, peers
from .staged import StagedTransport

TIMED_BYTES = 16 << 20
SLOW = 3e9          # bytes a second, below which a sum goes through the host: Open MPI 5 does 0.7e9, a good MPI 250e9
Transport = Any     # a class of this folder with the methods of MpiTransport
_printed_reasons: set[str] = set()


class Decision(NamedTuple):
    """A transport's name and why it is that one; or no name, and the problem with the one that was asked for.

    beyond : the name of the one that carries what `peer` does not
    """
    name: str
    how: str
    problem: str = ""
    beyond: str = ""


def choose_transport(comm: MPI.Comm, xp: ModuleType, gpu: Gpu, transport: str) -> Transport:
    """Make the transport of a group on GPUs. Collective.

    Parameters
    ----------
    comm : mpi4py communicator
    xp : module
        cupy.
    gpu : Gpu
        This rank's, from bind.
    transport : str
        One of TRANSPORTS in comm/mpi.py; MPITP_TRANSPORT stands in for "auto".

    Returns
    -------
    transport
        Its `name` is one of TRANSPORTS without "auto", its `how` says why it is that one.

    Raises
    ------
    InputError
        On every rank, for a transport that cannot be had here.
    """
    name_asked = requested_transport(transport)
    aware, aware_reason = cuda_aware_everywhere(comm)
    no_nccl = next(filter(None, comm.allgather(nccl_obstacle(gpu))), None)
    found: Peers | str = "one rank"
    if comm.size > 1 and name_asked in ("auto", "peer"):
        found = peers(comm, xp, gpu, share=name_asked == "peer")
    no_peer = found if isinstance(found, str) else None
    timed = aware and comm.size > 1 and name_asked == "auto" and (no_peer or no_nccl)
    seconds = timed_all_reduce(comm, xp) if timed else None
    decision = comm.bcast(decide(name_asked, comm.size, aware, aware_reason, seconds, no_nccl, no_peer))
    if decision.problem:
        raise InputError(decision.problem)
    if comm.size == 1:
        return OneRankTransport(decision.name, decision.how)
    if "staged" in (decision.name, decision.beyond) and name_asked == "auto" and comm.rank == 0 \
            and decision.how not in _printed_reasons:
        _printed_reasons.add(decision.how)          # once a process, not once a group
        print(f"mpitp: staging through host memory: {decision.how}", file=sys.stderr, flush=True)
    if isinstance(found, Peers):
        from .peer import PeerTransport
        return PeerTransport(found, make_transport(decision.beyond, decision.how, comm, xp), decision.how)
    return make_transport(decision.name, decision.how, comm, xp)


def decide(name_asked: str, size: int, aware: bool, aware_reason: str, seconds: float | None,
           no_nccl: str | None, no_peer: str | None) -> Decision:
    """Decide from what was found.

    Parameters
    ----------
    name_asked : str
        One of TRANSPORTS.
    size : int
        How many ranks there are.
    aware, aware_reason : bool, str
        What cuda_aware found.
    seconds : float or None
        Of one all-reduce of TIMED_BYTES by a CUDA-aware MPI; None where it was not timed.
    no_nccl, no_peer : str or None
        Why NCCL, and transport peer, cannot be used; None where they can.
    """
    if name_asked == "mpi" and not aware and size > 1:
        return Decision("", "", f"found an MPI that does not take device buffers ({aware_reason}), expected a "
                                f"CUDA-aware one for transport 'mpi', or transport 'nccl' or 'staged'")
    if name_asked == "nccl" and no_nccl and size > 1:
        return Decision("", "", f"found {no_nccl}, expected NCCL for transport 'nccl', or transport 'mpi' or "
                                f"'staged'")
    if name_asked == "peer" and no_peer and size > 1:
        return Decision("", "", f"found {no_peer}, expected GPUs that write to each other for transport 'peer', or "
                                f"transport 'nccl' or 'staged'")
    if name_asked not in ("auto", "peer"):
        return Decision(name_asked, "asked for")
    if size == 1:
        return Decision("mpi" if name_asked == "auto" else name_asked, "one rank: nothing travels")
    other = decide_without_peer(aware, aware_reason, seconds, no_nccl)
    if no_peer:
        return Decision(other.name, f"{other.how}; not peer: {no_peer}")
    beyond = "nccl" if no_nccl is None else other.name
    asked = "asked for; " if name_asked == "peer" else ""
    return Decision("peer", f"{asked}the GPUs write into each other's memory, and {beyond} carries what is longer",
                    beyond=beyond)


def decide_without_peer(aware: bool, aware_reason: str, seconds: float | None, no_nccl: str | None) -> Decision:
    """Decide between the others, where none was asked for; the arguments are decide's."""
    if not aware:
        reason = f"this MPI does not take device buffers ({aware_reason})"
    elif seconds is None:
        return Decision("mpi", aware_reason)
    elif TIMED_BYTES / seconds >= SLOW:
        return Decision("mpi", f"{aware_reason}, {TIMED_BYTES >> 20} MiB in {seconds * 1e3:.2f} ms")
    else:
        reason = f"this MPI takes {seconds * 1e3:.0f} ms for {TIMED_BYTES >> 20} MiB on the device, so it goes " \
                 f"through the host"
    if no_nccl is None:
        return Decision("nccl", reason)
    return Decision("staged", f"{reason}; {no_nccl}")


def timed_all_reduce(comm: MPI.Comm, xp: ModuleType) -> float:
    """Measure the seconds of one all-reduce on device buffers, the longest of the ranks'. Collective."""
    transport = DeviceMpiTransport(comm, partial(wait_for_device, xp))
    x = xp.zeros(TIMED_BYTES // 4, "float32")
    transport.all_reduce(x, "sum")              # opens connections
    wait_for_device(xp)
    comm.Barrier()
    start = time.perf_counter()
    transport.all_reduce(x, "sum")
    return max(comm.allgather(time.perf_counter() - start))


def nccl_obstacle(gpu: Gpu) -> str | None:
    """Say why this rank cannot use NCCL; None where it can."""
    try:
        from cupy.cuda import nccl
        if not getattr(nccl, "available", True):        # what CuPy has in its place
            return "a CuPy without NCCL"
    except ImportError:
        return "a CuPy without NCCL"
    return f"ranks that share a GPU ({gpu.name}), which NCCL refuses" if gpu.shared else None


def make_transport(name: str, how: str, comm: MPI.Comm, xp: ModuleType) -> Transport:
    """Make a transport of several ranks other than peer. Collective."""
    if name == "nccl":
        from .nccl import NcclTransport
        return NcclTransport(comm, xp, how)
    synchronise = partial(wait_for_device, xp)
    if name == "mpi":
        return DeviceMpiTransport(comm, synchronise, how)
    return StagedTransport(comm, synchronise, how,
                           streams=(xp.cuda.Stream(non_blocking=True), xp.cuda.Stream(non_blocking=True)))


def wait_for_device(cupy: ModuleType) -> None:
    """Wait until everything on CuPy's current stream is done."""
    cupy.cuda.get_current_stream().synchronize()
