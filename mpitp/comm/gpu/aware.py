"""Whether the MPI may be handed a GPU's buffers.

That is never guessed: a device pointer given to an MPI that is not CUDA-aware is a segmentation fault.
"""
import ctypes
import os

from mpi4py import MPI

from ...errors import InputError
from .. import agreement

MPIX_GPU_SUPPORT_CUDA = 0       # a constant of MPICH's mpi.h


def cuda_aware(comm: MPI.Comm) -> tuple[bool, str]:
    """Find out whether this MPI takes CUDA buffers.

    These are asked in turn: the environment variable MPITP_CUDA_AWARE (0 or 1), which overrides the others;
    MPIX_Query_cuda_support() (Open MPI, Intel MPI); MPIX_GPU_query_support() (MPICH); "cuda" in the communicator's
    info key mpi_memory_alloc_kinds (MPI 4.1).

    Returns
    -------
    aware : bool
    reason : str
        What was found, of all of them where none says yes.

    Raises
    ------
    InputError
        For another value of MPITP_CUDA_AWARE.
    """
    override = os.environ.get("MPITP_CUDA_AWARE")
    if override is not None:
        if override not in ("0", "1"):
            raise InputError(f"found MPITP_CUDA_AWARE={override!r}, expected 0 or 1")
        return override == "1", f"MPITP_CUDA_AWARE={override}"
    library = ctypes.CDLL(MPI.__file__)         # finds the symbols of the MPI library that it is linked to
    found = []
    if hasattr(library, "MPIX_Query_cuda_support"):
        if library.MPIX_Query_cuda_support() == 1:
            return True, "MPIX_Query_cuda_support() = 1"
        found.append("MPIX_Query_cuda_support() = 0")
    if hasattr(library, "MPIX_GPU_query_support"):
        answer = ctypes.c_int(0)
        failed = library.MPIX_GPU_query_support(MPIX_GPU_SUPPORT_CUDA, ctypes.byref(answer))
        if not failed and answer.value:
            return True, "MPIX_GPU_query_support(CUDA) = 1"
        found.append("MPIX_GPU_query_support(CUDA) = 0")
    info = comm.Get_info()
    kinds = info.get("mpi_memory_alloc_kinds")
    info.Free()
    if kinds and takes_device(kinds):
        return True, f"mpi_memory_alloc_kinds = {kinds}"
    found.append(f"mpi_memory_alloc_kinds = {kinds}" if kinds else "no mpi_memory_alloc_kinds")
    return False, "; ".join(found)


def takes_device(kinds: str) -> bool:
    """Return whether "cuda" or "cuda:device", other restrictors or not, is among comma-separated kinds (MPI 4.1)."""
    for kind in kinds.split(","):
        name, *restrictors = kind.strip().split(":")
        if name == "cuda" and (not restrictors or "device" in restrictors):
            return True
    return False


def cuda_aware_everywhere(comm: MPI.Comm) -> tuple[bool, str]:
    """Call cuda_aware() on every rank, and raise InputError on all of them where two disagree. Collective."""
    agreement.require_everywhere(comm, "whether MPI takes device buffers",
                                 lambda: "{} ({})".format(*cuda_aware(comm)))
    return cuda_aware(comm)
