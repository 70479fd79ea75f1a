"""Run mpitp on the hosts, the Slurm and the Grid Engine of lab.sh, with two MPIs; write what ran to stdout as JSON.

    checks.py                       what .ci/cluster runs
    checks.py --all                 and what waits for real time limits, and every fault of two hosts
    checks.py --only PATTERN        of all, those whose launcher, MPI or words match
    checks.py --try 'COMMAND'       one command of your own, with each MPI
    checks.py --stay                none: the hosts stay

Exits with 0 when all of it held, 1 when something did not, 77 when PyPI's server does not answer. Python's standard
library alone: this runs outside any virtual environment.
"""
import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache

import two_hosts
from limits import real_time_limits
from student import (MPICH, OPEN_MPI, Done, Failed, good, hold, install, over_ssh, say, steps_of, student, version,
                     wait_for)

ONE_HOST, SSH, SLURM, GRID_ENGINE = "one host", "mpirun over ssh", "Slurm", "Grid Engine"
BOTH = (MPICH, OPEN_MPI)


@dataclass
class Ran:
    """One thing that was tried."""
    launcher: str
    mpi: str
    what: str
    ok: bool
    seconds: float


TRAIN = "train --hidden-size 32 --num-layers 2 --num-attention-heads 4 --micro-batch-size 2 --train-iters 6 " \
        "--reproducible --out"
TINY = "--hidden-size 32 --num-layers 1 --num-attention-heads 4 --seq-length 16 --micro-batch-size 2"
GENERATE = "generate --model ~/model --ids 1,2,3 --max-new-tokens 12 --reproducible"


# --- what is computed ----------------------------------------------------------------------------------------

def bits(host: str, mpi: str, name: str, start: str) -> str:
    """Return one text of what reproducible mode computes: a verified block, a trained folder, generated tokens."""
    verify = good(host, f"{start} verify --hidden-size 64 --reproducible", mpi)
    good(host, f"rm -rf ~/{name}; {start} {TRAIN} ~/{name}", mpi)
    sums = good(host, f"cd ~/{name}/step-00000006 && sha256sum *.safetensors")
    ids = good(host, f"{start} {GENERATE} --json ~/{name}.json > /dev/null && cat ~/{name}.json", mpi)
    hold("sha256" in verify, Done(0, verify))
    tokens = json.loads(ids[ids.index("{"):])["sequences"][0]["new_ids"]
    found = re.findall(r"sha256\S* .*", verify), sums, tokens
    return repr(found)


@cache
def expected_bits() -> str:
    """Return the bits of one host."""
    good("h1", "./run.sh -n 1 tests/cluster/model.py ~/model")
    return bits("h1", MPICH, "one-host", "./run.sh -n 2")


def one_host(mpi: str) -> None:
    expected_bits()


def hosts_of(text: str) -> set[str]:
    """Return the hosts that are named in what hosts.py printed."""
    return set(re.findall(r"\bh[12]\b", text))


def both_hosts_by_ssh(mpi: str) -> None:
    text = good("h1", f"{over_ssh(mpi)} tests/cluster/hosts.py", mpi)
    hold(hosts_of(text) == {"h1", "h2"}, Done(0, text))


def bits_over_ssh(mpi: str) -> None:
    found = bits("h1", mpi, f"ssh-{mpi.split()[0].lower()}", over_ssh(mpi))
    hold(found == expected_bits(), Done(0, f"{found}\n{expected_bits()}"))


def bits_over_slurm(mpi: str) -> None:
    text = good("h0", "salloc -Q -N 2 -n 2 ./run.sh tests/cluster/hosts.py", mpi)
    hold(hosts_of(text) == {"h1", "h2"}, Done(0, text))
    found = bits("h0", mpi, f"slurm-{mpi.split()[0].lower()}", "salloc -Q -N 2 -n 2 ./run.sh")
    hold(found == expected_bits(), Done(0, f"{found}\n{expected_bits()}"))


# --- batch jobs ----------------------------------------------------------------------------------------------

def batch_script(mpi: str) -> None:
    text = good("h0", "sbatch -Q --wait -o ~/job.out --nodes=2 --ntasks=4 --cpus-per-task=1 examples/slurm.sh; "
                      "cat ~/job.out", mpi)
    hold("every check holds" in text and ": 4 ranks" in text, Done(0, text))


