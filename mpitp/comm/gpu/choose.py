"""The transport: who carries what the ranks add up. Chosen once, by rank 0, out of what all of them found.

mpi : MPI on the arrays themselves; on a GPU only where the MPI is CUDA-aware. The default wherever that is not slow
nccl : NCCL through CuPy, on device arrays
staged : MPI on copies in pinned host memory
"""
import sys
import time

from ...errors import InputError
from .alone import OneRankTransport
from .aware import cuda_aware_everywhere
from ..mpi import requested_transport
from .mpi_device import DeviceMpiTransport
from .staged import StagedTransport

TIMED_BYTES = 16 << 20
SLOW = 3e9          # bytes a second, below which a sum goes through the host: Open MPI 5 does 0.7e9, a good MPI 250e9
_said: set[str] = set()


def choose_transport(comm, xp, gpu, transport):
    """The transport of a group, with its name and `how`, why it is that one. Collective.

    Raises InputError, on every rank, for a transport that cannot be had here.
    """
    asked = requested_transport(transport)
    aware, how_aware = cuda_aware_everywhere(comm)
    mpi = DeviceMpiTransport(comm, lambda: xp.cuda.get_current_stream().synchronize())
    seconds = None
    if aware and comm.size > 1 and asked == "auto":
        seconds = timed_all_reduce(comm, xp, mpi)
    no_nccl = first_reason(comm.gather(why_not_nccl(xp, gpu)))
    decision = decide(asked, comm.size, aware, how_aware, seconds, no_nccl) if comm.rank == 0 else None
    name, how, problem = comm.bcast(decision)
    if problem:
        raise InputError(problem)
    made = OneRankTransport(name) if comm.size == 1 else mpi if name == "mpi" else \
        make_nccl(comm, xp) if name == "nccl" else make_staged(comm, xp)
    made.how = how
    if name == "staged" and comm.size > 1 and asked == "auto" and comm.rank == 0 and how not in _said:
        _said.add(how)                          # once a process, not once a group
        print(f"mpitp: staging through host memory: {how}", file=sys.stderr, flush=True)
    return made


def decide(asked, size, aware, how_aware, seconds, no_nccl):
    """(name, why, None), or (None, None, the problem), from what was found: see choose_transport.

    seconds : of one all-reduce of TIMED_BYTES by a CUDA-aware MPI, where it was timed
    no_nccl : why NCCL cannot be used, None where it can
    """
    if asked == "mpi" and not aware and size > 1:
        return None, None, f"found an MPI that does not take device buffers ({how_aware}), expected a CUDA-aware one " \
                           f"for transport 'mpi', or transport 'nccl' or 'staged'"
    if asked == "nccl" and no_nccl and size > 1:
        return None, None, f"found {no_nccl}, expected NCCL for transport 'nccl', or transport 'mpi' or 'staged'"
    if asked != "auto":
        return asked, "asked for", None
    if size == 1:
        return "mpi", "one rank: nothing travels", None
    if aware and (seconds is None or TIMED_BYTES / seconds >= SLOW):
        timed = "" if seconds is None else f", {TIMED_BYTES >> 20} MiB in {seconds * 1e3:.2f} ms"
        return "mpi", how_aware + timed, None
    reason = f"this MPI does not take device buffers ({how_aware})" if not aware else \
        f"this MPI takes {seconds * 1e3:.0f} ms for {TIMED_BYTES >> 20} MiB on the device, so it goes through the host"
    if no_nccl is None:
        return "nccl", reason, None
    return "staged", f"{reason}; {no_nccl}", None


def timed_all_reduce(comm, xp, mpi):
    """Seconds of one all-reduce on device buffers, the longest of the ranks'. Collective."""
    x = xp.zeros(TIMED_BYTES // 4, "float32")
    mpi.all_reduce(x, "sum")                    # opens connections
    xp.cuda.get_current_stream().synchronize()
    comm.Barrier()
    start = time.perf_counter()
    mpi.all_reduce(x, "sum")
    return max(comm.allgather(time.perf_counter() - start))


def why_not_nccl(xp, gpu):
    """Why NCCL cannot be used by this rank, None where it can."""
    try:
        from cupy.cuda import nccl
        if not getattr(nccl, "available", True):        # what CuPy has in its place
            return "a CuPy without NCCL"
    except ImportError:
        return "a CuPy without NCCL"
    return f"ranks that share a GPU ({gpu.name}), which NCCL refuses" if gpu.shared else None


def first_reason(reasons):
    return next((reason for reason in reasons or () if reason), None)


def make_nccl(comm, xp):
    from .nccl import NcclTransport
    return NcclTransport(comm, xp)


def make_staged(comm, xp):
    streams = tuple(xp.cuda.Stream(non_blocking=True) for _ in range(2)) if hasattr(xp.cuda, "Stream") else None
    return StagedTransport(comm, lambda: xp.cuda.get_current_stream().synchronize(), streams=streams)
