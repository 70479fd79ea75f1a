"""What ends a training job early, and what lets the next one go on: signals, the lock of --out, one command line."""
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from mpitp import InputError
from mpitp.training import lock
from mpitp.training.requests import NOTHING, SAVE, STOP, Requests
from spmd import ROOT, job, job_environment, mpirun

SMALL = ("--hidden-size", 20, "--num-layers", 1, "--num-attention-heads", 5, "--seq-length", 16,
         "--micro-batch-size", 2, "--eval-interval", 0, "--eval-batches", 1, "--data", ROOT / "LICENSE",
         "--reproducible")


class Running:
    """A job of two ranks that trains into a folder."""

    def __init__(self, out, *more):
        self.out = out
        words = *SMALL, "--train-iters", 100000, "--out", out, *more
        self.process = subprocess.Popen([*mpirun(2), sys.executable, "-m", "mpitp", "train", *map(str, words)],
                                        env=job_environment(MPIEXEC_TIMEOUT="300"), cwd=ROOT, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def wait_for(self, condition):
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.005)

    def ranks(self):
        return [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and self.is_rank(pid)]

    def is_rank(self, pid):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
        except OSError:
            return False
        return str(self.out).encode() in words and b"python" in os.path.basename(words[0])

    def owner(self):
        return json.loads((self.out / "lock.json").read_text())["pid"]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for pid in self.ranks():
            os.kill(pid, signal.SIGKILL)
        self.process.communicate(timeout=300)


def steps(out):
    return sorted(name for name in os.listdir(out) if re.fullmatch(r"step-\d{8}", name))


pytestmark = [pytest.mark.launcher, pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")]


def test_term_before_the_first_step_saves_and_stops_and_auto_goes_on(tmp_path):
    out = tmp_path / "out"
    with Running(out) as running:
        running.wait_for(lambda: (out / "lock.json").exists() and (out / "lock.json").read_text())
        other, = set(running.ranks()) - {running.owner()}
        os.kill(other, signal.SIGTERM)                      # to a rank that has no lock
        said, wrong = running.process.communicate(timeout=300)
    assert running.process.returncode == 0, wrong
    step, = steps(out)
    number = int(step.removeprefix("step-"))
    assert f"stopped by SIGTERM after step {number} of 100000, go on with --resume" in said and not wrong
    assert not (out / "lock.json").exists()
    end = number + 2
    for expected in (f"resumed from {out}, step {number}", f"nothing left to do: {out} has step {end} of {end}"):
        done = job(2, "-m", "mpitp", "train", *SMALL, "--out", out, "--resume", "auto", "--train-iters", end,
                   "--lr-decay-iters", 100000)              # one command line, twice
        assert done.returncode == 0 and expected in done.stdout, done.stderr


def test_usr2_by_option_and_a_time_to_save(tmp_path):
    out = tmp_path / "out"
    with Running(out, "--stop-on", "USR2", "--save-minutes", 0.0005, "--keep", 0) as running:
        running.wait_for(lambda: out.exists() and len(steps(out)) > 1)      # by the time alone
        os.kill(running.ranks()[0], signal.SIGUSR2)
        said, wrong = running.process.communicate(timeout=300)
    assert running.process.returncode == 0 and "stopped by SIGUSR2" in said, wrong


def test_two_jobs_on_one_folder(tmp_path):
    out = tmp_path / "out"
    more = "--train-iters", 100000, "--out", out
    with Running(out) as running:
        running.wait_for(lambda: (out / "log.jsonl").exists())
        owner = running.owner()
        done = job(1, "-m", "mpitp", "train", *SMALL, *more)
        assert done.returncode == 2 and f"found the lock of process {owner} on " in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
        os.kill(running.ranks()[0], signal.SIGUSR1)         # saves, and goes on
        running.wait_for(lambda: steps(out))
        os.kill(owner, signal.SIGKILL)
        running.process.communicate(timeout=300)
    assert (out / "lock.json").exists()
    done = job(1, "-m", "mpitp", "train", *SMALL, "--out", out, "--train-iters", int(steps(out)[-1][5:]) + 1,
               "--resume", "--lr-decay-iters", 100000)
    assert f"removed the lock of process {owner} on " in done.stdout, done.stderr
    assert done.returncode == 0 and not (out / "lock.json").exists()


@pytest.mark.parametrize("words, said", [
    (("--stop-on", "HUP"), "found signal 'HUP', expected of TERM, USR1, USR2"),
    (("--resume", "later"), "invalid choice"), (("--resume-from", "step-00000001"), "without --out"),
    (("--out", "x", "--resume-from", "y/step-00000001"), "expected a step folder of --out x"),
    (("--out", "x", "--resume-from", "x/step-1"), "expected a step folder of --out x"),
    (("--out", "x", "--resume-from", "x/step-00000007"), "found no step folder in x"),
    (("--out", "x", "--resume", "--resume-from", "x/step-00000001"), "expected one of them"),
    (("--save-minutes", "nan"), "save_minutes = nan"), (("--spike-limit", "-1"), "spike_limit = -1.0"),
])
def test_bad_options(tmp_path, words, said):
    done = job(1, "-m", "mpitp", "train", *SMALL, *words, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.glob("x/*"))


def test_the_example_for_slurm_queues_itself_until_the_last_step(tmp_path):
    """With a run.sh that stops early, one that reaches the end, and one that fails."""
    for name, body in (("run.sh", 'echo "$@" >> calls; [ -z "$MAKES" ] || mkdir -p "$MAKES"; exit "$STATUS"'),
                       ("scontrol", 'echo "scontrol $@" >> calls')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path),
                   "SLURM_JOB_ID": "7", "STEPS": "20"}
    calls = []
    for makes, status in (("", 0), ("run/step-00000010", 0), ("run/step-00000020", 0), ("", 3)):
        done = subprocess.run(["bash", ROOT / "examples" / "slurm_train.sh", "--seed", "4"], text=True,
                              env={**environment, "MAKES": makes, "STATUS": str(status)}, capture_output=True)
        assert done.returncode == status, done.stderr
        calls.append((tmp_path / "calls").read_text().splitlines())
        (tmp_path / "calls").unlink()
    assert all(lines[0].startswith("train ") and lines[0].endswith("--resume auto --stop-on TERM,USR1 --seed 4")
               for lines in calls)
    assert [lines[1:] for lines in calls] == [["scontrol requeue 7"], ["scontrol requeue 7"], [], []]


