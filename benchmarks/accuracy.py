"""The errors of every layer for several numbers of ranks, out of `verify --all`: the table of docs/accuracy.md.

    python benchmarks/accuracy.py [--ranks 1,2,3,4,8] [--out FOLDER]

Starts `mpirun -n P python -m mpitp verify --all --json` for each P in turn, and keeps the largest error of each layer.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def verify_all(ranks: int) -> dict:
    """Run `verify --all` on so many ranks and return its report."""
    beside = Path(sys.prefix) / "bin" / "mpirun"
    launcher = str(beside) if beside.exists() else shutil.which("mpirun")
    with tempfile.TemporaryDirectory() as folder:
        report = os.path.join(folder, "report.json")
        subprocess.run([launcher, "-n", str(ranks), sys.executable, "-m", "mpitp", "verify", "--all", "--json", report],
                       check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        with open(report, encoding="utf-8") as file:
            return json.load(file)


def largest(layer: dict, key: str) -> float:
    """Return the largest `key` of a layer's results."""
    return max(result[key] for result in layer["ratios"])


def summary(reports: dict[int, dict]) -> dict:
    """Return what the table needs of {ranks: report}: the largest over the results of each layer."""
    first = next(iter(reports.values()))
    rows = {}
    for place, layer in enumerate(first["layers"]):
        of_ranks = {ranks: report["layers"][place] for ranks, report in reports.items()}
        rows[layer["title"]] = {
            "error": max(largest(found, "parallel") for found in of_ranks.values()),
            "error_dense": largest(layer, "dense"),
            "of_norm": {str(ranks): largest(found, "parallel_of_norm") for ranks, found in of_ranks.items()},
            "of_norm_dense": largest(layer, "dense_of_norm")}
    return {"schema": "mpitp.benchmark.accuracy/1", "command": "python " + " ".join(sys.argv),
            "ranks": list(reports), "dtype": first["dtype"], "machine": first["machine"], "mpi": first["mpi"],
            "rows": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2,3,4,8")
    parser.add_argument("--out", metavar="FOLDER", default=str(RESULTS))
    arguments = parser.parse_args()
    found = summary({ranks: verify_all(ranks) for ranks in map(int, arguments.ranks.split(","))})
    with open(os.path.join(arguments.out, "accuracy.json"), "w", encoding="utf-8") as file:
        json.dump(found, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
