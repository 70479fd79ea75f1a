"""`train` as users run it: the same files from any number of ranks, resumed on others, killed at any moment."""
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from spmd import ROOT, job, job_environment, mpirun

pytestmark = pytest.mark.launcher
SMALL = ("--hidden-size", 20, "--num-layers", 1, "--num-attention-heads", 5, "--num-query-groups", 1,
         "--seq-length", 16, "--micro-batch-size", 2, "--eval-interval", 0, "--eval-batches", 1,
         "--data", ROOT / "tests" / "data" / "golden_decoder.json", "--reproducible")
DROPOUT = ("--hidden-dropout", 0.1, "--attention-dropout", 0.2, "--gradient-accumulation", 2)
MOMENTS = int(os.environ.get("MPITP_KILLS", "2"))


def train(ranks, out, *more, **options):
    return job(ranks, "-m", "mpitp", "train", *SMALL, "--out", out, *more, **options)


def hashes(folder):
    """{file: SHA-256} of a step folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def good(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("more", [(), DROPOUT], ids=["plain", "dropout, accumulation"])
def test_the_same_files_from_any_number_of_ranks(tmp_path, more):
    found = []
    for ranks in (1, 2, 3, 4):
        good(train(ranks, tmp_path / str(ranks), "--train-iters", 20, *more))
        found.append(hashes(tmp_path / str(ranks) / "step-00000020"))
    assert set(found[0]) == {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert found[0] == found[1] == found[2] == found[3]
    good(train(2, tmp_path / "two", "--train-iters", 20, "--save-interval", 10, *more))
    for name in os.listdir(tmp_path / "two"):
        if name == "step-00000020":                         # as if it had ended after step 10
            os.rename(tmp_path / "two" / name, tmp_path / "gone")
    done = good(train(3, tmp_path / "two", "--train-iters", 20, "--save-interval", 10, "--resume", *more))
    assert "resumed from" in done.stdout and "step 10" in done.stdout
    assert hashes(tmp_path / "two" / "step-00000020") == found[0]


def test_what_is_written(tmp_path):
    from safetensors.numpy import load_file
    good(train(2, tmp_path, "--train-iters", 7, "--save-interval", 2, "--keep", 2, "--eval-interval", 3))
    assert sorted(os.listdir(tmp_path)) == ["log.jsonl", "step-00000006", "step-00000007"]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 8))
    assert [line["step"] for line in lines if "validation_loss" in line] == [3, 6, 7]
    assert all(line["loss"] > 0 and line["gradient_norm"] > 0 and line["lr"] > 0 for line in lines)
    weights, state = (load_file(tmp_path / "step-00000007" / f"{name}.safetensors") for name in ("model", "optimizer"))
    assert weights["layers.0.attention.key.weight"].shape == (4, 20) and weights["embedding.weight"].shape == (256, 20)
    assert set(state) == {f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in weights}
    said = json.loads((tmp_path / "step-00000007" / "state.json").read_text())
    assert said["step"] == 7 and said["config"]["hidden_size"] == 20 and "ranks" not in json.dumps(said)


def test_killed_at_any_moment(tmp_path):
    """SIGKILL of one rank, or of all, while it trains and writes: what is there resumes and ends in the same file."""
    undisturbed = tmp_path / "undisturbed"
    options = ("--train-iters", 20, "--save-interval", 1)
    good(train(1, undisturbed, *options))
    expected = hashes(undisturbed / "step-00000020")
    dice = random.Random(0)
    for moment in range(MOMENTS):
        out = tmp_path / str(moment)
        command = [*mpirun(2), sys.executable, "-m", "mpitp", "train", *map(str, (*SMALL, *options)), "--out", str(out)]
        running = start(command)
        deadline = time.monotonic() + 300
        while not (out.exists() and any(re.fullmatch(r"step-\d{8}", name) for name in os.listdir(out))):
            assert time.monotonic() < deadline and running.poll() is None
            time.sleep(0.005)
        time.sleep(dice.random() * 0.3)
        ranks = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and is_rank(pid, out)]
        if ranks:
            os.kill(dice.choice(ranks), signal.SIGKILL)
        running.wait(timeout=300)                            # no rank may wait for the dead one
        if not (out / "step-00000020").exists():
            done = good(train(3, out, *options, "--resume"))
            assert "resumed from" in done.stdout
        assert hashes(out / "step-00000020") == expected
        assert not [name for name in os.listdir(out) if "partial" in name or "old" in name]


def start(command):
    return subprocess.Popen(command, env=job_environment(MPIEXEC_TIMEOUT="300"), cwd=ROOT, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)


def is_rank(pid, out):
    """Whether a process is a rank of the run into `out`."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            arguments = file.read().split(b"\0")
    except OSError:
        return False
    return str(out).encode() in arguments and b"python" in os.path.basename(arguments[0])


def test_usr1_makes_a_checkpoint(tmp_path):
    out = tmp_path / "out"
    command = [*mpirun(2), sys.executable, "-m", "mpitp", "train", *map(str, SMALL), "--train-iters", "100000", "--out",
               str(out)]
    running = start(command)
    try:
        wait_for(lambda: (out / "log.jsonl").exists(), running)
        (one, *_) = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and is_rank(pid, out)]
        os.kill(one, signal.SIGUSR1)
        wait_for(lambda: any(re.fullmatch(r"step-\d{8}", name) for name in os.listdir(out)), running)
    finally:
        for pid in os.listdir("/proc"):
            if pid.isdigit() and is_rank(pid, out):
                os.kill(int(pid), signal.SIGKILL)
        running.wait(timeout=300)


def wait_for(condition, running):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.02)


