"""Tell whether this machine is set up right: Python, BLAS, MPI, launcher, cores, shared memory, GPUs on one page.

Each finding that costs speed or correctness comes with the line to change. It runs without mpirun, and under every
launcher. Exits with 1 when something is wrong.
"""
import argparse
from dataclasses import dataclass

from .. import measure, tables
from ..comm import facts as machine
from ..comm.facts import RankFacts, by_host
from ..comm.launch import is_first_rank, remedy, world
from ..errors import InputError
from ..measure import Link
from . import report
from .doctor_page import Finding, page, table_of_links, verdict

# OpenBLAS kernels that use less than AVX-512, or less than AVX2.
BELOW_AVX512 = {"HASWELL", "ZEN", "EXCAVATOR", "STEAMROLLER", "PILEDRIVER", "BULLDOZER", "SANDYBRIDGE", "NEHALEM",
                "PRESCOTT", "BARCELONA", "CORE2", "PENRYN", "DUNNINGTON", "ATOM", "GENERIC"}
BELOW_AVX2 = BELOW_AVX512 - {"HASWELL", "ZEN", "EXCAVATOR"}
# What MPICH and Open MPI want of /dev/shm for messages on one node: so much, and more for each rank; as in run.sh.
SHARED_MEMORY, SHARED_MEMORY_A_RANK = 16 << 20, 8 << 20
LOCKED_MEMORY = 64 << 20            # less than InfiniBand needs for the buffers of a few ranks


@dataclass
class DoctorReport:
    """Everything that is printed and written."""
    ranks: list[RankFacts]
    findings: list[Finding]
    links: list[Link]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the report there, too")


def run(arguments: argparse.Namespace) -> int:
    """Run the command on this rank; returns 0 when nothing is wrong, else 1."""
    refuse_early(arguments)
    ranks, status = machine.of_all_ranks(), 0
    links = measure.links(world(), machine.hosts_of_ranks())
    # Under the launcher of another MPI every process is rank 0 of its own world: the first one speaks.
    if ranks is not None and (ranks[0].world > 1 or ranks[0].launcher_rank == 0):
        found = DoctorReport(ranks, findings(ranks), links)
        lines = [*page(ranks), *table_of_links(links), "", *verdict(found.findings)]
        report.publish(lines, found, "mpitp.doctor/1", arguments.json)
        status = 1 if found.findings else 0
    return machine.from_first_rank(status)


def refuse_early(arguments: argparse.Namespace) -> None:
    """Raise InputError on every rank, before anything is found out, where rank 0 cannot write the report."""
    problem = None
    if arguments.json and is_first_rank():
        try:
            tables.require_writable(arguments.json)
        except InputError as error:
            problem = str(error)
    problem = machine.from_first_rank(problem)
    if problem:
        raise InputError(problem)


# --- what is wrong: functions of the facts alone ------------------------------------------------------------

def findings(ranks: list[RankFacts]) -> list[Finding]:
    """Everything that is wrong with these ranks, the gravest first."""
    alone = wrong_launcher(ranks)
    if alone:                               # a rank that sees no other says nothing true about shares and cores
        return [alone]
    checks = (different_ranks, oversubscribed, too_many_threads, idle_cores, crowded_cores,
              idle_threads, slow_kernel, small_quota, small_shared_memory,
              small_locked_memory, staged_between_gpus, shared_gpu)
    return [finding for check in checks for finding in [check(ranks)] if finding]


def wrong_launcher(ranks: list[RankFacts]) -> Finding | None:
    """Several processes were started, each of which is alone in its MPI world."""
    first = ranks[0]
    if first.launcher_ranks > 1 and first.world == 1:
        return Finding(
            "wrong launcher",
            f"{first.launcher_ranks} processes started by {first.launcher}, each alone: mpi4py uses {first.mpi}",
            remedy(first.launcher, first.mpi))
    return None


def different_ranks(ranks: list[RankFacts]) -> Finding | None:
    """Ranks run with different versions, or on different kernels of BLAS."""
    for name in ("python", "numpy", "mpi4py", "mpi", "blas"):
        values = sorted({getattr(rank, name) for rank in ranks})
        if len(values) > 1:
            return Finding("ranks differ", f"{name} is {' and '.join(values)}",
                           "use one environment and one kind of node (reproducible mode refuses others)")
    return None


def oversubscribed(ranks: list[RankFacts]) -> Finding | None:
    """A node has more ranks than cores that they may use."""
    for host, here in by_host(ranks).items():
        cores = set().union(*(rank.cores for rank in here))
        if len(here) > len(cores):
            return Finding(
                "more ranks than cores",
                f"{len(here)} ranks on the {len(cores)} cores of {host}: waiting takes the time of working",
                f"mpirun -n {len(cores)}")
    return None


def too_many_threads(ranks: list[RankFacts]) -> Finding | None:
    """A node has more threads of BLAS than cores."""
    for host, here in by_host(ranks).items():
        cores = set().union(*(rank.cores for rank in here))
        threads = sum(rank.blas_threads or 0 for rank in here)
        if threads > max(len(cores), len(here)):
            return Finding(
                "more threads than cores",
                f"{threads} BLAS threads of {len(here)} ranks on {len(cores)} cores of {host}",
                f"export OMP_NUM_THREADS={max(1, len(cores) // len(here))} (or unset it: mpitp sets it)")
    return None


