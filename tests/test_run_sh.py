"""run.sh: arguments, folders, launchers, allocations. Batch systems are stub launchers that write down their call."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mpi4py import MPI

from spmd import ROOT

pytestmark = pytest.mark.launcher
HERE = Path(sys.prefix)
RECORD = """#!/bin/sh
# {name}: writes its call down, then starts as many processes as asked, each alone (or by the real launcher).
case "$1" in --version) echo "{version}"; exit 0 ;; esac
{{ printf '%s\\n' "CALL {name}"; for a in "$@"; do printf '%s\\n' "$a"; done; }} >> "{log}"
{action}
"""


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """The system's programs without its MPI, if it has one."""
    folder = tmp_path_factory.mktemp("tools")
    for place in ("/usr/bin", "/bin", "/usr/sbin", "/sbin"):
        for program in os.listdir(place) if os.path.isdir(place) else ():
            if not program.startswith(("mpi", "orte", "prte", "srun", "jsrun")) and not (folder / program).is_symlink():
                (folder / program).symlink_to(f"{place}/{program}")
    return folder


@pytest.fixture
def site(tmp_path, tools):
    """A machine for run.sh: its own copy of the environment, stubs on PATH, a clean environment."""
    return Site(tmp_path, tools)


class Site:
    def __init__(self, folder, tools):
        self.folder, self.bin, self.log = folder, folder / "bin", folder / "log"
        self.bin.mkdir()
        self.venv = folder / "venv"         # the environment that runs this test, with a memory of its own
        (self.venv / "bin").mkdir(parents=True)
        (self.venv / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (self.venv / "bin" / "python").chmod(0o755)
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(
            ("PMI", "PMIX", "OMPI_", "PRTE", "HYDRA", "HYDI", "MPI", "SLURM", "PBS", "LSB", "OMP_", "OPENBLAS", "MKL",
             "NSLOTS", "PE_HOSTFILE"))}
        self.environment.update(PATH=f"{self.bin}:{tools}", MPITP_VENV=str(self.venv), PYTHONPATH=str(ROOT),
                                MPIEXEC_TIMEOUT="300")

    def stub(self, name, action="exit 0", version="stub"):
        path = self.bin / name
        path.write_text(RECORD.format(name=name, version=version, log=self.log, action=action))
        path.chmod(0o755)

    def real_launcher(self, name="mpirun"):
        """A stub that starts the real one, which must be beside this Python."""
        real = HERE / "bin" / "mpirun"
        real = real if real.exists() else shutil.which("mpirun")
        version = subprocess.run([real, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
        self.stub(name, f'exec "{real}" "$@"', version)

    def run(self, *arguments, script=ROOT / "run.sh", **options):
        return subprocess.run([script, *map(str, arguments)], env=self.environment, capture_output=True, text=True,
                              timeout=300, **options)

    def calls(self):
        """[[launcher, argument, ...], ...] without the proofs that run.sh starts to choose an MPI."""
        text = self.log.read_text() if self.log.exists() else ""
        calls = [call.splitlines() for call in text.split("CALL ")[1:]]
        return [call for call in calls if not any("from mpi4py import MPI" in a or a == "--mpi=list" for a in call)]

    def proofs(self):
        return self.log.read_text().count("from mpi4py import MPI")


def python_arguments(call):
    return call[[i for i, a in enumerate(call) if a.endswith("python")][0] + 1:]


def test_a_launcher_on_path_is_proved_and_remembered(site):
    site.real_launcher()
    done = site.run("-n", 2, "verify", "--hidden-size", 16)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("mpitp ") and "every check holds" in done.stdout and " 2 ranks" in done.stdout
    assert len(site.log.read_text().split("CALL ")) == 3            # nothing, the proof, the run
    assert site.run("-n", 3, "verify", "--hidden-size", 16).returncode == 0
    assert len(site.log.read_text().split("CALL ")) == 4            # not proved again
    assert site.calls()[1][:4] == ["mpirun", "-n", "3", str(site.venv / "bin" / "python")]


def test_a_launcher_of_another_library_is_not_used(site):
    """It starts two processes, each alone in its world."""
    site.stub("mpirun", 'shift 2; "$@" & "$@"')
    done = site.run("-n", 2)
    assert done.returncode == 2 and done.stdout == ""
    assert "found no mpirun that mpi4py in" in done.stderr and done.stderr.count("\n") == 1
    site.real_launcher("mpirun")                                    # the site mends it: seen at once
    assert site.run("-n", 1, "--version").returncode == 0


def test_no_mpirun_at_all_but_one_in_the_environment(site):
    real = HERE / "bin" / "mpirun"
    if not real.exists():
        pytest.skip("this Python's environment has no mpirun of its own")
    (site.venv / "bin" / "mpirun").write_text(f'#!/bin/sh\nexec "{real}" "$@"\n')
    (site.venv / "bin" / "mpirun").chmod(0o755)
    done = site.run("-n", 2, "verify", "--hidden-size", 16)
    assert done.returncode == 0 and " 2 ranks" in done.stdout, done.stderr


def test_from_any_folder_through_a_link_with_spaces(site, tmp_path):
    site.real_launcher()
    (tmp_path / "a folder").mkdir()
    link = tmp_path / "a folder" / "start here"
    link.symlink_to(ROOT / "run.sh")
    done = site.run("-n", 1, "verify", "--hidden-size", 8, script=link, cwd=tmp_path / "a folder")
    assert done.returncode == 0, done.stderr


def test_arguments_and_status_pass_through(site):
    site.stub("mpirun", 'case "$*" in *mpi4py*) exit 0 ;; *) exit 7 ;; esac')
    done = site.run("-n", 5, "verify", "--json", "a file; $(touch oops)", "it's", cwd=site.folder)
    assert done.returncode == 7
    assert site.calls() == [["mpirun", "-n", "5", str(site.venv / "bin" / "python"), "-m", "mpitp", "verify", "--json",
                             "a file; $(touch oops)", "it's"]]
    assert not (site.folder / "oops").exists()


def test_a_program_of_ones_own(site, tmp_path):
    site.real_launcher()
    program = tmp_path / "my program.py"
    program.write_text("import sys, mpitp\nwith mpitp.TensorParallelGroup() as g:\n"
                       "    print(g.size, sys.argv[1:]) if g.rank == 0 else None\n")
    done = site.run("-n", 3, program, "a b")
    assert done.stdout == "3 ['a b']\n", done.stderr

@pytest.mark.parametrize("arguments, before", [([], True), (["-n", 3], False)])
def test_help(site, arguments, before):
    """Before -n it is run.sh's own; after it, a question to mpitp, which lists the commands."""
    site.real_launcher()
    done = site.run(*arguments, "--help")
    assert done.returncode == 0 and ("MPITP_VENV=DIR" in done.stdout) == before, done.stderr
    assert ("check that the parallel feed-forward block" in done.stdout) != before
    assert done.stdout.count("usage:") == (not before)              # by rank 0 alone


@pytest.mark.parametrize("arguments, said", [
    (["-n"], "-n without a number"), (["-n", "0"], "'0'"), (["-n", "x"], "'x'"), (["-n", "-2"], "'-2'")])
def test_bad_numbers_of_ranks(site, arguments, said):
    done = site.run(*arguments)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_an_environment_that_is_none(site):
    site.environment["MPITP_VENV"] = "/nonexistent"
    done = site.run()
    assert done.returncode == 2 and "found no /nonexistent/bin/python" in done.stderr


@pytest.mark.any_mpi
def test_the_suite_on_a_list_of_ranks(site):
    site.stub("mpirun", 'case "$*" in *pytest*" tests"*) [ "$2" != 3 ] ;; *) exit 0 ;; esac')
    assert site.run("test", 1, 2).returncode == 0
    assert [call[2] for call in site.calls()] == ["1", "2"]
    assert site.run("test").returncode != 0                         # 3 fails, and ends it
    assert [call[2] for call in site.calls()[2:]] == ["1", "2", "3"]
    assert python_arguments(site.calls()[0]) == ["-m", "pytest", "-q", "tests"]


@pytest.mark.any_mpi
def test_slurm(site):
    """Ranks and cores of the allocation, the site's srun; run for real by a launcher that srun stands in for."""
    site.stub("srun", 'case "$*" in *"-m mpitp"*) exit 3 ;; *) exit 0 ;; esac')
    site.environment.update(SLURM_JOB_ID="7", SLURM_NTASKS="6", SLURM_CPUS_PER_TASK="4")
    assert site.run("verify").returncode == 3
    assert site.calls() == [["srun", "--cpus-per-task=4", "-n", "6", str(site.venv / "bin" / "python"), "-m", "mpitp",
                             "verify"]]
    del site.environment["SLURM_NTASKS"]
    site.environment.update(SLURM_NNODES="2", SLURM_NTASKS_PER_NODE="4")
    site.run()
    assert site.calls()[1][2:4] == ["-n", "8"]
    site.run("-n", 3)
    assert site.calls()[2][2:4] == ["-n", "3"]


def test_slurm_with_another_library_stops(site):
    """One line that says what was tried and the ways out, behind the launcher's own last lines."""
    site.stub("srun", "exit 1")
    site.environment.update(SLURM_JOB_ID="7", SLURM_NTASKS="6")
    done = site.run()
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not site.calls()
    assert f"no world of two ranks with mpi4py's {MPI.get_vendor()[0]} under" in done.stderr
    assert "(--mpi tried: its default)" in done.stderr and "MPI4PY_LIBMPI" in done.stderr and "Slurm" in done.stderr
    site.stub("srun", 'echo "srun: error: no such plugin" >&2; exit 1')
    done = site.run()
    assert done.stderr.startswith("    srun: error: no such plugin\nrun.sh: found") and done.stderr.count("\n") == 2


def slurm_that_needs(site, wanted):
    """A srun of a Slurm with MpiDefault=none: each process alone, but for one --mpi."""
    site.stub("srun", f'''case "$*" in
    *--mpi=list*) printf "MPI plugin types are...\\n\\tnone\\n\\tpmi2\\n\\tpmix\\nspecific versions: pmix_v4\\n" >&2 ;;
    *--mpi={wanted}*) exit 0 ;;
    *) echo "alone" >&2; exit 1 ;;
esac''')
    site.environment.update(SLURM_JOB_ID="7", SLURM_NTASKS="2")


def test_slurm_without_a_default_mpi(site):
    """The type that works is found and remembered, with what it depends on; it is proved before it is used."""
    wanted = "pmix" if MPI.get_vendor()[0] == "Open MPI" else "pmi2"
    slurm_that_needs(site, wanted)
    done = site.run("verify")
    assert done.returncode == 0 and done.stderr == f"run.sh: this MPI needs srun --mpi={wanted}, which is remembered\n"
    assert site.calls() == [["srun", f"--mpi={wanted}", "-n", "2", str(site.venv / "bin" / "python"), "-m", "mpitp",
                             "verify"]]
    assert site.proofs() == 2
    done = site.run("verify")
    assert done.stderr == "" and site.proofs() == 2 and site.calls()[1] == site.calls()[0]
    site.environment["SLURM_MPI_TYPE"] = "none"                     # what was remembered was another site default
    assert site.run("verify").returncode == 0 and site.proofs() == 4
    slurm_that_needs(site, "openmpi")                               # none of those that the list shows
    done = site.run("verify")
    assert done.returncode == 2 and "    alone\n" in done.stderr and f"its default, {wanted}" in done.stderr


@pytest.mark.any_mpi
def test_login_node_and_job_alternate(site):
    """Each remembers its own launcher."""
    site.stub("mpirun")
    site.stub("srun")
    for job in (False, True, False, True):
        site.environment.update(SLURM_JOB_ID="7") if job else site.environment.pop("SLURM_JOB_ID", None)
        assert site.run("-n", 2, "verify").returncode == 0
    assert [call[0] for call in site.calls()] == ["mpirun", "srun", "mpirun", "srun"] and site.proofs() == 2


@pytest.mark.parametrize("step, overlap", [("0", True), ("12", True), (None, False), ("4294967290", False),
                                           ("4294967291", False), ("-5", False)])
def test_the_shell_of_srun_pty(site, step, overlap):
    """It is a step that has the whole allocation: another one must overlap. Not so sbatch's and salloc's own."""
    site.stub("srun", 'env > "$0.env"')
    site.environment.update(SLURM_JOB_ID="7", SLURM_NTASKS="2", **({"SLURM_STEP_ID": step} if step else {}))
    assert site.run("verify").returncode == 0
    assert ("SLURM_OVERLAP=1" in (site.bin / "srun.env").read_text().splitlines()) == overlap


@pytest.mark.parametrize("cpus, per_task, asked, found", [
    ("2", None, 4, None), ("1(x2)", None, 4, None), ("4(x2),2", None, 11, None),    # refused
    ("4(x2),2", None, 10, []), ("4", "4", 4, ["--cpus-per-task=1"]), ("8", "2", 4, ["--cpus-per-task=2"]),
    ("2(x2)", "2", 3, ["--cpus-per-task=1"]), (None, None, 9, [])])
def test_more_ranks_than_the_allocation_of_slurm(site, cpus, per_task, asked, found):
    site.stub("srun")
    given = dict(SLURM_JOB_ID="7", SLURM_NTASKS="1", SLURM_JOB_CPUS_PER_NODE=cpus, SLURM_CPUS_PER_TASK=per_task)
    site.environment.update({name: value for name, value in given.items() if value})
    done = site.run("-n", asked, "verify")
    if found is None:
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and not site.log.exists()
        assert f"found -n {asked} in a Slurm allocation of" in done.stderr and f"--ntasks={asked}" in done.stderr
    else:
        assert done.returncode == 0 and site.calls()[0][1:-4] == [*found, "-n", str(asked)]


@pytest.mark.parametrize("version, more", [("mpirun (Open MPI) 4.1.6", True), ("HYDRA build details:", False)])
def test_grid_engine(site, version, more):
    """NSLOTS ranks; an Open MPI gets the hosts of PE_HOSTFILE as a machine file of its own format."""
    site.stub("mpirun", 'env > "$0.env"', version)
    (site.folder / "pe").write_text("node1 2 all.q@node1 UNDEFINED\nnode2 2 all.q@node2 UNDEFINED\n")
    site.environment.update(JOB_ID="7", NSLOTS="4", PE_HOSTFILE=str(site.folder / "pe"), TMPDIR=str(site.folder))
    assert site.run("verify").returncode == 0
    hosts = site.folder / "mpitp-hosts.7"
    assert without_variables(site.calls()[0])[:-4] == ["mpirun", *(["-machinefile", str(hosts)] if more else []),
                                                       "-n", "4"]
    assert not more or hosts.read_text() == "node1 slots=2\nnode2 slots=2\n"
    assert "oversubscribe" not in (site.bin / "mpirun.env").read_text()     # that would put all on the first host
    done = site.run("-n", 5)
    assert done.returncode == 2 and "found -n 5 in a Grid Engine allocation of 4" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_launcher_that_run_sh_does_not_know(site):
    """Its words are taken as they stand, and nothing is proved; -n P comes behind them where it was given."""
    site.stub("flux", 'env > "$0.env"; exit 5')
    site.environment.update(MPITP_LAUNCHER="flux run  -N2 -n 8", SLURM_JOB_ID="7")
    site.stub("srun")
    assert site.run("verify").returncode == 5
    assert site.run("-n", 3, "verify").returncode == 5
    python = str(site.venv / "bin" / "python")
    assert site.calls() == [["flux", "run", "-N2", "-n", "8", python, "-m", "mpitp", "verify"],
                            ["flux", "run", "-N2", "-n", "8", "-n", "3", python, "-m", "mpitp", "verify"]]
    assert site.proofs() == 0 and "OMPI_MCA_btl" not in (site.bin / "flux.env").read_text()
    site.environment["MPITP_LAUNCHER"] = "aprun -n 8"
    done = site.run("verify")
    assert done.returncode == 2 and "found no program 'aprun'" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("version, more", [("mpirun (Open MPI) 5.0.7", True), ("mpirun (Open MPI) 4.1.6", True),
                                           ("HYDRA build details:", False)])
def test_pbs(site, version, more):
    site.stub("mpiexec", version=version)
    nodes = site.folder / "nodes"
    nodes.write_text("node1\nnode1\nnode2\nnode2\n")
    site.environment.update(PBS_JOBID="7", PBS_NODEFILE=str(nodes))
    assert site.run("verify").returncode == 0
    assert without_variables(site.calls()[0])[:-4] == ["mpiexec", *(["-machinefile", str(nodes)] if more else []),
                                                       "-n", "4"]
    done = site.run("-n", 5)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "found -n 5 in a PBS allocation of 4" in done.stderr and "qsub -l select=1:ncpus=5:mpiprocs=5" in done.stderr
    site.environment["NCPUS"] = "8"                     # a chunk of 8 cores without mpiprocs is one line
    nodes.write_text("node1\n")
    assert site.run("-n", 8, "verify").returncode == 0 and site.run("-n", 9, "verify").returncode == 2


@pytest.mark.parametrize("launcher", ["jsrun", "mpirun"])
def test_lsf(site, launcher):
    site.stub(launcher)
    site.environment.update(LSB_JOBID="7", LSB_DJOB_NUMPROC="5")
    assert site.run().returncode == 0
    assert site.calls()[0][:3] == [launcher, "-n", "5"]
    del site.environment["LSB_DJOB_NUMPROC"]
    site.environment["LSB_HOSTS"] = "a a b"
    assert site.run().returncode == 0
    assert site.calls()[1][:3] == [launcher, "-n", "3"]
    done = site.run("-n", 4)
    assert done.returncode == 2 and "found -n 4 in a LSF allocation of 3" in done.stderr and "bsub -n 4" in done.stderr


def test_a_job_without_a_launcher(site):
    site.environment.update(LSB_JOBID="7", LSB_DJOB_NUMPROC="5")
    done = site.run()
    assert done.returncode == 2 and "found no MPI launcher on PATH inside a LSF job" in done.stderr


def test_open_mpi_gets_what_it_needs(site):
    """As root, more ranks than cores, no rank pinned to one core, no network on one node."""
    site.stub("mpirun", 'env > "$0.env"', "mpirun (Open MPI) 5.0.7")
    site.environment["OMPI_MCA_pml"] = "ucx"
    assert site.run().returncode == 0
    given = dict(line.split("=", 1) for line in (site.bin / "mpirun.env").read_text().splitlines() if "=" in line)
    assert given["OMPI_ALLOW_RUN_AS_ROOT"] == given["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] == "1"
    assert given["PRTE_MCA_rmaps_default_mapping_policy"] == ":oversubscribe"
    assert given["PRTE_MCA_hwloc_default_binding_policy"] == given["OMPI_MCA_hwloc_base_binding_policy"] == "none"
    assert given["MPITP_PROGRESS"] == "0"                       # these streams are pipes
    assert given["OMPI_MCA_btl"] == "self,sm" and given["OMPI_MCA_pml"] == "ucx"       # the user's stays


@pytest.mark.parametrize("where, text, one_node", [
    ("OMPI_MCA_orte_default_hostfile", "", False), ("PRTE_MCA_prte_default_hostfile", "", False),
    ("etc/openmpi-default-hostfile", "# none\n", True), ("etc/openmpi-default-hostfile", "node1\nnode2\n", False),
    ("etc/openmpi-mca-params.conf", "btl = ^openib\nmtl = ^ofi\n", True),         # as Debian ships it
    ("etc/openmpi-mca-params.conf", "btl = self,tcp\n", False),
    (".openmpi/mca-params.conf", "orte_default_hostfile = /hosts\n", False)])
def test_hosts_of_open_mpi_outside_a_batch_system(site, where, text, one_node):
    """Shared memory alone would reach no other host."""
    site.stub("mpirun", 'env > "$0.env"', "mpirun (Open MPI) 4.1.6")
    site.environment["HOME"] = str(site.folder)
    if where.endswith("_hostfile"):
        site.environment[where] = "/hosts"
    else:
        (site.folder / where).parent.mkdir(exist_ok=True)
        (site.folder / where).write_text(text)
    assert site.run().returncode == 0
    given = (site.bin / "mpirun.env").read_text()
    assert ("OMPI_MCA_btl=self,vader" in given) == one_node
    assert ("MCA_rmaps_base_oversubscribe=1" in given) == (one_node or text.startswith("btl"))


def without_variables(call):
    """A call without "-x NAME"."""
    return [word for before, word in zip(["", *call], call) if "-x" not in (before, word)]


@pytest.mark.parametrize("version, hosts, passed", [
    ("mpirun (Open MPI) 5.0.7", "PRTE_MCA_prte_default_hostfile", True), ("mpirun (Open MPI) 5.0.7", None, False),
    ("HYDRA build details:", "HYDRA_HOST_FILE", False)])
def test_variables_for_ranks_on_other_hosts(site, version, hosts, passed):
    """Open MPI's mpirun leaves them out, so that ranks here and there would mean other things; Hydra passes all."""
    site.stub("mpirun", version=version)
    site.environment.update(MPITP_STALL_LIMIT="8", OMP_NUM_THREADS="1", **({hosts: "/hosts"} if hosts else {}))
    assert site.run("verify").returncode == 0
    call = site.calls()[0]
    found = {name for flag, name in zip(call, call[1:]) if flag == "-x"}
    assert ({"MPITP_STALL_LIMIT", "OMP_NUM_THREADS", "MPITP_PROGRESS", "PYTHONPATH"} <= found) == passed
    assert passed or not found
    assert without_variables(call)[1:3] == ["-n", "2"]


def test_a_library_of_no_name_is_none(site):
    """mpi4py would look for libmpi.so, and not for the library beside it."""
    site.stub("mpirun", 'env > "$0.env"')
    site.environment["MPI4PY_LIBMPI"] = ""
    assert site.run("verify").returncode == 0
    assert "MPI4PY_LIBMPI" not in (site.bin / "mpirun.env").read_text()


def test_ranks_are_not_pinned_to_one_core(site):
    """On one rank all cores are its own, whatever the launcher's habit is."""
    site.real_launcher()
    done = site.run("-n", 1, "verify", "--hidden-size", 8)
    count = len(os.sched_getaffinity(0))
    assert f"1 rank, {count} core{'s' if count > 1 else ''} a rank" in done.stdout, done.stdout + done.stderr


def copy_of_the_project(target):
    if not (ROOT / ".git").exists():                # an unpacked sdist
        shutil.copytree(ROOT, target)
        return
    files = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True,
                           capture_output=True, check=True).stdout.splitlines()
    for name in files:
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


PYTHON = """#!/bin/sh
# This Python, but what would install is written down, and fails without a network.
case "$*" in
    *pip*install*|*purelib*)
        echo "$* ${{PIP_RETRIES-}} ${{PIP_DEFAULT_TIMEOUT-}}" >> "{log}"
        [ ! -e "{log}.offline" ] || {{ cat "{log}.offline" >&2; exit 1; }} ;;
    *) exec "{python}" "$@" ;;
esac
"""


@pytest.fixture
def clone(site, tmp_path):
    """A clone with a .venv that is as good as made."""
    clone = tmp_path / "clone"
    copy_of_the_project(clone)
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "python").write_text(PYTHON.format(log=tmp_path / "pip", python=sys.executable))
    (clone / ".venv" / "bin" / "python").chmod(0o755)
    (clone / ".venv" / "mpitp-installed").write_text(checksum(clone))
    del site.environment["MPITP_VENV"]
    return clone


def checksum(clone):
    return subprocess.run("cksum < setup.cfg", shell=True, cwd=clone, capture_output=True, text=True).stdout


@pytest.mark.any_mpi
def test_prepare_installs_what_every_use_needs(site, clone, tmp_path):
    site.real_launcher()
    done = site.run("--prepare", script=clone / "run.sh")
    lines = (tmp_path / "pip").read_text()
    assert done.returncode == 0 and "is complete" in done.stderr and "[threads,progress,test]" in lines
    (tmp_path / "pip.offline").touch()
    assert site.run("-n", 1, "verify", "--hidden-size", 8, script=clone / "run.sh").returncode == 0
    site.stub("mpirun")
    assert site.run("test", 2, script=clone / "run.sh").returncode == 0 and (tmp_path / "pip").read_text() == lines
    done = site.run("--prepare", "verify", script=clone / "run.sh")
    assert done.returncode == 2 and "found --prepare with 'verify'" in done.stderr and done.stderr.count("\n") == 1
    site.environment["MPITP_VENV"] = str(site.venv)
    assert "found --prepare with MPITP_VENV" in site.run("--prepare").stderr


@pytest.mark.parametrize("library, words", [
    ("/nowhere/libmpi.so", "found MPI4PY_LIBMPI=/nowhere/libmpi.so, which mpi4py cannot load"),
    (sys.executable, f"found MPI4PY_LIBMPI={sys.executable}, which mpi4py cannot load"),
    (None, "which starts no world of two ranks with MPI4PY_LIBMPI=")])
def test_a_library_by_name_that_does_not_do(site, library, words):
    """The library cannot be loaded, or it can and the launcher is that of another; the last lines say why."""
    site.stub("mpirun", 'shift 2; "$@" & "$@"')
    site.environment["MPI4PY_LIBMPI"] = library or this_library()
    done = site.run("verify")
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1], done.stderr
    assert done.stderr.splitlines()[-1].startswith("run.sh: found ") and done.stderr.count("run.sh: ") == 1


