"""How this process was started: by which launcher, beside how many others, with how many cores.

Needs no NumPy: BLAS reads its number of threads from the environment once, when NumPy is imported.
"""
import ctypes
import os
import platform
from collections.abc import Mapping

from mpi4py import MPI

from ..errors import InputError

# What each launcher tells its processes: (variable with the number of ranks, its name in a message). The launcher
# nearest to the process comes first: a Hydra or Open MPI mpirun may itself have been started by srun.
LAUNCHERS = (
    ("JSM_NAMESPACE_SIZE", "jsrun"),
    ("OMPI_COMM_WORLD_SIZE", "Open MPI's mpirun"),
    ("PMI_SIZE", "a Hydra mpirun (MPICH, Intel MPI) or another PMI launcher (PALS, srun)"),
    ("SLURM_STEP_NUM_TASKS", "srun"),
    ("FLUX_JOB_SIZE", "flux run"),
)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS",
                    "VECLIB_MAXIMUM_THREADS")
USER_THREADS = {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}     # before we set any


def library_name() -> str:
    """Name and version of the MPI library that mpi4py is bound to, such as 'MPICH 5.0.2'."""
    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"


def world() -> MPI.Intracomm:
    """Return the communicator of all ranks."""
    return MPI.COMM_WORLD


def is_first_rank() -> bool:
    """Return whether this process is the one that prints."""
    return MPI.COMM_WORLD.rank == 0


def launcher(environment: Mapping[str, str] | None = None) -> tuple[str | None, int]:
    """Return the launcher that started this process, by its variables.

    Parameters
    ----------
    environment : mapping of str to str, optional
        The process's variables, os.environ by default.

    Returns
    -------
    (str or None, int)
        Its name and how many ranks it started; (None, 1) where there was none.
    """
    environment = os.environ if environment is None else environment
    # -5 in a batch script's own shell, -6 in salloc's: not a process of srun
    in_step = environment.get("SLURM_STEP_ID", "").isdigit()
    of_step = environment.get("SLURM_STEP_NUM_TASKS", "") if in_step else ""
    for variable, name in LAUNCHERS:
        ranks = of_step if variable == "SLURM_STEP_NUM_TASKS" else environment.get(variable, "")
        if ranks.isdigit():
            return "srun" if variable == "PMI_SIZE" and ranks == of_step else name, int(ranks)
    return None, 1


def remedy(launcher_name: str | None, library: str) -> str:
    """Return what to change where this launcher and mpi4py's library (its name first) are of two MPIs."""
    if launcher_name == "srun":
        mpi_type = "pmix" if library.startswith("Open MPI") else "cray_shasta" if library.startswith("Cray") else "pmi2"
        return f"start with srun --mpi={mpi_type} (srun --mpi=list shows what there is), or set MPI4PY_LIBMPI to the " \
               f"library that this Slurm starts"
    return f"start with the mpirun of {library}, or set MPI4PY_LIBMPI to the library of the launcher"


def require_matching_launcher() -> None:
    """Raise InputError when a launcher started several ranks and MPI sees one: it belongs to another MPI.

    Then every process computes everything.
    """
    name, ranks = launcher()
    if ranks > 1 and MPI.COMM_WORLD.size == 1:
        raise InputError(
            f"found {ranks} processes started by {name}, each alone in an MPI world of 1 rank, expected one world "
            f"of {ranks}: mpi4py uses {library_name()}, so {remedy(name, library_name())}")


def join_world() -> MPI.Intracomm:
    """Return the communicator of all ranks for a first group; from now on ranks that never come to it are noticed."""
    require_matching_launcher()
    if MPI.COMM_WORLD.size > 1 and os.environ.get("MPITP_STALL_LIMIT") != "0":
        from .early import expect_all
        expect_all()
    return MPI.COMM_WORLD


def cores() -> list[int]:
    """Return the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))     # macOS has no affinity


def share_of_cores(comm: MPI.Comm) -> int:
    """Return how many cores are this rank's where the ranks of a node share theirs evenly; at least 1. Collective."""
    mine = cores()
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    of_ranks = node.allgather(mine)
    node.Free()
    return max(1, int(sum(1 / sum(core in others for others in of_ranks) for core in mine) + 1e-9))


def usable_cores(environment: Mapping[str, str] | None = None) -> int:
    """Return the cores of this node that a job may use: what Slurm or a control group allots of them, else all."""
    from .control_groups import allotted_cores
    environment = os.environ if environment is None else environment
    cores_here, allocated = os.cpu_count() or 1, environment.get("SLURM_CPUS_ON_NODE", "")
    cores_here = min(cores_here, allotted_cores() or cores_here)
    return min(cores_here, int(allocated)) if allocated.isdigit() and int(allocated) else cores_here


def idle_cores(comm: MPI.Comm) -> int:
    """Return how many cores of this node the launcher keeps from its ranks, which could use more. Collective."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    used, ranks = set().union(*node.allgather(cores())), node.size
    node.Free()
    pinned = launcher()[0] is not None and len(used) <= ranks
    return max(0, usable_cores() - len(used)) if pinned else 0


def set_blas_threads(comm: MPI.Comm, reproducible: bool = False) -> int:
    """Give BLAS this rank's share of the cores, unless the user set a number. Before NumPy is imported. Collective.

    Left alone, every rank starts a thread for every core. Reproducible mode: one thread (see workers.py).

    Returns
    -------
    int
        This rank's share of the cores.
    """
    share = share_of_cores(comm)
    if reproducible:
        os.environ.update({name: "1" for name in THREAD_VARIABLES})
    elif not is_set("OMP_NUM_THREADS"):
        for name in THREAD_VARIABLES:               # one that the user set for a library of its own stays
            if not is_set(name):
                os.environ[name] = str(share)
    return share


def is_set(variable: str) -> bool:
    """Return whether a variable of the environment is a number of threads; BLAS takes any other text for none."""
    first = os.environ.get(variable, "").split(",")[0].strip()      # OpenMP takes a number a level: "4,2"
    return first.isdigit() and int(first) > 0


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next array, where it would give it back to the kernel. Elsewhere: nothing.

    Giving a page back and faulting it in again costs 2 microseconds (measured: a tenth of a block's time in
    reproducible mode, whose arrays come and go block by block). It is process-wide: for programs, not for a library.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3     # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_THRESHOLD, 32 << 20)
    mallopt(M_TRIM_THRESHOLD, 1 << 30)


def machine() -> str:
    """Return what the bits of a product depend on: the processor's model, NumPy, and the BLAS kernel that runs."""
    import numpy
    model = platform.machine()                  # platform.processor() starts a process: not under MPI
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, NumPy {numpy.__version__}, {blas_name()}"


def blas_name() -> str:
    """Return the BLAS that NumPy uses and the kernel it chose for this processor, as far as can be known."""
    import numpy
    try:
        from threadpoolctl import threadpool_info
        found = [f"{info['internal_api']} {info['version']} ({info.get('architecture', 'no kernel named')})"
                 for info in threadpool_info() if info["user_api"] == "blas"]
    except ImportError:
        found = []
    if not found:
        blas = numpy.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
        found = [f"{blas.get('name', 'unknown BLAS')} {blas.get('version', '')} "
                 f"(OPENBLAS_CORETYPE={os.environ.get('OPENBLAS_CORETYPE', 'unset')})"]
    return ", ".join(sorted(set(found)))
