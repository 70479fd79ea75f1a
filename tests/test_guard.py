"""However one rank ends, the job ends: within 10 seconds, not with success, the failing rank's words first."""
import os
import signal
import subprocess
import sys
import time

import pytest

from spmd import ROOT, job

pytestmark = pytest.mark.launcher
RANKS = 3

# What the failing rank does while the others wait for it in a collective.
FAILURES = {
    "raises": ("raise RuntimeError('boom')", "RuntimeError: boom"),
    "exits 2": ("sys.exit(2)", "sys.exit(2)"),
    "exits with words": ("sys.exit('that was it')", "that was it"),
    "runs out of memory": ("raise MemoryError('no room')", "MemoryError: no room"),
    "is interrupted": ("raise KeyboardInterrupt", "interrupt"),
    "fails in a thread": ("threading.Thread(target=lambda: 1 / 0).start(); time.sleep(60)",
                          "ZeroDivisionError"),
    "fails in a block": ("list(group._workers.each(lambda i: 1 / 0, [1, 2]))", "ZeroDivisionError"),
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", None),
}
PROGRAM = """
import os, signal, sys, threading, time
import numpy as np
import mpitp

def main():
    {enter}
        if group.rank == {rank}:
            {failure}
        group.all_reduce(np.ones(3))
        group.all_reduce(np.ones(3))
    print("came to the end")

{start}
"""
WAYS = {
    "guarded": dict(enter="group = mpitp.TensorParallelGroup()\n    if True:",
                    start="from mpitp.comm.guard import guarded\nsys.exit(guarded(main))"),
    "context manager": dict(enter="with mpitp.TensorParallelGroup() as group:", start="main()"),
}


def ends(done, began, words):
    assert time.monotonic() - began < 10, "took too long"
    assert done.returncode != 0, done.stdout
    assert "came to the end" not in done.stdout
    assert words is None or words in done.stderr, done.stderr


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("failure", FAILURES)
def test_one_rank_fails_under_the_guard(failure, rank):
    code, words = FAILURES[failure]
    began = time.monotonic()
    done = job(RANKS, "-c", PROGRAM.format(rank=rank, failure=code, **WAYS["guarded"]), timeout=20)
    ends(done, began, words)
    if words:
        assert f"rank {rank} of {RANKS}" in done.stderr


@pytest.mark.parametrize("failure", [f for f in FAILURES if "thread" not in f])
def test_one_rank_fails_in_the_context_manager(failure):
    code, words = FAILURES[failure]
    began = time.monotonic()
    ends(job(RANKS, "-c", PROGRAM.format(rank=1, failure=code, **WAYS["context manager"]), timeout=20), began, words)


def test_one_rank_fails_under_mpi4py(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(rank=1, failure="raise RuntimeError('boom')", **WAYS["context manager"]))
    began = time.monotonic()
    ends(job(RANKS, "-m", "mpi4py", program, timeout=20), began, "RuntimeError: boom")


GUARDED = """
import sys
from mpitp.comm.guard import guarded
from mpitp.errors import InputError
from mpi4py import MPI

def main():
    {body}

sys.exit(guarded(main))
"""


def guarded_job(body, ranks=RANKS):
    return job(ranks, "-c", GUARDED.format(body=body), timeout=20)


def test_bad_input_on_every_rank_is_one_line():
    for ranks in (1, RANKS):
        done = guarded_job("raise InputError('found a, expected b')", ranks)
        assert done.returncode == 2 and done.stderr.count("mpitp: found a, expected b\n") == 1, done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("others", ["return 0", "MPI.COMM_WORLD.Barrier(); MPI.COMM_WORLD.Barrier()"])
def test_bad_input_on_one_rank_ends_the_job(others):
    began = time.monotonic()
    done = guarded_job(f"if MPI.COMM_WORLD.rank == 1: raise InputError('found a, expected b')\n    {others}")
    ends(done, began, "mpitp: found a, expected b")
    assert done.stderr.count("found a, expected b") == 1


def test_good_and_failed_status():
    assert guarded_job("return 0").returncode == 0
    assert guarded_job("pass").returncode == 0
    assert guarded_job("sys.exit(0)").returncode == 0
    assert guarded_job("return 1").returncode == 1
    assert guarded_job("return MPI.COMM_WORLD.rank").returncode != 0


def test_without_the_guard_it_would_hang():
    """The tester, tested: the bare program does not end by itself, only by the alarm that it sets."""
    bare = "import faulthandler\nfaulthandler.dump_traceback_later(6, exit=True)\n" + PROGRAM.format(
        rank=1, failure="sys.exit(2)", enter="group = mpitp.TensorParallelGroup()\n    if True:", start="main()")
    began = time.monotonic()
    done = job(2, "-c", bare, timeout=60)
    assert done.returncode != 0 and time.monotonic() - began > 5 and "Timeout" in done.stderr


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_ends_every_process(signum, tmp_path):
    program = tmp_path / "waits.py"
    program.write_text("import sys, os, time, mpitp\nfrom mpitp.comm.guard import guarded\n"
                       "def main():\n    group = mpitp.TensorParallelGroup()\n    os.write(1, b'%d\\n' % os.getpid())\n"
                       "    time.sleep(60) if group.rank else group.comm.recv()\nsys.exit(guarded(main))\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPIEXEC_TIMEOUT": "30", "OMPI_ALLOW_RUN_AS_ROOT": "1",
                   "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm"}
    for name in [n for n in environment if n.startswith(("PMI", "PMIX"))]:
        del environment[name]
    launcher = os.path.join(sys.prefix, "bin", "mpirun")
    if not os.path.exists(launcher):
        launcher = "mpirun"
    process = subprocess.Popen([launcher, "-n", "2", sys.executable, str(program)], env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    pids = [int(process.stdout.readline()) for _ in range(2)]
    process.send_signal(signum)
    assert process.wait(timeout=10) != 0
    deadline = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