def this_library():
    """Return the MPI library of this process."""
    with open("/proc/self/maps") as maps:
        return next(line.split()[-1] for line in maps if "/libmpi" in line)


@pytest.mark.parametrize("pip, lines, words", [
    ("WARNING: Retrying: NewConnectionError('Temporary failure in name resolution')\nERROR: none\n", 2,
     "found no package index that answers"),
    ("WARNING: old\nERROR: no such version\n", 3, "pip could not install -e")])
def test_a_node_without_a_network_is_told_of_prepare(site, clone, tmp_path, pip, lines, words):
    """pip gives up early, and so does the pip that it starts; what it says is shown only where it helps."""
    for name in ("PIP_RETRIES", "PIP_DEFAULT_TIMEOUT"):
        site.environment.pop(name, None)
    site.stub("srun")
    site.environment.update(SLURM_JOB_ID="7", SLURM_NTASKS="2")
    (tmp_path / "pip.offline").write_text(pip)
    (clone / "setup.cfg").write_text((clone / "setup.cfg").read_text() + "\n# changed\n")
    done = site.run(script=clone / "run.sh")
    assert done.returncode == 2 and "./run.sh --prepare" in done.stderr and words in done.stderr
    assert done.stderr.count("\n") == lines and "has changed" in done.stderr and "WARNING" not in done.stderr
    assert (tmp_path / "pip").read_text().endswith(" 1 8\n")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to give a folder away")