# --- in this process -------------------------------------------------------------------------------------------

def test_what_signals_ask_for():
    with Requests(("TERM",)) as requests:
        assert requests.take() == (NOTHING, "")
        signal.raise_signal(signal.SIGUSR1)
        assert requests.take() == (SAVE, "SIGUSR1")
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR2)
        assert requests.take() == (STOP, "SIGTERM") and requests.take() == (NOTHING, "")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_signals_are_held_until_the_run_begins():
    """In a process of its own: a signal that comes before the handlers are set would end it."""
    program = ("import os, signal\nfrom mpitp.training.requests import Requests, hold_signals\nhold_signals()\n"
               "os.kill(os.getpid(), signal.SIGTERM)\nwith Requests() as requests:\n    print(requests.take())\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=job_environment())
    assert done.stdout == "(2, 'SIGTERM')\n", done.stderr


def write(folder, **changes):
    found = {**lock.this_process(), **changes}
    (folder / "lock.json").write_text(json.dumps(found))
    return found


@pytest.mark.parametrize("changes, lives", [
    ({}, True), ({"pid": 2 ** 22 + 1}, False), ({"started": "1"}, False), ({"pid": "x"}, False),
    ({"host": "other", "job": "7", "restart": "0"}, False), ({"host": "other"}, False), ({"space": "pid:[1]"}, False),
])
def test_whose_lock_counts(tmp_path, monkeypatch, changes, lives):
    monkeypatch.setattr(lock, "STALE", 0.3)
    monkeypatch.setattr(lock, "WRITING", 0.1)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    write(tmp_path, **changes)
    mine = lock.FolderLock(tmp_path)
    if lives:
        with pytest.raises(InputError, match=f"found the lock of process {os.getpid()} on "):
            mine.acquire()
        return
    assert "which has ended" in mine.acquire()
    mine.require_own()
    mine.release()
    assert not os.listdir(tmp_path)


def test_a_lock_of_another_host_that_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "STALE", 5)
    other = lock.FolderLock(tmp_path)
    other.mine["host"] = "other"
    assert other.acquire() == ""
    mine = lock.FolderLock(tmp_path)
    with pytest.raises(InputError, match="on other"):
        mine.acquire()
    threading.Timer(0.3, other.release).start()
    with pytest.raises(InputError):
        mine.require_own()
    other.thread.join()
    while (tmp_path / "lock.json").exists():
        time.sleep(0.01)
    mine.acquire()
    write(tmp_path, pid=1)                                  # another job took it while this one stood still
    with pytest.raises(InputError, match="found the lock of process 1 .* this job's own"):
        mine.require_own()
    mine.release()
    assert os.listdir(tmp_path) == ["lock.json"]            # not ours to remove


def test_of_two_jobs_that_see_a_stale_lock_one_takes_it(tmp_path, monkeypatch):
    write(tmp_path, pid=2 ** 22 + 1)
    first, second = lock.FolderLock(tmp_path), lock.FolderLock(tmp_path)
    second.mine["pid"] = first.mine["pid"] + 1              # of names
    right = lock.FolderLock.lives

    def lives(one, owner):
        """The first job takes the lock between what the second one sees and what it does."""
        found = right(one, owner)
        if one is second and not found:
            assert "which has ended" in first.acquire()
        return found
    monkeypatch.setattr(lock.FolderLock, "lives", lives)
    with pytest.raises(InputError, match=f"found the lock of process {os.getpid()} on "):
        second.acquire()
    first.require_own()
    first.release()
    assert not os.listdir(tmp_path)


def test_what_is_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "WRITING", 0.1)
    path = tmp_path / "lock.json"
    path.mkdir()
    with pytest.raises(InputError, match="lock.json: found a folder, expected a lock, or nothing$"):
        lock.FolderLock(tmp_path).acquire()
    path.rmdir()
    for make in (lambda: path.write_text("[" * 60_000), lambda: os.mkfifo(path),
                 lambda: path.symlink_to("/dev/zero"), lambda: path.write_text("9" * 60_000)):
        make()
        mine = lock.FolderLock(tmp_path)
        assert "which has ended" in mine.acquire()
        mine.release()
        assert not os.listdir(tmp_path)
