"""However one rank ends, the job ends: within 10 seconds, not with success, the failing rank's words first."""
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from spmd import job, job_environment, mpirun, ROOT

pytestmark = pytest.mark.launcher
RANKS = 2
HANGS = 60              # seconds: what is not over then would not be over at all; measured: 0.3 to 3, alone
LIMITED = job_environment(MPIEXEC_TIMEOUT=str(2 * HANGS))

# What the failing rank does while the others wait for it in a collective, and what it must be heard to say.
FAILURES = {
    "raises": ("raise RuntimeError('boom')", "RuntimeError: boom"),
    "exits 2": ("sys.exit(2)", "SystemExit: 2"),
    "exits with words": ("sys.exit('that was it')", "SystemExit: that was it"),
    "runs out of memory": ("raise MemoryError('no room')", "MemoryError: no room"),
    "is interrupted": ("raise KeyboardInterrupt", "interrupted"),
    "fails in a thread": ("threading.Thread(target=lambda: 1 / 0).start()", "ZeroDivisionError"),
    "exits 3 in a thread": ("threading.Thread(target=sys.exit, args=(3,)).start(); time.sleep(1000)", "SystemExit: 3"),
    "fails in a block": ("sum_of_blocks(group, lambda block: 1 / 0, group.partition(9), (3,), 'float64')",
                         "ZeroDivisionError"),
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", None),
}
PROGRAM = """
import os, signal, sys, threading, time
import numpy as np
import mpitp
from spmd import sum_of_blocks

def main():
    {enter}
        if group.workers: group.workers.count = 2
        if group.rank == {rank}:
            {failure}
            if threading.active_count() > 1: group.all_reduce(np.ones(3)), group.comm.recv()
        group.all_reduce(np.ones(3))
        group.all_reduce(np.ones(3))
    print("came to the end")

{start}
"""
WAYS = {
    "guarded": dict(enter="group = mpitp.TensorParallelGroup(reproducible=True)\n    if True:",
                    start="from mpitp.comm.guard import guarded\nsys.exit(guarded(main))"),
    "context manager": dict(enter="with mpitp.TensorParallelGroup(reproducible=True) as group:", start="main()"),
}


def timed_job(ranks, *arguments):
    """The finished job, and how many seconds it took."""
    began = time.monotonic()
    return job(ranks, *arguments, timeout=2 * HANGS), time.monotonic() - began


def ends(timed, words):
    done, seconds = timed
    assert seconds < HANGS, "took too long"
    assert done.returncode != 0, done.stdout
    assert "came to the end" not in done.stdout
    assert words is None or words in done.stderr, done.stderr
    assert words is None or "Error" not in words or "Traceback (most recent call last)" in done.stderr, done.stderr


@pytest.fixture(scope="module")
def failed_jobs():
    """{(way, failure, rank): a job}, started side by side, since most of their time is waiting."""
    with ThreadPoolExecutor(4) as pool:
        yield {(way, failure, rank): pool.submit(timed_job, RANKS, "-c",
                                                 PROGRAM.format(rank=rank, failure=FAILURES[failure][0], **WAYS[way]))
               for way in WAYS for failure in FAILURES for rank in range(RANKS)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("rank", range(RANKS))
def test_one_rank_fails(failed_jobs, way, failure, rank):
    words = FAILURES[failure][1]
    timed = failed_jobs[way, failure, rank].result()
    ends(timed, words)
    assert words is None or f"mpitp: rank {rank} of {RANKS} ends the job" in timed[0].stderr


def test_the_middle_one_of_three_ranks_fails():
    ends(timed_job(3, "-c", PROGRAM.format(rank=1, failure="raise RuntimeError('boom')", **WAYS["guarded"])),
         f"rank 1 of 3 ends the job, on {socket.gethostname()}: Traceback")


@pytest.mark.parametrize("failure", ["raises", "exits 2", "is killed"])
def test_one_rank_fails_under_mpi4py(tmp_path, failure):
    """python -m mpi4py does for a program without the context manager what the guard does."""
    code, words = FAILURES[failure]
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(rank=1, failure=code, enter=WAYS["guarded"]["enter"], start="main()"))
    ends(timed_job(RANKS, "-m", "mpi4py", program), words if failure == "raises" else None)


