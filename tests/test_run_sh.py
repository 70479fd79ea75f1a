"""run.sh: arguments, folders, launchers and allocations. Batch systems are stub launchers that write down their call."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
            ("PMI", "PMIX", "OMPI_", "PRTE", "HYDRA", "HYDI", "MPI", "SLURM", "PBS", "LSB", "OMP_", "OPENBLAS", "MKL"))}
        self.environment.update(PATH=f"{self.bin}:{tools}", MPITP_VENV=str(self.venv), PYTHONPATH=str(ROOT),
                                MPIEXEC_TIMEOUT="60")

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
                              timeout=100, **options)

    def calls(self):
        """[[launcher, argument, ...], ...] without the proofs that run.sh starts to choose an MPI."""
        text = self.log.read_text() if self.log.exists() else ""
        calls = [call.splitlines() for call in text.split("CALL ")[1:]]
        return [call for call in calls if not any("from mpi4py import MPI" in a for a in call)]


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
    assert ("check that the parallel feed-forward block" in done.stdout) != before and done.stdout.count("usage:") == (not before)


@pytest.mark.parametrize("arguments, said", [(["-n"], "-n without a number"), (["-n", "0"], "'0'"), (["-n", "x"], "'x'"),
                                             (["-n", "-2"], "'-2'")])
def test_bad_numbers_of_ranks(site, arguments, said):
    done = site.run(*arguments)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_an_environment_that_is_none(site):
    site.environment["MPITP_VENV"] = "/nonexistent"
    done = site.run()
    assert done.returncode == 2 and "found no /nonexistent/bin/python" in done.stderr


def test_the_suite_on_a_list_of_ranks(site):
    site.stub("mpirun", 'case "$*" in *pytest*" tests"*) [ "$2" != 3 ] ;; *) exit 0 ;; esac')
    assert site.run("test", 1, 2).returncode == 0
    assert [call[2] for call in site.calls()] == ["1", "2"]
    assert site.run("test").returncode != 0                         # 3 fails, and ends it
    assert [call[2] for call in site.calls()[2:]] == ["1", "2", "3"]
    assert python_arguments(site.calls()[0]) == ["-m", "pytest", "-q", "tests"]


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
    site.stub("srun", "exit 1")
    site.environment.update(SLURM_JOB_ID="7", SLURM_NTASKS="6")
    done = site.run()
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not site.calls()
    assert "does not use the MPI of" in done.stderr and "MPI4PY_LIBMPI" in done.stderr and "Slurm" in done.stderr


@pytest.mark.parametrize("version, more", [("mpirun (Open MPI) 5.0.7", True), ("mpirun (Open MPI) 4.1.6", True),
                                           ("HYDRA build details:", False)])
def test_pbs(site, version, more):
    site.stub("mpiexec", version=version)
    nodes = site.folder / "nodes"
    nodes.write_text("node1\nnode1\nnode2\nnode2\n")
    site.environment.update(PBS_JOBID="7", PBS_NODEFILE=str(nodes))
    assert site.run("verify").returncode == 0
    assert site.calls()[0][:-4] == ["mpiexec", *(["-machinefile", str(nodes)] if more else []), "-n", "4"]


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


def test_ranks_are_not_pinned_to_one_core(site):
    """On one rank all cores are its own, whatever the launcher's habit is."""
    site.real_launcher()
    done = site.run("-n", 1, "verify", "--hidden-size", 8)
    count = len(os.sched_getaffinity(0))
    assert f"1 rank, {count} core{'s' if count > 1 else ''} a rank" in done.stdout, done.stdout + done.stderr


def copy_of_the_project(target):
    files = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True,
                           capture_output=True, check=True).stdout.splitlines()
    for name in files:
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


@pytest.mark.slow
def test_first_use_and_the_next_without_a_network(site, tmp_path):
    """A fresh clone on a machine with nothing but Python: .venv, MPI, the run; then again, offline and unlocked."""
    clone = tmp_path / "my clone"
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
        out, error = process.communicate(timeout=200)
        assert process.returncode == 0 and "every check holds" in out, out + error
        errors += error
    assert errors.count("first use, making") == 1 and errors.count("installing MPICH") == 1, errors
    site.environment.update(PIP_INDEX_URL="http://127.0.0.1:9/", PIP_NO_INDEX="1")
    done = subprocess.run([clone / "run.sh"], env=site.environment, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    (clone / "setup.cfg").write_text((clone / "setup.cfg").read_text() + "\n# changed\n")
    done = subprocess.run([clone / "run.sh"], env=site.environment, text=True, capture_output=True, timeout=60)
    assert done.returncode == 2 and "setup.cfg has changed" in done.stderr and "pip could not install" in done.stderr
