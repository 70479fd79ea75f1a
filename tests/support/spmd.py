"""What tests under mpirun share: collective verdicts, test data, dense results, small jobs."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = Path(__file__).resolve().parent


def everywhere(condition, comm=MPI.COMM_WORLD):
    """Whether the condition holds on every rank. Collective; what Hypothesis tests must ask before they raise,
    else the ranks shrink different examples."""
    return all(comm.allgather(bool(condition)))


def same_bytes(a, b):
    """Bits, not values: array_equal takes -0.0 for 0.0."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def draw(seed, *shape, dtype=np.float64):
    """The same standard normals on every rank."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def sum_of_blocks(group, compute, partition, shape, dtype):
    """The sum of compute(block) over all blocks of all ranks. Collective."""
    total = group.sum(partition, shape, dtype)
    for block, summand in group.each(compute, partition.blocks_of(group.rank)):
        total.add(block, summand)
    return total.all_reduce()


def job_environment(**more):
    """This environment without the launcher's variables of this job, for jobs that start on a busy, small machine."""
    clean = {key: value for key, value in os.environ.items()
             if not key.startswith(("PMI", "PMIX", "OMPI_", "PRTE", "MPI_LOCAL", "HYDRA", "HYDI", "MPIR"))
             or key.startswith(("OMPI_ALLOW", "OMPI_MCA", "PRTE_MCA"))}
    for name in ("PYTEST_ADDOPTS", "MPITP_PROGRESS", "PYTHONUNBUFFERED"):       # of this session alone
        clean.pop(name, None)
    clean.update(PYTHONPATH=f"{ROOT}:{SUPPORT}", OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1",
                 OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
                 PRTE_MCA_rmaps_default_mapping_policy=":oversubscribe", OMPI_MCA_rmaps_base_oversubscribe="1",
                 OMPI_MCA_mpi_yield_when_idle="1", OMPI_MCA_pml="ob1", OMPI_MCA_btl="self,vader")     # "sm" since 5
    return {**clean, **more}


def mpirun(ranks):
    """The command `mpirun -n ranks`, with the launcher beside this Python if there is one."""
    beside = Path(sys.prefix) / "bin" / "mpirun"
    return [str(beside) if beside.exists() else "mpirun", "-n", str(ranks)]


def job(ranks, *arguments, timeout=300, environment=None, cwd=ROOT):
    """Run `mpirun -n ranks python arguments...`. Returns subprocess.CompletedProcess with text output.

    A job of a few seconds takes a minute on a busy machine; `timeout` is there for one that hangs.
    """
    clean = job_environment(MPIEXEC_TIMEOUT=str(timeout), **(environment or {}))
    return subprocess.run([*mpirun(ranks), sys.executable, *map(str, arguments)], env=clean, cwd=cwd, text=True,
                          capture_output=True, timeout=timeout + 30)