def test_without_the_guard_it_would_hang():
    """The tester, tested: the bare program does not end by itself, only by the alarm that it sets."""
    bare = "import faulthandler\nfaulthandler.dump_traceback_later(6, exit=True)\n" + PROGRAM.format(
        rank=1, failure="sys.exit(2)", enter="group = mpitp.TensorParallelGroup()\n    if True:", start="main()")
    began = time.monotonic()
    done = job(RANKS, "-c", bare, timeout=2 * HANGS, environment=dict(MPITP_STALL_LIMIT="0"))
    assert done.returncode != 0 and time.monotonic() - began > 5 and "Timeout" in done.stderr


# --- bad input -------------------------------------------------------------------------------------------------

GUARDED = """
import sys, threading
from mpitp.comm.guard import guarded
from mpitp.errors import InputError
from mpi4py import MPI

def main():
    {body}

sys.exit(guarded(main))
"""


def guarded_job(body, ranks=RANKS):
    return job(ranks, "-c", GUARDED.format(body=body), timeout=2 * HANGS)


@pytest.mark.parametrize("ranks", [1, RANKS])
def test_bad_input_on_every_rank_is_one_line(ranks):
    done = guarded_job("raise InputError('found a, expected b')", ranks)
    assert done.returncode == 2 and done.stderr.count("mpitp: found a, expected b\n") == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_different_bad_input_is_the_line_of_the_first_rank():
    done = guarded_job("raise InputError(f'found {MPI.COMM_WORLD.rank}, expected b')")
    assert done.returncode == 2 and done.stderr.count("expected b") == 1 and "found 0," in done.stderr


@pytest.mark.parametrize("others", ["return 0", "MPI.COMM_WORLD.Barrier(); MPI.COMM_WORLD.Barrier()"])
def test_bad_input_on_one_rank_ends_the_job(others):
    program = GUARDED.format(body=f"if MPI.COMM_WORLD.rank == 1: raise InputError('found a')\n    {others}")
    timed = timed_job(RANKS, "-c", program)
    ends(timed, f"mpitp: rank 1 of {RANKS} on {socket.gethostname()}: found a\n")
    assert timed[0].stderr.count("found a") == 1


LIBRARY = """
import numpy as np
import mpitp.comm.guard
from spmd import sum_of_blocks
mpitp.comm.guard.PATIENCE = 1
with mpitp.TensorParallelGroup(check={check}) as group:
    {body}
print("after the group")
"""


def test_bad_input_in_the_context_manager_is_the_callers_on_every_rank():
    program = ("import mpitp, numpy as np\n"
               "try:\n    with mpitp.TensorParallelGroup() as group: group.all_reduce([1])\n"
               "except ValueError as error: print(end=f'caught {error}\\n')\n"
               "with mpitp.TensorParallelGroup() as group: print(end=f'goes on {group.size}\\n')\n")
    done = job(RANKS, "-c", program, timeout=2 * HANGS)
    assert done.returncode == 0 and done.stdout.count("caught all_reduce: found builtins.list") == RANKS, done.stderr
    assert done.stdout.count("goes on") == RANKS


@pytest.mark.parametrize("body", ["group.all_reduce([1] if group.rank == 0 else np.ones(1)); "
                                  "group.all_reduce(np.ones(1))",
                                  "sum_of_blocks(group, lambda b: np.ones(3), group.partition(1), (4,), float)"])
def test_bad_input_in_the_context_manager_of_one_rank_ends_the_job(body):
    timed = timed_job(RANKS, "-c", LIBRARY.format(check=False, body=body))
    ends(timed, "InputError")
    assert "after the group" not in timed[0].stdout


