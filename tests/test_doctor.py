"""doctor names each misconfiguration, and nothing on a machine that is set up right."""
import dataclasses
import json

import pytest

from mpitp.__main__ import foreign_launcher
from mpitp.comm import facts
from mpitp.comm.facts import RankFacts
from mpitp.commands import doctor
from spmd import job


def rank(**changes):
    """A rank of two on a node of two cores, all well."""
    good = RankFacts(host="node1", cores=[0, 1], machine_cores=2, python="3.12.1", numpy="2.4.6", mpi4py="4.1.2",
                     mpi="MPICH 5.0.2", transport="ch4:ofi", world=2, launcher="mpirun", launcher_ranks=2,
                     launcher_rank=0, blas="openblas 0.3.31 (SkylakeX)", blas_threads=1,
                     instructions=["avx2", "avx512f"], variables={}, shared_memory=8 << 30, quota=None, share=1,
                     node_ranks=2)
    return dataclasses.replace(good, **changes)


def names(*ranks):
    return [finding.name for finding in doctor.findings(list(ranks))]


def test_nothing_is_wrong():
    assert names(rank(), rank()) == []
    assert names(rank(cores=[0]), rank(cores=[1])) == []                    # pinned, one each: as it should be
    assert names(rank(world=1, launcher=None, launcher_ranks=1, blas_threads=2, share=2)) == []
    assert names(rank(instructions=["avx2"], variables={"OPENBLAS_CORETYPE": "Haswell"}), rank()) == []


