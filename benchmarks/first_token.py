"""The time to the first token, from ids and from text, of two versions of mpitp in turn.

    pip install '.[mpi,text]'
    python benchmarks/first_token.py --model DIR --before TREE [--starts 9] [--ranks 2]

TREE is the source tree of another version, DIR a folder saved from the Hugging Face hub. Each start is a job of its
own, from mpirun to the first byte that it prints; the two versions follow each other, now this one first, now that one.
The ratio is the median of the ratios of neighbours, which a machine that others use disturbs least; beside it stand the
processor seconds of all processes of a job, to its end. Both versions run as installed ones do, from compiled modules,
which a first start of each, not counted, leaves in a temporary folder.
"""
import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from decode import CLEAN, TEXT, first_ids


def first_output(command, environment):
    """Return the seconds until a process writes something, and its processor seconds; it has to end well.

    It starts in the folder of its version: `python -m` takes what lies in the folder that it is started in.
    """
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    running = subprocess.Popen(list(map(str, command)), env=environment, cwd=environment["PYTHONPATH"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.read(running.stdout.fileno(), 1)
    seconds = time.perf_counter() - began
    _, err = running.communicate(timeout=600)
    if running.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{err.decode()}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", required=True)
    parser.add_argument("--before", metavar="TREE", required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--starts", type=int, default=9)
    parser.add_argument("--mpirun", default="mpirun")
    arguments = parser.parse_args()

    trees = {"before": os.path.abspath(arguments.before),
             "now": os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}
    prompts = {"ids": ["--ids", ",".join(map(str, first_ids(arguments.model)))], "text": ["--prompt", TEXT]}
    found = {(kind, version): [] for kind in prompts for version in trees}
    with tempfile.TemporaryDirectory() as compiled:
        environment = {**CLEAN, "PYTHONPYCACHEPREFIX": compiled}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for number in range(-1, arguments.starts):
            for kind, prompt in prompts.items():
                for version in sorted(trees, reverse=number % 2 == 1):
                    command = [arguments.mpirun, "-n", arguments.ranks, sys.executable, "-m", "mpitp", "generate",
                               "--model", os.path.abspath(arguments.model), "--max-new-tokens", 1, *prompt]
                    seconds = first_output(command, {**environment, "PYTHONPATH": trees[version]})
                    if number >= 0:
                        found[kind, version].append(seconds)
    for kind in prompts:
        for version in trees:
            seconds, of_processors = zip(*found[kind, version])
            print(f"  first token from {kind:<5}{version:<7}{statistics.median(seconds) * 1e3:9.1f} ms, "
                  f"{statistics.median(of_processors):.2f} processor seconds   "
                  f"({', '.join(f'{one * 1e3:.0f}' for one in seconds)})")
        ratio = statistics.median(a[0] / b[0] for a, b in zip(found[kind, "before"], found[kind, "now"]))
        print(f"  from {kind}: {ratio:.2f} times as soon as before")


if __name__ == "__main__":
    main()
