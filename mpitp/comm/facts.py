"""What a rank knows about its machine, its MPI and its share of both; gathered for `doctor`. Judges nothing."""
import glob
import os
import platform
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mpi4py
from mpi4py import MPI

from . import control_groups, launch
from .gpu.aware import cuda_aware

VARIABLES = ("OPENBLAS_CORETYPE", "MKL_ENABLE_INSTRUCTIONS", "MPI4PY_LIBMPI", "MPITP_CUDA_AWARE")


@dataclass
class RankFacts:
    """What one rank knows. Sizes are in bytes; None stands for what cannot be known."""
    host: str
    cores: list[int]                # that this rank may run on
    machine_cores: int              # of its node, that the job may use
    python: str
    numpy: str
    mpi4py: str
    mpi: str
    transport: str
    world: int
    launcher: str | None
    launcher_ranks: int
    launcher_rank: int
    blas: str
    blas_threads: int | None        # in force
    instructions: list[str]         # avx2, avx512f where the processor has them
    variables: dict[str, str]
    shared_memory: int | None       # free in /dev/shm
    quota: float | None             # cores that the container may use
    cuda_aware: bool = False
    cuda_aware_how: str = ""
    gpus: int | None = None         # visible; None: no CuPy
    gpu: str = ""                   # model and UUID of this rank's
    gpu_shared: bool = False        # with another rank
    gpu_transport: str = ""         # that a group on GPUs would take
    gpu_transport_how: str = ""     # and why
    share: int = 1                  # of the node's cores
    node_ranks: int = 1
    memory_limit: int | None = None         # of the job or container on this host; None: none that is known
    locked_memory: int | None = None        # that a process may keep from being swapped, as InfiniBand wants; None: any
    infiniband: bool = False                # whether the host has such an adapter


def of_all_ranks() -> list[RankFacts] | None:
    """Return the RankFacts of every rank on rank 0, None on the others. Collective."""
    return MPI.COMM_WORLD.gather(of_this_rank(MPI.COMM_WORLD))


def by_host(ranks: list[RankFacts]) -> dict[str, list[RankFacts]]:
    """Return the ranks of each host."""
    found: dict[str, list[RankFacts]] = {}
    for rank in ranks:
        found.setdefault(rank.host, []).append(rank)
    return found


def hosts_of_ranks() -> list[str]:
    """Return the host of every rank, on every rank. Collective."""
    return MPI.COMM_WORLD.allgather(socket.gethostname())


def from_first_rank(value: Any) -> Any:
    """Give rank 0's value to every rank. Collective."""
    return MPI.COMM_WORLD.bcast(value)


def of_this_rank(comm: MPI.Comm) -> RankFacts:
    """Return the RankFacts of this process. Collective."""
    import numpy
    launcher, ranks = launch.launcher()
    aware, how = cuda_aware(comm)
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    node_ranks = node.size
    node.Free()
    return RankFacts(
        host=socket.gethostname(), cores=launch.cores(), machine_cores=launch.usable_cores(),
        python=platform.python_version(), numpy=numpy.__version__, mpi4py=mpi4py.__version__,
        mpi=launch.library_name(), transport=transport(), world=comm.size, launcher=launcher, launcher_ranks=ranks,
        launcher_rank=launcher_rank(), blas=launch.blas_name(), blas_threads=blas_threads(),
        instructions=instructions(),
        variables={**launch.USER_THREADS, **{name: os.environ[name] for name in VARIABLES if name in os.environ}},
        shared_memory=shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None, quota=cpu_quota(),
        cuda_aware=aware, cuda_aware_how=how, gpus=gpu_count(), share=launch.share_of_cores(comm),
        node_ranks=node_ranks, memory_limit=control_groups.memory_limit(), locked_memory=locked_memory(),
        infiniband=bool(glob.glob("/sys/class/infiniband/*")), **gpu_facts(comm))


def launcher_rank(environment: Mapping[str, str] | None = None) -> int:
    """Return the number of this process among those of its launcher, also where MPI does not know of the others."""
    environment = os.environ if environment is None else environment
    for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID", "PALS_RANKID", "FLUX_TASK_RANK"):
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return 0


def transport() -> str:
    """Return how the library moves bytes, as far as it tells."""
    version = MPI.Get_library_version()
    for line in version.splitlines():
        if line.startswith("MPICH Device:"):
            return line.split(":", 1)[1].strip()
    if "Open MPI" in version:
        chosen = [f"{name}={os.environ[f'OMPI_MCA_{name}']}" for name in ("pml", "btl")
                  if f"OMPI_MCA_{name}" in os.environ]
        return ", ".join(chosen) or "chosen by Open MPI (OMPI_MCA_pml_base_verbose=10 shows it)"
    if "Intel" in version:
        return f"I_MPI_FABRICS={os.environ.get('I_MPI_FABRICS', 'default')}"
    return "unknown"


def blas_threads() -> int | None:
    """Return how many threads BLAS uses; without threadpoolctl by its variables, None where these are not set."""
    try:
        from threadpoolctl import threadpool_info
        found = [info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"]
        if found:
            return max(found)
    except ImportError:
        pass
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return None


def instructions(path: str = "/proc/cpuinfo") -> list[str]:
    """Return which of avx2 and avx512f the processor has."""
    try:
        with open(path) as lines:
            flags = next((line.split() for line in lines if line.startswith("flags")), [])
    except OSError:
        return []
    return [name for name in ("avx2", "avx512f") if name in flags]


def cpu_quota(path: str = "/sys/fs/cgroup/cpu.max") -> float | None:
    """Return the cores that a container's limit amounts to, None without a limit."""
    try:
        with open(path) as file:
            quota, period = file.read().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def locked_memory() -> int | None:
    """Return the bytes that this process may lock in memory, None for any number."""
    try:
        import resource
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        return None if soft == resource.RLIM_INFINITY else soft
    except (ImportError, AttributeError):       # not on this system
        return None


def gpu_count() -> int | None:
    """Return how many GPUs CuPy sees; None without CuPy."""
    try:
        import cupy
        return cupy.cuda.runtime.getDeviceCount()
    except ImportError:
        return None
    except Exception:               # CuPy without a driver raises errors of its own
        return 0


def gpu_facts(comm: MPI.Comm) -> dict[str, Any]:
    """Return the fields of RankFacts that a group on GPUs would give; none where a rank has no GPU. Collective."""
    from .group import TensorParallelGroup
    if not min(comm.allgather(gpu_count() or 0)):
        return {}
    with TensorParallelGroup(comm, device="gpu", share_gpu=True) as group:
        assert group.gpu is not None            # device="gpu"
        return dict(gpu=f"{group.gpu.name} {group.gpu.uuid}", gpu_shared=group.gpu.shared,
                    gpu_transport=group.transport.name, gpu_transport_how=group.transport.how)
