"""How this process was started: launchers, cores, BLAS threads, the machine that the bits depend on."""
import os
import subprocess
import sys

import pytest

import mpitp
from mpitp import InputError
from mpitp.comm import control_groups, launch, workers
from spmd import ROOT, job_environment

# --- launchers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment, words, ranks", [
    ({}, None, 1),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI's mpirun", 4),
    ({"PMI_SIZE": "3", "PMI_RANK": "0"}, "Hydra", 3),
    ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_ID": "0"}, "srun", 8),
    ({"SLURM_NTASKS": "8", "SLURM_NPROCS": "8", "SLURM_JOB_ID": "1"}, None, 1),             # inside sbatch or salloc
    ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_ID": "-5"}, None, 1),        # sbatch called from within a step of 8
    ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "-6"}, None, 1),        # salloc's interactive step
    ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "0", "PMI_SIZE": "16"}, "Hydra", 16),   # one proxy a node by srun
    ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "0", "OMPI_COMM_WORLD_SIZE": "16"}, "Open MPI", 16),
    ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_ID": "0", "PMI_SIZE": "8"}, "srun", 8),      # srun --mpi=pmi2
    ({"JSM_NAMESPACE_SIZE": "6", "OMPI_COMM_WORLD_SIZE": "6"}, "jsrun", 6),
    ({"FLUX_JOB_SIZE": "2"}, "flux", 2),
    ({"PMI_SIZE": "many"}, None, 1),
])
def test_launchers(environment, words, ranks):
    name, found = launch.launcher(environment)
    assert found == ranks and (name is None if words is None else words in name)


def test_cores_that_a_job_may_use(monkeypatch):
    """On a node that is shared, what Slurm or a control group allotted: ranks that fill it are not pinned."""
    monkeypatch.setattr(control_groups, "allotted_cores", lambda: None)
    assert launch.usable_cores({"SLURM_CPUS_ON_NODE": "1"}) == 1
    for nonsense in ("9999", "two", "0", ""):
        assert launch.usable_cores({"SLURM_CPUS_ON_NODE": nonsense}) == os.cpu_count()
    assert launch.usable_cores({}) == os.cpu_count()
    monkeypatch.setattr(control_groups, "allotted_cores", lambda: 1)
    assert launch.usable_cores({}) == launch.usable_cores({"SLURM_CPUS_ON_NODE": "2"}) == 1


@pytest.mark.parametrize("variable, name", [("PMI_SIZE", "Hydra"), ("OMPI_COMM_WORLD_SIZE", "Open MPI's mpirun")])
def test_the_wrong_launcher(world, monkeypatch, variable, name):
    for known, _ in launch.LAUNCHERS:
        monkeypatch.delenv(known, raising=False)
    monkeypatch.setenv(variable, str(world.size + 3))
    if world.size > 1:                                              # MPI sees several ranks: all is well
        mpitp.TensorParallelGroup().close()
        return
    for comm in (None, world):
        with pytest.raises(InputError) as caught:
            mpitp.TensorParallelGroup(comm)
        text = str(caught.value)
        assert name in text and launch.library_name() in text
        assert "found 4 processes" in text and "MPI4PY_LIBMPI" in text
    mpitp.TensorParallelGroup(world.Dup()).close()                  # the way out for who knows better


@pytest.mark.launcher
def test_the_wrong_launcher_of_the_program():
    environment = job_environment(FLUX_JOB_SIZE="4")
    done = subprocess.run([sys.executable, "-m", "mpitp", "--hidden-size", "8"], cwd=ROOT, env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith("mpitp: found 4 processes started by flux run")
    assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_library_name():
    name, *version = launch.library_name().rsplit(" ", 1)
    assert name and version[0][0].isdigit()


# --- cores and threads ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("cores_of, expected", [
    (lambda rank: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], {1: 12, 2: 6, 3: 4, 4: 3, 5: 2}),     # unpinned
    (lambda rank: [2 * rank, 2 * rank + 1], {1: 2, 2: 2, 3: 2, 4: 2, 5: 2}),                    # pinned to two each
    (lambda rank: [7], {1: 1, 2: 1, 3: 1, 4: 1, 5: 1}),                                         # all on one core
    (lambda rank: [0, 1, 2], {1: 3, 2: 1, 3: 1, 4: 1, 5: 1}),
    (lambda rank: [0, 1] if rank == 0 else [1], {1: 2, 2: 1, 3: 1, 4: 1, 5: 1}),
])
def test_share_of_cores(world, monkeypatch, cores_of, expected):
    monkeypatch.setattr(launch, "cores", lambda: cores_of(world.rank))
    assert launch.share_of_cores(world) == expected[world.size]


def test_cores(monkeypatch):
    assert launch.cores() and set(launch.cores()) <= set(range(4096))
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.delattr(os, "sched_getaffinity")
    assert launch.cores() == list(range(os.cpu_count()))            # macOS