def test_leaving_the_context_manager_early():
    timed = timed_job(RANKS, "-c", LIBRARY.format(check=True, body="if group.rank: group.all_reduce(np.ones(1))"))
    ends(timed, "the ranks disagree on a collective: rank 0: close; rank 1: all_reduce")
    assert "ends the job" not in timed[0].stderr, "all ranks saw it: no need to end the job for one"


# --- ordinary ends ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("body, status", [
    ("return 0", 0), ("pass", 0), ("sys.exit(0)", 0), ("sys.exit()", 0), ("return 1", 1),
    ("thread = threading.Thread(target=sys.exit); thread.start(); thread.join()", 0)])
def test_status(body, status):
    done = guarded_job(body)
    assert (done.returncode, done.stderr.replace("\0", "")) == (status, "") or status and done.returncode == status


def test_status_of_one_rank():
    assert guarded_job("return MPI.COMM_WORLD.rank").returncode != 0
    assert guarded_job("sys.exit(3)", 1).returncode == 3


# --- signals and streams ---------------------------------------------------------------------------------------

WAITS = """
import os, sys, time, mpitp
from mpitp.comm.guard import guarded
def main():
    group = mpitp.TensorParallelGroup()
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(1000) if group.rank else group.comm.recv()
sys.exit(guarded(main))
"""


def gone(pids):
    deadline = time.monotonic() + HANGS
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_ends_every_process(signum):
    process = subprocess.Popen([*mpirun(2), sys.executable, "-c", WAITS], env=LIMITED, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    pids = [int(process.stdout.readline()) for _ in range(2)]
    process.send_signal(signum)
    process.communicate(timeout=HANGS)
    assert process.returncode != 0 and gone(pids)


def test_ctrl_c_without_a_launcher():
    program = WAITS.replace("group.comm.recv()", "time.sleep(1000)")
    process = subprocess.Popen([sys.executable, "-c", program], env=job_environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=HANGS)
    assert process.returncode == 1 and said == "mpitp: interrupted\n"


def shell(command):
    began = time.monotonic()
    done = subprocess.run(["bash", "-c", command], env=LIMITED, cwd=ROOT, text=True, capture_output=True,
                          timeout=3 * HANGS)
    assert time.monotonic() - began < HANGS
    return done


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_reader_that_leaves_early(ranks, tmp_path):
    """`| head -1`: ends, without an endless story. 0 ranks: without a launcher."""
    program = tmp_path / "program.py"
    program.write_text(GUARDED.format(body="print('x' * 100, *range(50000), sep='\\n'); return 0"))
    launcher = " ".join(mpirun(ranks)) if ranks else ""
    done = shell(f"{launcher} {sys.executable} {program} | head -1")
    assert done.stdout.startswith("xxx")
    assert "Exception ignored" not in done.stderr and done.stderr.count("Traceback") <= ranks
    assert ranks or done.stderr == ""


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams(closed, tmp_path):
    bodies = {"good": "print(1); return 0", "bad": "print(1); raise InputError('found a')",
              "failing": "if MPI.COMM_WORLD.rank: 1 / 0\n    MPI.COMM_WORLD.Barrier()"}
    for name, body in bodies.items():
        (tmp_path / f"{name}.py").write_text(GUARDED.format(body=body))
    assert shell(f"{sys.executable} {tmp_path}/good.py {closed}").returncode == 0
    assert shell(f"{sys.executable} {tmp_path}/bad.py {closed}").returncode == 2
    # On the ranks themselves: the launcher gives them pipes of its own.
    inner = f"{' '.join(mpirun(2))} bash -c 'exec {sys.executable} {tmp_path}"
    assert shell(f"{inner}/good.py {closed}'").returncode == 0
    assert shell(f"{inner}/failing.py {closed}'").returncode != 0