def scaling_study(mpi: str) -> None:
    """examples/slurm_scaling.sh finds the type of MPI; each of its steps is one world, the second one on both hosts."""
    name = f"scaling-{mpi.split()[0].lower()}"
    text = good("h0", f"rm -f scaling.json; sbatch -Q --wait -o ~/{name}.out --nodes=2 --ntasks=4 --cpus-per-task=1 "
                      "examples/slurm_scaling.sh ffn --ranks 1,4 --scaling strong --hidden-size 64 --seq-length 16 "
                      f"--rounds 1; cat ~/{name}.out; rm -f ~/{name}.json; mv scaling.json ~/{name}.json", mpi)
    study = json.loads(good("h0", f"cat ~/{name}.json"))
    hold({point["ranks"] for point in study["points"]} == {1, 4} and "strong scaling" in text, Done(0, text))
    hold(not good("h0", "ls -d .mpitp-scale-* 2>/dev/null || true"), Done(0, text))


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
            # A requeued job would rest for two minutes; one that starts again in the same second is refused.
            student("h0", f"scontrol update job={job} StartTime=now+3")
    wait_for(f"scontrol show job {job} | grep -q JobState=COMPLETED", f"~/{name}.out")
    steps = steps_of(f"~/{name}")
    hold(len(steps) > 5 and steps == sorted(set(steps)) and steps[-1] == 300, Done(0, str(steps)))


# Grid Engine's jobs have the environment of a login shell: what a site's modules do is done in the profile here.
PROFILE = "echo \"PATH=${MPITP_VENV:-$HOME/mpitp/.venv}/bin:\\$PATH\" > ~/.profile; "


def in_grid_engine(command: str) -> str:
    """Return a command that submits a job of four slots and prints what it wrote; its status is the job's."""
    return f"rm -f ~/job.out; qsub -sync y -V -cwd -j y -o ~/job.out -pe mpi 4 {command}; status=$?; cat ~/job.out; " \
           "rm -f ~/.profile; exit $status"


def grid_engine(mpi: str) -> None:
    """NSLOTS is 4; two slots are on either host."""
    text = good("h0", PROFILE + in_grid_engine("-b y ./run.sh tests/cluster/hosts.py"), mpi)
    names = re.findall(r"\bh[12]\b", text)
    hold(names.count("h1") == names.count("h2") == 2, Done(0, text))
    text = good("h0", PROFILE + in_grid_engine("examples/grid_engine.sh"), mpi)
    hold("every check holds" in text and ": 4 ranks" in text, Done(0, text))


def bits_over_grid_engine(mpi: str) -> None:
    name = f"grid-{mpi.split()[0].lower()}"
    good("h0", f"rm -rf ~/{name}; {PROFILE}{in_grid_engine(f'-b y ./run.sh {TRAIN} {name}')}", mpi)
    sums = good("h0", f"cd {name}/step-00000006 && sha256sum *.safetensors")
    hold(repr(sums) in expected_bits(), Done(0, f"{sums!r}\n{expected_bits()}"))


# --- what is refused -----------------------------------------------------------------------------------------

def prepared(mpi: str) -> None:
    """What ./run.sh --prepare has made on the login node serves jobs whose nodes have no network, its tests too."""
    offline = "ip route get 151.101.0.223 2>&1 | grep -q unreachable"
    before = good("h0", "stat -c %Y .venv/mpitp-installed .venv/bin/mpirun")
    text = good("h0", f"salloc -Q -N 2 -n 2 bash -c '{offline} && ./run.sh verify --hidden-size 16 && "
                      f"PYTEST_ADDOPTS=\"-k partition --ignore=tests/test_run_sh.py\" ./run.sh test 2'", mpi)
    hold("every check holds" in text and " passed" in text and "install" not in text, Done(0, text))
    hold(good("h0", "stat -c %Y .venv/mpitp-installed .venv/bin/mpirun") == before, Done(0, text))


def refused(command: str, *words: str) -> Callable[[str], None]:
    """Return a check: the command ends within 20 s with status 2 and a line of run.sh that has the words."""
    def check(mpi: str) -> None:
        began = time.monotonic()
        done = student("h0", command, mpi)
        lines = [line for line in done.text.splitlines() if line.startswith("run.sh: found")]
        hold(done.status == 2 and len(lines) == 1 and all(word in lines[0] for word in words), done)
        # The hosts share the cores of this machine with whatever else runs on it.
        hold(time.monotonic() - began < 20 * max(1, os.getloadavg()[0] / (os.cpu_count() or 1)), done)
    return check


@dataclass
class Check:
    """One thing to try, with some MPIs; is_long: by --all alone."""
    launcher: str
    mpis: tuple[str, ...]
    what: str
    function: Callable[[str], None]
    is_long: bool = False