@pytest.mark.parametrize("more, said, status", [
    (("--lr", 1e30, "--clip-grad", 0), "expected finite numbers", 1),
    (("--data", "/gone"), "/gone: found No such file", 2),
    (("--seq-length", 60000), "expected at least 120002", 2),
    (("--label-smoothing", 2), "label_smoothing = 2.0", 2),
    (("--seq-length", 0), "seq_length = 0", 2),
    (("--lr", 1e39, "--lr-warmup-iters", 0, "--save-interval", 1, "--train-iters", 4), "step 1: found", 1),
    (("--vocab-size", 100), "expected 0 to 99", 2),
    (("--num-query-groups", 2), "num_query_groups = 2", 2),
    (("--resume",), "found no step folder", 2),
    (("--train-iters", 0), "train_iters = 0", 2),
    (("--out", "/dev/null/x"), "expected a folder to write to", 2),
    (("--baseline", "--vocab-size", 1000), "--baseline", 2),
])
def test_bad_input(tmp_path, more, said, status):
    done = train(2, tmp_path, *more)
    assert done.returncode == status and said in done.stderr and done.stderr.count("mpitp: ") == 1, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert not [name for name in os.listdir(tmp_path) if name.startswith("step-")]


def test_another_model_is_not_resumed(tmp_path):
    good(train(2, tmp_path, "--train-iters", 2))
    before = hashes(tmp_path / "step-00000002")
    for more, said in (((), "expected --resume or another folder"),
                       (("--resume", "--train-iters", 2), "expected a run that is not at its end"),
                       (("--resume", "--train-iters", 9), "train_iters = 2, expected 9"),
                       (("--resume", "--train-iters", 2, "--hidden-size", 40), "ffn_hidden_size = 54, expected 107"),
                       (("--resume", "--train-iters", 2, "--seed", 1), "seed = 0, expected 1"),
                       (("--resume", "--train-iters", 2, "--blocks", 3), "blocks = 8, expected 3"),
                       (("--resume", "--train-iters", 2, "--data", ROOT / "LICENSE"), "CRC-32")):
        done = train(2, tmp_path, *more)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("mpitp: ") == 1, done.stderr
    assert hashes(tmp_path / "step-00000002") == before


def test_a_full_disk(tmp_path):
    """A limit on the size of files stands for it: one line, and the last good checkpoint stays."""
    good(train(2, tmp_path, "--train-iters", 4, "--save-interval", 2))
    os.rename(tmp_path / "step-00000004", tmp_path / "later")
    limited = ("import resource, signal, sys; from mpi4py import MPI; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
               "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
               "from mpitp.comm.guard import guarded; from mpitp.commands import run_command; "
               "sys.exit(guarded(lambda: run_command(sys.argv[1:])))")
    more = "--out", tmp_path, "--train-iters", 4, "--save-interval", 2, "--resume"
    done = job(2, "-c", limited, "train", *SMALL, *more)
    assert done.returncode == 2 and "File too large" in done.stderr and done.stderr.count("mpitp: ") == 1, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["later", "log.jsonl", "step-00000002"]
    good(train(1, tmp_path, "--train-iters", 4, "--save-interval", 2, "--resume"))
    assert hashes(tmp_path / "step-00000004") == hashes(tmp_path / "later")
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]                            # none twice


def test_a_full_and_a_read_only_file_system(tmp_path):
    """A small tmpfs, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
    try:
        options = "--train-iters", 6, "--save-interval", 2, "--keep", 0
        done = train(2, disk / "run", *options)
        assert done.returncode == 2 and "No space left on device, expected room for a checkpoint" in done.stderr
        assert done.stderr.count("mpitp: ") == 1 and "Traceback" not in done.stderr
        assert sorted(os.listdir(disk / "run")) == ["log.jsonl", "step-00000002"]      # nothing of the one that failed
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for more in (("--out", disk / "run", "--resume"), ("--out", disk / "other")):
            done = job(2, "-m", "mpitp", "train", *SMALL, *options, *more)
            assert done.returncode == 2 and done.stderr.count("mpitp: ") == 1 and "Traceback" not in done.stderr
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_that_cannot_be_written(tmp_path):
    os.symlink("/dev/full", tmp_path / "log.jsonl")
    done = train(2, tmp_path, "--train-iters", 2)
    assert done.returncode == 2 and "No space left" in done.stderr and done.stderr.count("mpitp: ") == 1, done.stderr


def test_plot_and_baseline(tmp_path):
    pytest.importorskip("matplotlib")
    done = good(train(2, tmp_path / "out", "--train-iters", 5, "--plot", tmp_path / "curve.png", "--baseline"))
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "order-2 model of the same tokens" in done.stdout and "\r" not in done.stdout


def test_token_files(tmp_path):
    """Bytes that look like words are a warning, and --data-dtype says that they are."""
    words = b"".join((i * 17 % 300).to_bytes(2, "little") for i in range(3000))
    (tmp_path / "train.bin").write_bytes(words)
    done = good(train(2, tmp_path / "a", "--train-iters", 1, "--data", tmp_path / "train.bin"))
    assert done.stderr.count("warning") == 1 and "expected --data-dtype uint16 for token ids" in done.stderr
    done = good(train(2, tmp_path / "b", "--train-iters", 1, "--data", tmp_path / "train.bin", "--data-dtype", "uint16",
                      "--vocab-size", 300))
    assert not done.stderr and "2,850 tokens of" in done.stdout
    done = train(2, tmp_path / "c", "--train-iters", 1, "--data", tmp_path / "train.bin", "--data-dtype", "uint16")
    assert done.returncode == 2 and "expected 0 to 255" in done.stderr, done.stderr