def test_a_python_in_the_home_of_another_user(site, clone):
    """What somebody else has made is not made anew."""
    (clone / ".venv" / "bin" / "python").unlink()
    (clone / ".venv" / "bin" / "python").symlink_to("/home/nobody-else/python3")
    os.chown(clone / ".venv", 12345, 12345)
    done = site.run(script=clone / "run.sh")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "/home/nobody-else/python3" in done.stderr
    assert "set PYTHON" in done.stderr and (clone / ".venv" / "mpitp-installed").exists()


def test_little_shared_memory_is_named_before_the_mpi_dies(site):
    """One line, and the run goes on: what an MPI needs is not known to the byte."""
    site.stub("mpirun")
    for megabytes, ranks, said in ((31, 2, True), (32, 2, False), (47, 4, True), (20, 1, False)):
        (site.bin / "df").write_text("#!/bin/sh\n[ \"$2\" = /dev/shm ] || exec /bin/df \"$@\"\n"
                                     "printf 'Filesystem blocks used free\\ntmpfs 1000 0 %d 0%% /dev/shm\\n' "
                                     f"{1024 * megabytes}\n")
        (site.bin / "df").chmod(0o755)
        done = site.run("-n", ranks, "verify")
        assert done.returncode == 0 and ("MiB free in /dev/shm" in done.stderr) == said, (megabytes, ranks, done.stderr)
        assert not said or f"found {megabytes} MiB free" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.any_mpi