@pytest.mark.parametrize("name, ranks, fix", [
    ("wrong launcher", [rank(world=1, launcher_ranks=4)], "MPI4PY_LIBMPI"),
    ("ranks differ", [rank(), rank(numpy="1.26.4")], "one environment"),
    ("more ranks than cores", [rank(), rank(), rank()], "mpirun -n 2"),
    ("more threads than cores", [rank(blas_threads=2), rank(blas_threads=2)], "export OMP_NUM_THREADS=1"),
    ("pinned", [rank(cores=[0], world=1, launcher_ranks=1)], "--bind-to none"),
    ("ranks share cores", [rank(cores=[0], machine_cores=4), rank(cores=[0], machine_cores=4)], "--map-by core"),
    ("idle cores", [rank(world=1, launcher=None, launcher_ranks=1, share=2, variables={"OMP_NUM_THREADS": "1"})],
     "export OMP_NUM_THREADS=2"),
    ("slow BLAS kernel", [rank(), rank(variables={"OPENBLAS_CORETYPE": "Haswell"})], "unset OPENBLAS_CORETYPE"),
    ("slow BLAS kernel", [rank(instructions=["avx2"], variables={"OPENBLAS_CORETYPE": "nehalem"}), rank()], "unset"),
    ("slow BLAS kernel", [rank(variables={"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}), rank()],
     "unset MKL_ENABLE_INSTRUCTIONS"),
    ("container limit", [rank(quota=1.0), rank(quota=1.0)], "mpirun -n 1"),
    ("little shared memory", [rank(shared_memory=20 << 20), rank(shared_memory=20 << 20)], "--shm-size"),
    ("GPUs talk through the host", [rank(gpus=2, gpu_transport="staged", gpu_transport_how="no CUDA")] * 2,
     "an MPI built with CUDA"),
    ("ranks share a GPU", [rank(gpus=1, gpu="A 1", gpu_shared=True, gpu_transport="mpi")] * 2, "mpirun -n 1"),
])
def test_each_misconfiguration_is_named(name, ranks, fix):
    found = {finding.name: finding for finding in doctor.findings(ranks)}
    assert name in found and fix in found[name].fix
    text = "\n".join([*doctor.page(ranks), *doctor.verdict(list(found.values()))])
    assert f"WRONG  {name}: " in text


def test_gpus_are_named():
    ranks = [rank(gpus=2, gpu=f"H100 {i}", gpu_transport="mpi", gpu_transport_how="fast") for i in "ab"]
    text = "\n".join(doctor.page(ranks))
    assert "rank 1: H100 b" in text and "transport: mpi (fast)" in text


def test_no_blas_of_its_own_knowledge():
    """What cannot be known is said to be unknown, and is not a finding."""
    unknown = rank(blas_threads=None, shared_memory=None, instructions=[])
    assert names(unknown, unknown) == [] and "unknown" in "\n".join(doctor.page([unknown]))


@pytest.mark.parametrize("launcher, mpi, fix", [
    ("srun", "Open MPI 5.0.11", "srun --mpi=pmix "), ("srun", "MPICH 5.0.2", "srun --mpi=pmi2 "),
    ("srun", "Intel MPI 2021.18.1", "srun --mpi=pmi2 "), ("srun", "Cray MPICH 8.1", "srun --mpi=cray_shasta "),
    ("flux run", "MPICH 5.0.2", "the mpirun of MPICH 5.0.2,")])
def test_the_way_out_of_the_wrong_launcher(launcher, mpi, fix):
    """Under srun it is an option of srun, not another launcher."""
    found = doctor.findings([rank(world=1, launcher_ranks=4, launcher=launcher, mpi=mpi)])[0]
    alone = rank(world=1, launcher_ranks=4, launcher=launcher, cores=[0])
    assert names(alone) == ["wrong launcher"]                               # not "pinned", too
    assert found.name == "wrong launcher" and fix in found.fix and ("mpirun" in found.fix) == (launcher != "srun")


@pytest.mark.parametrize("text, cores", [("max 100000\n", None), ("150000 100000\n", 1.5), ("nonsense", None)])
def test_container_limits(tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text)
    assert facts.cpu_quota(tmp_path / "cpu.max") == cores
    assert facts.cpu_quota(tmp_path / "gone") is None


def test_processor_flags(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor: 0\nflags\t\t: fpu avx2 sse avx512f\n")
    assert facts.instructions(tmp_path / "cpuinfo") == ["avx2", "avx512f"]
    assert facts.instructions(tmp_path / "gone") == []


def test_launcher_ranks():
    assert facts.launcher_rank({"PMI_RANK": "3"}) == 3 and facts.launcher_rank({}) == 0
    assert foreign_launcher("MPICH", {"OMPI_COMM_WORLD_SIZE": "2"}).startswith("found 2 processes started by Open MPI")
    assert foreign_launcher("Open MPI", {"OMPI_COMM_WORLD_SIZE": "2"}) is None
    assert foreign_launcher("MPICH", {"PMI_SIZE": "2"}) is None


# --- for real ------------------------------------------------------------------------------------------------

def run(ranks, *arguments, **environment):
    clean = {"OMP_NUM_THREADS": "", "OPENBLAS_NUM_THREADS": "", "OPENBLAS_CORETYPE": "", **environment}
    # an empty variable would count as set: `env -u` takes it away for the rank
    unset = [part for name, value in clean.items() if value == "" for part in ("-u", name)]
    program = ["-c", "import os, sys; os.execvp('env', ['env', *sys.argv[1:]])", *unset]
    import sys
    return job(ranks, *program, sys.executable, "-m", "mpitp", "doctor", *arguments,
               environment={name: value for name, value in clean.items() if value})


@pytest.mark.launcher
def test_the_page(tmp_path):
    done = run(2, "--json", tmp_path / "report.json")
    assert max(map(len, done.stdout.splitlines())) <= 100 and "2 started, MPI sees 2" in done.stdout, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["schema"] == "mpitp.doctor/1" and len(report["ranks"]) == 2
    assert (done.returncode != 0) == bool(report["findings"])
    assert "slow BLAS kernel" not in done.stdout and "more threads than cores" not in done.stdout


@pytest.mark.launcher
def test_threads_times_ranks():
    done = run(2, OMP_NUM_THREADS="64", OPENBLAS_NUM_THREADS="64")
    assert done.returncode != 0 and "WRONG  more threads than cores" in done.stdout, done.stdout + done.stderr


@pytest.mark.launcher
def test_a_kernel_that_is_forced_down():
    if "avx2" not in facts.instructions():
        pytest.skip("this processor has nothing better")
    done = run(1, OPENBLAS_CORETYPE="Nehalem")
    assert done.returncode == 1 and "WRONG  slow BLAS kernel" in done.stdout


@pytest.mark.launcher
def test_a_launcher_of_another_mpi():
    """Each process is alone and believes to be rank 0: one page all the same."""
    import subprocess
    import sys
    import os
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "PMIX", "OMPI_COMM"))}
    for number in (0, 1):
        environment.update(SLURM_STEP_NUM_TASKS="4", SLURM_STEP_ID="0", SLURM_PROCID=str(number))
        done = subprocess.run([sys.executable, "-m", "mpitp", "doctor"], env=environment, capture_output=True,
                              text=True)
        assert ("WRONG  wrong launcher: 4 processes started by srun" in done.stdout) == (number == 0), done.stderr
        assert ("  fix  start with srun --mpi=" in done.stdout) == (number == 0)
    done = subprocess.run([sys.executable, "-m", "mpitp"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "found 4 processes started by srun, each alone" in done.stderr
    assert "so start with srun --mpi=" in done.stderr and "mpirun" not in done.stderr


@pytest.mark.launcher
def test_pinned_to_one_core():
    import os
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    pin = "import os, runpy, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); " \
          "sys.argv[1:] = ['doctor']; runpy.run_module('mpitp', run_name='__main__')"
    done = job(1, "-c", pin)
    assert done.returncode == 1 and "WRONG  pinned: 1 rank pinned to 1 of the" in done.stdout, done.stdout + done.stderr
