"""doctor names each misconfiguration, and nothing on a machine that is set up right."""
import dataclasses
import json

import pytest

from mpitp.__main__ import foreign_launcher
from mpitp.comm import control_groups, facts
from mpitp.comm.facts import RankFacts
from mpitp.commands import doctor, doctor_page
from mpitp.measure import Link, links
from mpitp.measure.links import busiest, bytes_by_interface, pairs
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
    assert names(rank(infiniband=True, locked_memory=64 << 10), rank()) == []               # one host: unused
    # one core of a node that others share, as Slurm or a control group allots it
    assert names(rank(cores=[5], machine_cores=1, world=1, launcher_ranks=1)) == []


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
    ("little locked memory", [rank(infiniband=True, locked_memory=64 << 10), rank(host="node2")], "ulimit -l"),
    ("GPUs talk through the host", [rank(gpus=2, gpu_transport="staged", gpu_transport_how="no CUDA")] * 2,
     "an MPI built with CUDA"),
    ("ranks share a GPU", [rank(gpus=1, gpu="A 1", gpu_shared=True, gpu_transport="mpi")] * 2, "mpirun -n 1"),
])
def test_each_misconfiguration_is_named(name, ranks, fix):
    found = {finding.name: finding for finding in doctor.findings(ranks)}
    assert name in found and fix in found[name].fix
    text = "\n".join([*doctor_page.page(ranks), *doctor_page.verdict(list(found.values()))])
    assert f"WRONG  {name}: " in text


def test_gpus_are_named():
    ranks = [rank(gpus=2, gpu=f"H100 {i}", gpu_transport="mpi", gpu_transport_how="fast") for i in "ab"]
    text = "\n".join(doctor_page.page(ranks))
    assert "rank 1: H100 b" in text and "transport: mpi (fast)" in text


def test_no_blas_of_its_own_knowledge():
    """What cannot be known is said to be unknown, and is not a finding."""
    unknown = rank(blas_threads=None, shared_memory=None, instructions=[])
    assert names(unknown, unknown) == [] and "unknown" in "\n".join(doctor_page.page([unknown]))


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


def test_each_host_has_its_line():
    """Where ranks are, and what each host gives them; and how they reach each other."""
    ranks = [rank(), rank(), rank(host="node2", shared_memory=1 << 30, memory_limit=4 << 30, locked_memory=8 << 20)]
    found = [line.split() for line in doctor_page.page(ranks)]
    assert ["node1", "0-1", "8.0", "GiB", "free", "all", "all", "all"] in found
    assert ["node2", "2", "1.0", "GiB", "free", "all", "4.0", "GiB", "8.0", "MiB"] in found
    links = [Link((0, 1), ("node1", "node1"), 3e-7, 5e9, ""), Link((0, 2), ("node1", "node2"), 6e-5, 1.17e8, "eth0"),
             Link((2, 3), ("node1", "node2"), 6e-5, 1.17e8, "")]
    text = "\n".join(doctor_page.table_of_links(links))
    assert "117 MB/s  eth0" in text and "5.00 GB/s  shared memory" in text and "no interface that the kernel" in text


def test_which_ranks_are_compared():
    assert pairs(["a"]) == pairs(["a"] * 0) == [] and pairs(["a", "a", "a"]) == [(0, 1)]
    assert pairs(["a", "b"]) == [(0, 1)] and pairs(["a", "a", "b"]) == [(0, 1), (0, 2)]
    assert pairs(["a", "b", "c", "b"]) == [(1, 3), (0, 1), (1, 2), (2, 0)]


def test_the_link_between_ranks(world):
    """Two hosts by name alone: one pair for both, with times that both ranks agree on."""
    hosts = ["even" if rank % 2 == 0 else "odd" for rank in range(world.size)]
    found = links(world, hosts)
    assert [link.ranks for link in found] == pairs(hosts) and world.bcast(found) == found
    assert all(0 < link.latency_seconds < 10 and link.bytes_per_second > 1e5 for link in found)


def test_the_interface_that_carried_most(tmp_path):
    lines = "Inter-| Receive | Transmit\n face |bytes\n  lo: 9 0 0 0 0 0 0 0 9 0\n eth0: 1 0 0 0 0 0 0 0 500 7 0\n"
    (tmp_path / "dev").write_text(lines)
    port = tmp_path / "infiniband" / "mlx5_0" / "ports" / "1" / "counters"
    port.mkdir(parents=True)
    (port / "port_xmit_data").write_text("100\n")
    before = bytes_by_interface(str(tmp_path / "dev"), str(tmp_path / "infiniband"))
    assert before == {"lo": 9, "eth0": 500, "mlx5_0 port 1": 400}
    assert busiest(before, before | {"eth0": 900}, 300) == "eth0" and busiest(before, before | {"eth0": 700}, 300) == ""
    assert busiest(before, before | {"mlx5_0 port 1": 5000, "eth0": 900}, 300) == "mlx5_0 port 1"
    assert bytes_by_interface("/gone", "/gone") == {} and busiest({}, {}, 1) == ""


@pytest.mark.parametrize("own, files, cores, memory", [
    ("0::/job_7/task\n", {"job_7/task/cpuset.cpus.effective": "4\n", "job_7/task/memory.max": "max\n"}, 1, None),
    ("0::/\n", {"cpuset.cpus.effective": "0-3,8\n", "memory.max": "1073741824\n"}, 5, 1 << 30),
    ("4:memory:/a\n3:cpuset:/b\n", {"cpuset/b/cpuset.effective_cpus": "2-3", "memory/a/memory.limit_in_bytes": "4096",
                                    "memory/memory.limit_in_bytes": "9223372036854771712"}, 2, 4096),
    ("nonsense\n", {"cpuset.cpus.effective": "\n"}, None, None)])
def test_control_groups(tmp_path, own, files, cores, memory):
    """Both versions, nested or at the top as in a container; what cannot be read is no limit."""
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    where = str(tmp_path), str(tmp_path / "own")
    assert control_groups.allotted_cores(*where) == cores and control_groups.memory_limit(*where) == memory
    assert control_groups.allotted_cores("/gone", "/gone") is control_groups.memory_limit("/gone", "/gone") is None


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
    assert report["links"][0]["ranks"] == [0, 1] and report["links"][0]["bytes_per_second"] > 0
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