@pytest.mark.parametrize("before, reproducible, after", [
    ({}, False, {"OMP_NUM_THREADS": "5", "OPENBLAS_NUM_THREADS": "5", "MKL_NUM_THREADS": "5"}),
    ({"OMP_NUM_THREADS": "3"}, False, {"OMP_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": None, "MKL_NUM_THREADS": None}),
    ({"MKL_NUM_THREADS": "3"}, False, {"MKL_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "5"}),
    ({"OMP_NUM_THREADS": ""}, False, {"OMP_NUM_THREADS": "5", "OPENBLAS_NUM_THREADS": "5"}),
    ({"OMP_NUM_THREADS": "many", "MKL_NUM_THREADS": "0"}, False, {"OMP_NUM_THREADS": "5", "MKL_NUM_THREADS": "5"}),
    ({"OMP_NUM_THREADS": "3,2"}, False, {"OMP_NUM_THREADS": "3,2", "OPENBLAS_NUM_THREADS": None}),
    ({"OMP_NUM_THREADS": "3"}, True, {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}),
])
def test_blas_threads_by_environment(world, monkeypatch, before, reproducible, after):
    for name in launch.THREAD_VARIABLES:
        monkeypatch.setenv(name, "0")                               # so that the old value comes back
        monkeypatch.delenv(name)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "share_of_cores", lambda comm: 5)
    assert launch.set_blas_threads(world, reproducible) == 5
    assert {name: os.environ.get(name) for name in after} == after


# --- one BLAS thread -------------------------------------------------------------------------------------------

def blas_threads():
    from threadpoolctl import threadpool_info
    return {info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"}


def test_the_last_group_gives_the_threads_back(world):
    """Whichever goes first: the others still need one thread."""
    from threadpoolctl import threadpool_limits
    with threadpool_limits(2, user_api="blas"):
        group = mpitp.TensorParallelGroup(reproducible=True)
        part = group.subgroup(0)
        assert blas_threads() == {1}
        group.close()
        assert blas_threads() == {1}, "the subgroup's products would have other bits"
        part.close()
        assert blas_threads() == {2}


def test_a_group_that_is_refused_gives_the_threads_back(world, monkeypatch):
    if world.size == 1:
        pytest.skip("one rank agrees with itself")
    from threadpoolctl import threadpool_limits
    monkeypatch.setattr(launch, "machine", lambda: f"processor {min(world.rank, 1)}")
    with threadpool_limits(2, user_api="blas"):
        pattern = "disagree on the machine type, .*: rank 0: processor 0; ranks? 1.*processor 1"
        with pytest.raises(InputError, match=pattern):
            mpitp.TensorParallelGroup(reproducible=True)
        assert blas_threads() == {2} and workers._holders == 0
    mpitp.TensorParallelGroup().close()                             # ordinary mode does not ask


@pytest.mark.parametrize("environment, holds", [
    ({"OMP_NUM_THREADS": "1"}, True), ({"OPENBLAS_NUM_THREADS": "1"}, True), ({}, False),
    ({"OMP_NUM_THREADS": "2"}, False), ({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "4"}, False),
    ({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}, True), ({"MKL_NUM_THREADS": "1"}, False)])
def test_without_threadpoolctl(world, monkeypatch, environment, holds):
    """The variable of BLAS's own goes before the general one."""
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    for name in launch.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if holds:
        mpitp.TensorParallelGroup(reproducible=True).close()
    else:
        pattern = "found no threadpoolctl, expected it for reproducible=True.*OMP_NUM_THREADS=1"
        with pytest.raises(InputError, match=pattern):
            mpitp.TensorParallelGroup(reproducible=True)
    assert workers._holders == 0


def test_a_blas_that_threadpoolctl_does_not_know(world, monkeypatch):
    import threadpoolctl
    monkeypatch.setattr(threadpoolctl.ThreadpoolController, "select",
                        lambda self, **by: threadpoolctl.ThreadpoolController._from_controllers([]))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with pytest.raises(InputError, match="found a BLAS that threadpoolctl does not know"):
        mpitp.TensorParallelGroup(reproducible=True)


# --- what the bits depend on -------------------------------------------------------------------------------------

def test_blas_name(monkeypatch):
    import numpy
    known = launch.blas_name()
    assert "(" in known and "\n" not in known
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    built_with = numpy.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
    assert launch.blas_name().startswith(built_with) and launch.blas_name().endswith("(OPENBLAS_CORETYPE=Haswell)")


def test_machine():
    import numpy
    assert f"NumPy {numpy.__version__}" in launch.machine() and launch.blas_name() in launch.machine()
    assert launch.machine() == launch.machine() and "\n" not in launch.machine()
