"""One SHA-256 of a training run over many layouts: ranks, data x tensor grids, cuts of the global batch.

    python tests/layouts.py [PYTHON...] [--write] [--steps 30] [--few]

Trains the same small decoder, with dropout, for 30 steps in each layout by `python -m mpitp train --reproducible`,
under the MPI of each PYTHON's environment (this one's, where none is named), and prints the SHA-256 over its weights,
the state of its optimizer, its settings, and all its losses. Exits with 1 where two differ. --write puts the table
into docs/same_bits.md; --few takes a few layouts.
"""
import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent / "support"))

from spmd import ROOT, job_environment

PAGE, BEGIN, END = ROOT / "docs" / "same_bits.md", "<!-- layouts -->", "<!-- end of layouts -->"
SEQUENCES = 5           # of a global batch, which no number of data ranks but 5 divides
RUN = ("--hidden-size", 20, "--num-layers", 1, "--num-attention-heads", 5, "--num-query-groups", 1,
       "--seq-length", 16, "--hidden-dropout", 0.1, "--attention-dropout", 0.1, "--eval-interval", 0,
       "--eval-batches", 1, "--data", ROOT / "tests" / "data" / "golden_decoder.json", "--reproducible")


class Layout(NamedTuple):
    """How a run is spread: copies of the model, ranks of each, sequences of a micro-batch, options of the command."""
    data: int
    tensor: int
    micro_batch: int = SEQUENCES
    more: tuple = ()

    @property
    def ranks(self):
        return self.data * self.tensor

    @property
    def micro_batches(self):
        return SEQUENCES // self.micro_batch

    def cells(self):
        """The cells of its row."""
        return (f"{self.ranks}", f"{self.data} x {self.tensor}", f"{self.micro_batches} x {self.micro_batch}",
                " ".join(map(str, self.more)).replace("--", ""))


GRIDS = [(1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (4, 1), (1, 4), (3, 2), (2, 3), (6, 1), (1, 6), (2, 4), (4, 2),
         (8, 1), (1, 8)]
ROWS, BLOCK, HEADS = ("--sequence-parallel",), ("--recompute", "block"), ("--recompute", "attention")
OTHERS = [Layout(1, 1, 1, BLOCK), Layout(1, 2, SEQUENCES, ROWS), Layout(1, 3, 1, ROWS + BLOCK),
          Layout(2, 2, SEQUENCES, ROWS), Layout(2, 2, 1, BLOCK), Layout(2, 3, 1, ROWS + HEADS),
          Layout(3, 2, SEQUENCES, HEADS), Layout(1, 8, SEQUENCES, ROWS)]
LAYOUTS = [Layout(data, tensor, (SEQUENCES, 1)[number % 2]) for number, (data, tensor) in enumerate(GRIDS)] + [
    Layout(1, 1, 1), Layout(2, 3, SEQUENCES)] + OTHERS
FEW = [Layout(1, 1), Layout(2, 1, 1), Layout(2, 2), Layout(1, 3, SEQUENCES, ROWS + BLOCK)]


def digest(folder, steps):
    """SHA-256 of the last step folder's files and of all losses."""
    whole = hashlib.sha256()
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        whole.update((folder / f"step-{steps:08d}" / name).read_bytes())
    for line in (folder / "log.jsonl").read_text().splitlines():
        figures = json.loads(line)
        del figures["seconds"]
        whole.update(json.dumps(figures, sort_keys=True).encode())
    return whole.hexdigest()


def train(python, layout, steps):
    """Train in one layout, under the MPI beside this Python; returns the digest."""
    launcher = Path(python).parent / "mpirun"
    with tempfile.TemporaryDirectory() as folder:
        command = [launcher if launcher.exists() else "mpirun", "-n", layout.ranks, python, "-m", "mpitp", "train",
                   *RUN, "--train-iters", steps, "--data-parallel", layout.data, "--micro-batch-size",
                   layout.micro_batch, "--gradient-accumulation", layout.micro_batches, "--out", folder, *layout.more]
        done = subprocess.run(list(map(str, command)), env=job_environment(), cwd=ROOT, text=True, capture_output=True)
        if done.returncode:
            raise SystemExit(f"{layout}: {done.stdout}{done.stderr}")
        return digest(Path(folder), steps)


def mpi_of(python):
    """The name of the MPI library that a Python's mpi4py uses."""
    code = "from mpi4py import MPI; name, version = MPI.get_vendor(); print(name, '.'.join(map(str, version)))"
    return subprocess.run([python, "-c", code], env=job_environment(), text=True, capture_output=True).stdout.strip()


def rows_of(pythons, layouts, steps):
    """Yield the cells of each layout's row: its own, and the digest under each MPI."""
    for layout in layouts:
        yield [*layout.cells(), *(train(python, layout, steps) for python in pythons)]


def write(page, rows, pythons, steps):
    """Put the table into a page, between the two marks."""
    text = page.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    names = " and ".join(map(mpi_of, pythons))
    hashes = {cell for row in rows for cell in row[4:]}
    lines = [f"{len(rows)} layouts, {steps} steps each, with {names}; {len(hashes)} hash"
             f"{'' if len(hashes) == 1 else 'es'}:", "",
             "| ranks | data x tensor | micro-batches x sequences | options | SHA-256 |",
             "| ---: | --- | --- | --- | --- |"]
    for row in rows:
        found = sorted(set(row[4:]))
        lines.append("| " + " | ".join([*row[:4], " ".join(f"`{value[:16]}`" for value in found)]) + " |")
    page.write_text("\n".join([f"{before}{BEGIN}", "", *lines, "", f"{END}{after}"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", default=[sys.executable])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for row in rows_of(arguments.pythons, FEW if arguments.few else LAYOUTS, arguments.steps):
        rows.append(row)
        print("  ".join(cell.ljust(6) for cell in row), flush=True)
    found = {cell for row in rows for cell in row[4:]}
    print(f"{len(rows)} layouts, {len(found)} hash{'' if len(found) == 1 else 'es'}")
    if arguments.write:
        write(PAGE, rows, arguments.pythons, arguments.steps)
    return int(len(found) > 1)


if __name__ == "__main__":
    sys.exit(main())
