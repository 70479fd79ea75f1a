"""Faults of one of two hosts, and of the link between them: who is named, and how long it takes.

The rows of "two hosts" in docs/faults.md are OUTCOMES, as the last `.ci/cluster --all` wrote them down.
"""
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass, field

from student import OPEN_MPI, Done, as_student, good, hold, on, over_ssh, run, student

STALL = 4                   # seconds, MPITP_STALL_LIMIT of the rows
AT_ONCE, AFTER_STALL = 20, 30
TRAIN = "train --hidden-size 16 --num-layers 1 --seq-length 16 --micro-batch-size 1 --eval-batches 1"
WAITS = r"rank {other} of 2 on {other_host} waits for [a-z_]+( [0-9]+ float32)? since [0-9:]+, at .*not there: " \
        r"rank {rank} of 2 on {host} \(process \d+\) "
SILENT = WAITS + r"has given no sign of life since [\d:]+ \(stopped, or {host} or the network to it is down\), last " \
         "at .*: the job ends after"
FAULTS = {                  # of tests/support/faulty.py: what is said, and the limit
    "is stopped": (SILENT, AFTER_STALL),
    "spins": (WAITS + r"is at .*faulty.py:\d+ in spin since .*: the job ends after", AFTER_STALL),
    "exits with 0": (WAITS + "has left the program at .*: the job ends", AFTER_STALL),
    "raises": (r"rank {rank} of 2 ends the job, on {host}: Traceback(.|\n)*RuntimeError: boom", AT_ONCE),
    "finds bad input": (r"rank {rank} of 2 on {host}: found a, expected b", AT_ONCE),
    # The TCP of Open MPI ends the rank that is left, at times before the launcher knows why.
    "is killed": (r"(RUNNING AT {host}(.|\n)*EXIT CODE: 9|rank {rank} with PID \d+ on node {host} exited on\s+signal 9|"
                  r"Peer host: +{host}|An error occurred in Socket closed)", AT_ONCE),
}


@dataclass
class Outcome:
    """How a fault ended, as a row of the table."""
    fault: str
    command: str
    rank: int
    mpi: str
    seconds: float
    limit: float
    status: int
    line: str
    problems: list[str] = field(default_factory=list)


OUTCOMES: list[Outcome] = []


def judge(fault: str, command: str, rank: int, mpi: str, words: str, limit: float, began: float, done: Done) -> None:
    """Note how a fault ended; raise Failed where it ended too late, with status 0, or without the words."""
    seconds = time.monotonic() - began
    words = words.format(rank=rank, other=1 - rank, host=f"h{rank + 1}", other_host=f"h{2 - rank}")
    found = re.search(words, done.text)
    line = ""
    if found:
        start = done.text.rfind("\n", 0, found.start()) + 1
        line = " ".join(done.text[start:max(found.end(), done.text.find("\n", found.start()))].split())
    problems = [f"took {seconds:.1f} s"] * (seconds > limit) + ["status 0"] * (done.status == 0) + \
        ["does not say it"] * (found is None)
    OUTCOMES.append(Outcome(fault, command, rank, mpi, round(seconds, 1), limit, done.status, line, problems))
    hold(not problems, Done(done.status, f"{done.text}\n{fault}, {command}, rank {rank}: {'; '.join(problems)}"))


def start(mpi: str) -> str:
    """Return the words that start run.sh on both hosts with the short limit."""
    return f"MPITP_STALL_LIMIT={STALL} {over_ssh(mpi)}"


# --- the link ------------------------------------------------------------------------------------------------

def cut_link(mpi: str) -> None:
    """Take down the link of either host while both train; the rank behind it and its host are named."""
    for rank in (1, 0):
        cut_link_of(rank, mpi)


def cut_link_of(rank: int, mpi: str) -> None:
    """Take down the link of the host of a rank; its link comes back once the job has ended.

    MPICH's mpirun ends with the ranks. Open MPI's has said everything by then, and waits for the host; run.sh ends
    it.
    """
    host = f"h{rank + 1}"
    with tempfile.TemporaryFile("w+") as out:
        job = subprocess.Popen(as_student("h0", f"{start(mpi)} {TRAIN} --train-iters 1000000", mpi), text=True,
                               stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)

        def said() -> str:
            out.seek(0)
            return out.read()
        try:
            wait(lambda: "step " in said(), 30, said)
            began = time.monotonic()
            run(on(host, "ip", "link", "set", "eth0", "down"))
            wait(lambda: not ranks_on("h1") and not ranks_on("h2"), AFTER_STALL, said)
            seconds = time.monotonic() - began
            wait(lambda: job.poll() is not None, 40 if mpi == OPEN_MPI else 10, said)
        finally:
            run(on(host, "ip", "link", "set", "eth0", "up"))
        # Only the ranks that the launcher reaches are heard: those on the side of h0.
        judge("the link is cut", "train", rank, mpi, SILENT, AFTER_STALL, time.monotonic() - seconds,
              Done(job.returncode, said()))


def ranks_on(host: str) -> str:
    """Return the numbers of the processes that train on a host."""
    return run(on(host, "pgrep", "-f", "[p]ython -m mpitp train .*--train-iters 1000000")).text


def wait(condition, seconds: float, said) -> None:
    """Wait until a condition is true; raise Failed with what was said where that takes longer."""
    until = time.monotonic() + seconds
    while not condition():
        hold(time.monotonic() < until, Done(-1, said()))
        time.sleep(0.2)


# --- every fault ---------------------------------------------------------------------------------------------

def every_fault(mpi: str) -> None:
    """Each fault of a rank on a host of its own, and files that differ between the hosts."""
    problems = []
    for fault, (words, limit) in FAULTS.items():
        for rank in (0, 1):
            problems += tried(fault, "train", rank, mpi, words, limit,
                              f"tests/support/faulty.py '{fault}' {rank} 5 {TRAIN} --train-iters 6")
    for host, text in (("h1", "README.md"), ("h2", "CHANGELOG.md")):
        good(host, f"cp {text} /tmp/data; cp -r ~/model /tmp/model")          # each host has a /tmp of its own
    good("h2", "rm /tmp/model/generation_config.json; mkdir -p /tmp/model; "
               "printf '{\"eos_token_id\": 7}' > /tmp/model/generation_config.json")
    problems += tried("other data, the same path", "train", 1, mpi, "the ranks disagree on the data: rank 0: .* tokens",
                      AT_ONCE, f"{TRAIN} --train-iters 6 --data /tmp/data")
    problems += tried("another generation_config.json, the same path", "generate", 1, mpi,
                      "the ranks disagree on generation_config.json: rank 0: ", AT_ONCE,
                      "generate --model /tmp/model --ids 1,2,3 --max-new-tokens 4")
    good("h2", "rm /tmp/data")
    problems += tried("no data", "train", 1, mpi, "rank {rank} on {host}: /tmp/data: found No such file", AT_ONCE,
                      f"{TRAIN} --train-iters 6 --data /tmp/data")
    hold(not problems, Done(1, "\n".join(problems)))


def tried(fault: str, command: str, rank: int, mpi: str, words: str, limit: float, arguments: str) -> list[str]:
    """Try a row; returns what is wrong with it, or nothing."""
    began = time.monotonic()
    done = student("h0", f"{start(mpi)} {arguments}", mpi, 60)
    try:
        judge(fault, command, rank, mpi, words, limit, began, done)
    except Exception as error:
        return [str(error)]
    finally:
        for host in ("h1", "h2"):               # where a launcher left a rank that is stopped
            run(on(host, "pkill", "-KILL", "-f", "faulty.py|/tmp/(data|model)"))
    return []
