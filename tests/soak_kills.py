"""Kill a training job again and again: python tests/soak_kills.py --kills 200 [--ranks 2] [--seed N]

A run of many steps, each of which is saved, is killed by SIGKILL (one rank, or all) at random moments, and resumed by
the same command line on 1, 2 or 3 ranks. After each kill every step folder that has its name must be whole, by its
checksums. When the run is at its end, its last folder must have the bytes of one that was never disturbed.
"""
import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / "support"), str(Path(__file__).parents[1])]

from safetensors import safe_open

from mpitp.checkpoints.checksums import window_sum
from mpitp.checkpoints.steps import checked_state, step_folder
from spmd import ROOT, job_environment, mpirun

SMALL = ("--hidden-size", 20, "--num-layers", 1, "--num-attention-heads", 5, "--seq-length", 16,
         "--micro-batch-size", 2, "--eval-interval", 0, "--eval-batches", 1, "--data", ROOT / "LICENSE",
         "--reproducible", "--save-interval", 1)


def command(ranks, out, steps):
    words = *SMALL, "--train-iters", steps, "--out", out, "--resume", "auto"
    return [*mpirun(ranks), sys.executable, "-m", "mpitp", "train", *map(str, words)]


def start(ranks, out, steps):
    return subprocess.Popen(command(ranks, out, steps), env=job_environment(MPIEXEC_TIMEOUT="600"), cwd=ROOT,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def ranks_of(out):
    """The processes that train into a folder."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
        except OSError:
            continue
        if str(out).encode() in words and b"python" in os.path.basename(words[0]):
            found.append(int(pid))
    return found


def what_is_said(running, out):
    """What a job says until its end, for which two minutes must do; the error names what is left of it by then."""
    try:
        return running.communicate(timeout=120)[1]
    except subprocess.TimeoutExpired:
        left = [f"{pid} {line[7:]}" for pid in ranks_of(out)
                for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("State:")]
        raise AssertionError(f"not over in 120 s; ranks that are left: {', '.join(left) or 'none'}") from None


def steps_in(out):
    names = os.listdir(out) if out.exists() else []
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d{8}", name))


def require_whole(out, step):
    """Raise where a step folder is not what its state.json says, each tensor read by the format's own library."""
    state = checked_state(step_folder(str(out), step), step)
    for name, tensors in state["checksums"].items():
        with safe_open(out / f"step-{step:08d}" / name, "np") as file:
            assert set(file.keys()) == set(tensors), name
            for tensor, expected in tensors.items():
                array = file.get_tensor(tensor)
                whole = tuple(slice(0, n) for n in array.shape)
                found = f"{int(window_sum(array, whole, array.shape)[0]):016x}"
                assert found == expected, f"step {step}: {tensor}: found {found}, expected {expected}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2, help="of every second job; the others have 1 to 3")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    dice, kills, runs, moments = random.Random(arguments.seed), 0, 0, {"step": 0, "write": 0, "start": 0}
    with tempfile.TemporaryDirectory() as parent:
        whole = Path(parent) / "undisturbed"
        steps = 60
        subprocess.run(command(1, whole, steps), env=job_environment(), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        while kills < arguments.kills:
            out = Path(parent) / f"run{runs}"
            runs += 1
            while steps not in steps_in(out):
                running = start(arguments.ranks if kills % 2 else dice.choice([1, 2, 3]), out, steps)
                before = steps_in(out)
                deadline = time.monotonic() + 60
                while running.poll() is None and steps_in(out)[-1:] == before[-1:] and dice.random() > 0.002:
                    assert time.monotonic() < deadline, "no step in a minute"
                    time.sleep(0.005)
                time.sleep(dice.random() * 0.3)
                found = ranks_of(out)
                if kills < arguments.kills and running.poll() is None and found:
                    kind = "write" if list(out.glob("*.partial")) else "step" if steps_in(out) != before else "start"
                    for pid in found if dice.random() < 0.3 else [dice.choice(found)]:
                        with contextlib.suppress(ProcessLookupError):       # its job has ended it meanwhile
                            os.kill(pid, signal.SIGKILL)
                    kills, moments[kind] = kills + 1, moments[kind] + 1
                said = what_is_said(running, out)
                assert running.returncode or steps in steps_in(out), said
                for step in steps_in(out):
                    require_whole(out, step)
            for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
                last = f"step-{steps:08d}/{name}"
                assert (out / last).read_bytes() == (whole / last).read_bytes(), name
            shutil.rmtree(out)
            print(f"{kills} kills, {runs} runs to their end, 0 broken folders", flush=True)
    print(f"{kills} kills ({moments['start']} before a step, {moments['step']} after one, {moments['write']} while a "
          f"folder was written): 0 broken folders, the same bytes at the end of {runs} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