def idle_cores(ranks: list[RankFacts]) -> Finding | None:
    """Ranks are pinned to fewer cores than the job has on this node, one each at most."""
    for host, here in by_host(ranks).items():
        cores = set().union(*(rank.cores for rank in here))
        if all(rank.launcher for rank in here) and len(cores) < here[0].machine_cores and len(cores) <= len(here):
            return Finding(
                "pinned", f"{len(here)} rank{'s' * (len(here) > 1)} pinned to {len(cores)} of the "
                f"{here[0].machine_cores} cores of {host}",
                "mpirun --bind-to none (Open MPI), srun --cpus-per-task=N (Slurm), I_MPI_PIN=0 (Intel MPI)")
    return None


def crowded_cores(ranks: list[RankFacts]) -> Finding | None:
    """Ranks share cores while others of the node are free."""
    for host, here in by_host(ranks).items():
        cores = set().union(*(rank.cores for rank in here))
        free = here[0].machine_cores - len(cores)
        if len(here) > 1 and free and len(cores) < len(here) <= here[0].machine_cores:
            return Finding(
                "ranks share cores", f"{len(here)} ranks on {len(cores)} cores of {host}, {free} others free",
                "mpirun --bind-to none, or --map-by core")
    return None


def idle_threads(ranks: list[RankFacts]) -> Finding | None:
    """A rank has more cores than threads of BLAS, by the user's variables."""
    for number, rank in enumerate(ranks):
        if rank.blas_threads and rank.blas_threads < rank.share and any(
                name.endswith("NUM_THREADS") for name in rank.variables):
            return Finding(
                "idle cores", f"rank {number} has {rank.share} cores and {rank.blas_threads} BLAS threads",
                f"export OMP_NUM_THREADS={rank.share} (or unset it)")
    return None


def slow_kernel(ranks: list[RankFacts]) -> Finding | None:
    """BLAS is told to use less than the processor has."""
    for rank in ranks:
        forced = rank.variables.get("OPENBLAS_CORETYPE", "")
        if "avx512f" in rank.instructions and forced.upper() in BELOW_AVX512 or \
                "avx2" in rank.instructions and forced.upper() in BELOW_AVX2:
            return Finding(
                "slow BLAS kernel", f"OPENBLAS_CORETYPE={forced} on a processor with {rank.instructions[-1]}: products "
                f"take up to twice as long", "unset OPENBLAS_CORETYPE")
        limit = rank.variables.get("MKL_ENABLE_INSTRUCTIONS", "AVX512")
        if "avx512f" in rank.instructions and not limit.upper().startswith("AVX512"):
            return Finding("slow BLAS kernel", f"MKL_ENABLE_INSTRUCTIONS={limit}", "unset MKL_ENABLE_INSTRUCTIONS")
    return None


def small_quota(ranks: list[RankFacts]) -> Finding | None:
    """A container allows fewer cores than its ranks see."""
    for host, here in by_host(ranks).items():
        cores = set().union(*(rank.cores for rank in here))
        wanted, quota = min(len(cores), sum(rank.blas_threads or 1 for rank in here)), here[0].quota
        if quota is not None and quota < wanted - 0.01:
            return Finding(
                "container limit", f"{quota:.1f} cores allowed by cpu.max, {len(cores)} seen on {host}",
                f"mpirun -n {max(1, int(quota))}, or a larger limit (docker run --cpus)")
    return None


def small_shared_memory(ranks: list[RankFacts]) -> Finding | None:
    """The MPI may run out of /dev/shm."""
    for host, here in by_host(ranks).items():
        free, wanted = here[0].shared_memory, SHARED_MEMORY + len(here) * SHARED_MEMORY_A_RANK
        if len(here) > 1 and free is not None and free < wanted:
            return Finding(
                "little shared memory", f"{tables.size(free)} free in /dev/shm of {host}, where {len(here)} ranks want "
                f"{tables.size(wanted)}", "docker run --shm-size=1g, or remount /dev/shm larger")
    return None


def small_locked_memory(ranks: list[RankFacts]) -> Finding | None:
    """InfiniBand cannot lock the buffers that it sends from."""
    for host, here in by_host(ranks).items():
        limit = here[0].locked_memory
        if len(by_host(ranks)) > 1 and here[0].infiniband and limit is not None and limit < LOCKED_MEMORY:
            return Finding(
                "little locked memory", f"{tables.size(limit)} may be locked on {host}, whose InfiniBand wants more",
                "ulimit -l unlimited (under Slurm: PropagateResourceLimitsExcept=MEMLOCK, and the limit of slurmd)")
    return None


def staged_between_gpus(ranks: list[RankFacts]) -> Finding | None:
    """Find GPUs that talk through the memory of the host."""
    first = ranks[0]
    if first.gpus and first.gpu_transport == "staged" and first.world > 1:
        return Finding(
            "GPUs talk through the host", f"{first.mpi}: {first.gpu_transport_how}",
            "an MPI built with CUDA, or a CuPy with NCCL and a GPU a rank")
    return None


def shared_gpu(ranks: list[RankFacts]) -> Finding | None:
    """Several ranks compute on one GPU."""
    shared = [str(number) for number, rank in enumerate(ranks) if rank.gpu_shared]
    if shared:
        return Finding("ranks share a GPU", f"ranks {', '.join(shared)} on {len({rank.gpu for rank in ranks})}",
                       f"mpirun -n {len({rank.gpu for rank in ranks})}, or --share-gpu where that is meant")
    return None
