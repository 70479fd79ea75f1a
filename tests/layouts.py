"""One SHA-256 of a training run over many layouts: ranks, data x tensor grids, cuts of the global batch.

    python tests/layouts.py [PYTHON...] [--write] [--steps 30] [--few] [--go-on FILE] [--run-nothing]

Trains the same small decoder, with dropout, for 30 steps in each layout by `python -m mpitp train --reproducible`,
under the MPI of each PYTHON's environment (this one's, where none is named), and prints the SHA-256 over its weights,
the state of its optimizer, its settings, and all its losses. Exits with 1 where two differ. --write puts the table
into docs/same_bits.md; --few takes a few layouts. --go-on FILE keeps what is done, MPI by MPI, and goes on from there;
with --run-nothing the table is of what is kept.
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


class Results:
    """The digests of layouts under each MPI, kept in a file, so that a run goes on where it was ended.

    A file whose digests are another machine's or another source's is of no use: the first layout is run each time, and
    what was kept under this MPI counts if its digest is the same.
    """

    def __init__(self, file=None):
        self.file = file and Path(file)
        self.found = json.loads(self.file.read_text()) if self.file and self.file.exists() else {}

    def keep(self):
        """Write the file, whole or not at all."""
        if self.file:
            new = self.file.with_suffix(".new")
            new.write_text(json.dumps(self.found, indent=1))
            new.replace(self.file)

    def of_mpi(self, name, steps):
        """{layout as text: digest} of one MPI and so many steps."""
        return self.found.setdefault(f"{name}, {steps} steps", {})

    def complete(self, python, layouts, steps):
        """Run what is missing under one MPI; yields (layout, digest, whether it was kept)."""
        name = mpi_of(python)
        known = self.of_mpi(name, steps)
        for number, layout in enumerate(layouts):
            key = " ".join(map(str, layout.cells()))
            kept = number > 0 and key in known
            if not kept:
                digest_now = train(python, layout, steps)
                if known.get(key, digest_now) != digest_now:
                    known.clear()
                known[key] = digest_now
                self.keep()
            yield layout, known[key], kept

    def rows(self, names, layouts, steps):
        """The cells of each layout's row: its own, and the digest under each MPI, None where it was not run."""
        return [[*layout.cells(), *(self.of_mpi(name, steps).get(" ".join(map(str, layout.cells()))) for name in names)]
                for layout in layouts]


def hashes_of(rows):
    """The different digests of some rows."""
    return {cell for row in rows for cell in row[4:] if cell}


def title(rows, names, steps):
    """What the table shows, in words."""
    counts = [sum(row[4 + number] is not None for row in rows) for number in range(len(names))]
    most = max(counts)
    whole = " and ".join(name for name, count in zip(names, counts) if count == most)
    part = "".join(f", and {count} of them with {name}" for name, count in zip(names, counts) if 0 < count < most)
    hashes = len(hashes_of(rows))
    return f"{most} layouts, {steps} steps each, with {whole}{part}; {hashes} hash{'' if hashes == 1 else 'es'}"


def write(page, rows, names, steps):
    """Put the table of what was run into a page, between the two marks."""
    text = page.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    rows = [row for row in rows if any(row[4:])]
    lines = [f"{title(rows, names, steps)}:", "",
             "| ranks | data x tensor | micro-batches x sequences | options | SHA-256 |",
             "| ---: | --- | --- | --- | --- |"]
    for row in rows:
        lines.append("| " + " | ".join([*row[:4], " ".join(f"`{value[:16]}`" for value in sorted(hashes_of([row])))])
                     + " |")
    page.write_text("\n".join([f"{before}{BEGIN}", "", *lines, "", f"{END}{after}"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", default=[sys.executable])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--go-on", metavar="FILE")
    parser.add_argument("--run-nothing", action="store_true")
    arguments = parser.parse_args()
    layouts, results = FEW if arguments.few else LAYOUTS, Results(arguments.go_on)
    for python in () if arguments.run_nothing else arguments.pythons:
        print(mpi_of(python), flush=True)
        for layout, found, kept in results.complete(python, layouts, arguments.steps):
            print("  ".join(cell.ljust(6) for cell in (*layout.cells(), found)), "kept" * kept, flush=True)
    names = list(map(mpi_of, arguments.pythons))
    rows = results.rows(names, layouts, arguments.steps)
    found = hashes_of(rows)
    print(f"{sum(any(row[4:]) for row in rows)} layouts, {len(found)} hash{'' if len(found) == 1 else 'es'}")
    if arguments.write:
        write(PAGE, rows, names, arguments.steps)
    return int(len(found) > 1)


if __name__ == "__main__":
    sys.exit(main())
