"""The time to the first token, from ids and from text, of two versions of mpitp in turn.

    pip install '.[mpi,text]'
    python benchmarks/first_token.py --model DIR --before TREE [--starts 9] [--ranks 2]

TREE is the source tree of another version, DIR a folder saved from the Hugging Face hub. Each start is a job of its
own, from mpirun to the first byte that it prints; the two versions follow each other, now this one first, now that one.
The ratio is the median of the ratios of neighbours, which a machine that others use disturbs least.
"""
import argparse
import os
import statistics
import subprocess
import sys
import time

from decode import CLEAN, TEXT, first_ids


def first_output(command, environment):
    """Return the seconds until a process writes something; it has to end well."""
    began = time.perf_counter()
    running = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    os.read(running.stdout.fileno(), 1)
    seconds = time.perf_counter() - began
    _, err = running.communicate(timeout=600)
    if running.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{err.decode()}")
    return seconds


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
    for number in range(arguments.starts):
        for kind, prompt in prompts.items():
            for version in sorted(trees, reverse=number % 2 == 1):
                command = [arguments.mpirun, "-n", arguments.ranks, sys.executable, "-m", "mpitp", "generate",
                           "--model", arguments.model, "--max-new-tokens", 1, *prompt]
                found[kind, version].append(first_output(command, {**CLEAN, "PYTHONPATH": trees[version]}))
    for kind in prompts:
        for version in trees:
            seconds = found[kind, version]
            print(f"  first token from {kind:<5}{version:<7}{statistics.median(seconds) * 1e3:9.1f} ms   "
                  f"({', '.join(f'{one * 1e3:.0f}' for one in seconds)})")
        ratio = statistics.median(a / b for a, b in zip(found[kind, "before"], found[kind, "now"]))
        print(f"  from {kind}: {ratio:.2f} times as soon as before")


if __name__ == "__main__":
    main()