CHECKS = [
    Check(ONE_HOST, (MPICH,), "verify, train, generate, 2 ranks: the bits that others must have", one_host),
    Check(SSH, BOTH, "ranks on both hosts", both_hosts_by_ssh),
    Check(SSH, BOTH, "verify, train, generate over two hosts: the bits of one host", bits_over_ssh),
    Check(SLURM, BOTH, "verify, train, generate over two hosts: the bits of one host", bits_over_slurm),
    Check(SLURM, BOTH, "sbatch examples/slurm.sh, 4 ranks on two hosts", batch_script),
    Check(SLURM, (MPICH,), "sbatch examples/slurm_scaling.sh, 1 and 4 ranks", scaling_study),
    Check(SLURM, (OPEN_MPI,), "sbatch examples/slurm_scaling.sh, 1 and 4 ranks", scaling_study, is_long=True),
    Check(SLURM, BOTH, "the shell of srun --pty", interactive),
    Check(SLURM, BOTH, "sbatch examples/slurm_train.sh: three jobs in one, to the last step, one log", requeue),
    Check(SLURM, BOTH, "sbatch examples/slurm_train.sh with real time limits: TERM at the limit of one job, USR1 "
                       "before that of the next and three requeues; one log, the bits of an uninterrupted run",
          real_time_limits, is_long=True),
    Check(GRID_ENGINE, BOTH, "qsub examples/grid_engine.sh, 4 slots on two hosts", grid_engine),
    Check(GRID_ENGINE, BOTH, "train with 4 slots on two hosts: the bits of one host", bits_over_grid_engine),
    Check(SLURM, (MPICH,), "after ./run.sh --prepare: jobs and tests on nodes without a network", prepared),
    Check(SLURM, (MPICH,), "refused: more ranks than the allocation has",
          refused("salloc -Q -n 2 ./run.sh -n 9", "found -n 9 in a Slurm allocation of 2")),
    Check(GRID_ENGINE, (MPICH,), "refused: more ranks than the allocation has",
          refused(PROFILE + in_grid_engine("-b y ./run.sh -n 9"), "found -n 9 in a Grid Engine allocation of 4")),
    Check(GRID_ENGINE, (MPICH,), "refused: no launcher",
          refused(in_grid_engine("-b y ./run.sh"), "found no MPI launcher")),
    Check(SLURM, (MPICH,), "refused: a first use on a node without a network",
          refused("salloc -Q -n 2 srun -n 1 ~/fresh/run.sh", "found no package index", "--prepare")),
    Check(SLURM, BOTH, "refused: an MPI library that mpi4py cannot load",
          refused("MPI4PY_LIBMPI=/none.so salloc -Q -n 2 ./run.sh", "MPI4PY_LIBMPI")),
    Check(ONE_HOST, BOTH, "refused: an MPI library that mpi4py cannot load",
          refused("MPI4PY_LIBMPI=/none.so ./run.sh", "MPI4PY_LIBMPI=/none.so")),
    Check(SSH, BOTH, "a link that is cut ends the job", two_hosts.cut_link),
    Check(SSH, BOTH, "every fault of one of two hosts ends the job", two_hosts.every_fault, is_long=True),
]


def try_all(checks: list[Check], pattern: str) -> list[Ran]:
    """Run the checks whose launcher, MPI or words match, and return what ran."""
    ran = []
    for check in checks:
        for mpi in check.mpis:
            title = f"{check.launcher}, {mpi}: {check.what}"
            if not re.search(pattern, title):
                continue
            began, problem = time.monotonic(), None
            try:
                check.function(mpi)
            except Failed as error:
                problem = str(error)
            seconds = round(time.monotonic() - began, 1)
            ran.append(Ran(check.launcher, mpi, check.what, problem is None, seconds))
            say(f"{'ok    ' if problem is None else 'FAILED'} {seconds:5.1f} s  {title}")
            if problem:
                print(problem, file=sys.stderr, flush=True)
    return ran


def main() -> int:
    """Run the checks, or the command that is given; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", default="", metavar="PATTERN")
    parser.add_argument("--try", dest="command", metavar="COMMAND")
    parser.add_argument("--stay", action="store_true")
    arguments = parser.parse_args()
    install()
    if arguments.command:
        for mpi in BOTH:
            say(mpi)
            print(student("h0", arguments.command, mpi, 500).text, file=sys.stderr, flush=True)
        return 0
    if arguments.stay:
        say("the hosts stay; root is on them by nsenter -m -p -r -w -t PID, where PID is that of checks.py --stay")
        while True:
            time.sleep(1000)
    checks = [check for check in CHECKS if arguments.all or arguments.only or not check.is_long]
    ran = try_all(checks, arguments.only)
    print(json.dumps({"schema": "mpitp.cluster/1", "slurm": good("h0", "sinfo --version").split()[-1],
                      "grid_engine": good("h0", "qstat -help | head -1").split()[-1],
                      "mpi": {mpi: version(mpi) for mpi in BOTH}, "ran": [asdict(entry) for entry in ran],
                      "faults": [asdict(outcome) for outcome in two_hosts.OUTCOMES]}, indent=1))
    return 0 if all(entry.ok for entry in ran) else 1


if __name__ == "__main__":
    sys.exit(main())