def test_a_path_with_a_colon(site, tmp_path):
    copy_of_the_project(tmp_path / "a:b")
    del site.environment["MPITP_VENV"]
    done = site.run(script=tmp_path / "a:b" / "run.sh")
    assert done.returncode == 2 and "found a colon in" in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.weekly
@pytest.mark.any_mpi
def test_first_use_and_the_next_without_a_network(site, tmp_path):
    """A fresh clone on a machine with nothing but Python: .venv, MPI, the run; then again, offline and unlocked.

    Its name is the package's, and it is used from the folder above: there Python sees a namespace package first.
    """
    clone = tmp_path / "my clone" / "mpitp"
    copy_of_the_project(clone)
    for name in ("MPITP_VENV", "PYTHONPATH"):
        del site.environment[name]
    site.environment["PYTHON"] = sys.executable
    (clone / ".venv" / "bin").mkdir(parents=True)               # an interrupted first use
    (clone / ".venv" / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    both = [subprocess.Popen([clone / "run.sh", "-n", "2", "verify", "--hidden-size", "16"], env=site.environment,
                             text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    errors = ""
    for process in both:                                        # two at once: one makes it, the other waits
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0 and "every check holds" in out, out + error
        errors += error
    assert errors.count("first use, making") == 1 and errors.count("installing MPICH") == 1, errors
    site.environment.update(PIP_INDEX_URL="http://127.0.0.1:9/", PIP_NO_INDEX="1")
    done = subprocess.run([clone / "run.sh"], env=site.environment, text=True, capture_output=True, timeout=300,
                          cwd=clone.parent)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    (clone / "setup.cfg").write_text((clone / "setup.cfg").read_text() + "\n# changed\n")
    done = subprocess.run([clone / "run.sh"], env=site.environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 2 and "setup.cfg has changed" in done.stderr and "pip could not install" in done.stderr
