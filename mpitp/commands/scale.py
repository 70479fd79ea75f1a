"""Time the blocks on growing numbers of ranks, one job after the other: strong and weak scaling.

Start it once, without mpirun: it starts the ranks itself, with `mpirun -n P`, in a Slurm job with `srun -n P`, or with
the words of --launcher or MPITP_LAUNCHER.

    strong   the same work on more ranks: P times as fast would be 100%
    weak     as many tokens a rank on more ranks: 100% would be the same time

What each job runs is `bench ffn block decode` with the options given here. Beside each time stands what `plan` says:
of the machine at hand where `bench --calibrate` was run on it, of --machine, or, with --calibrate, of each number of
ranks as it was measured just before.
"""
import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from .. import __version__, tables
from ..comm.launch import THREAD_VARIABLES, usable_cores
from ..comm.launch import launcher as started_by
from ..errors import InputError, require, require_positive
from ..plan.machine import Machine
from ..plan.machine_file import read_machine
from .bench_page import read_report
from .pictures import require_picture
from .progress import Progress
from .scale_plan import Predictions

KINDS = ("strong", "weak")
BENCHES = ("ffn", "block", "decode")
# What a launcher tells its processes: a job that is started here is not part of another one.
OF_A_LAUNCHER = ("PMI", "PMIX", "OMPI_", "PRTE", "MPI_LOCAL", "HYDRA", "HYDI", "MPIR")
STOP_SECONDS = 10          # that a launcher has to end its ranks
SETTINGS = ("OMPI_ALLOW", "OMPI_MCA", "PRTE_MCA", "PMIX_MCA")


@dataclass
class Point:
    """One row of bench on one number of ranks.

    efficiency is T1 / (P/P1 TP) in strong scaling, T1 / TP in weak scaling, where T1 is the time of the smallest number
    of ranks P1. planned_seconds is what the plan says, None where it knows no such machine.
    """
    kind: str
    bench: str
    case: str
    ranks: int
    tokens: int
    median_seconds: float
    least_seconds: float
    most_seconds: float
    efficiency: float
    planned_seconds: float | None = None


@dataclass
class Study:
    """Everything that is printed and written."""
    mpitp: str
    machine: str
    mpi: str
    launcher: str
    threads: int
    options: list[str]
    planned: str
    points: list[Point]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="*", help=f"{', '.join(BENCHES)} (all)")
    parser.add_argument("--ranks", default="1,2,4", metavar="P,...", help="numbers of ranks, ascending (1,2,4)")
    parser.add_argument("--scaling", default="strong,weak", metavar="KIND,...", help="strong, weak (both)")
    parser.add_argument("--launcher", metavar="WORDS", help="what starts ranks, before -n P (MPITP_LAUNCHER; srun in a "
                        "Slurm job, else mpirun)")
    parser.add_argument("--threads", type=int, metavar="N", help="BLAS threads a rank, the same for all numbers of "
                        "ranks (the cores here over the largest of them)")
    parser.add_argument("--limit", type=float, default=600, metavar="S", help="seconds that one job may take (600)")
    parser.add_argument("--hidden-size", type=int, default=1024, metavar="D", help="of the blocks (1024)")
    parser.add_argument("--num-attention-heads", type=int, default=8, metavar="H", help="of block, decode (8)")
    parser.add_argument("--seq-length", type=int, default=256, metavar="S", help="tokens; of weak scaling, on the "
                        "smallest number of ranks (256)")
    parser.add_argument("--rounds", type=int, default=9, help="how many times each is timed (9)")
    parser.add_argument("--dtype", default="float32", help="float32 (the default), float64; on a GPU 16-bit ones too")
    parser.add_argument("--device", default="cpu", help="cpu (NumPy, the default) or gpu (CuPy)")
    parser.add_argument("--machine", metavar="FILE|NAME", help="plan the times for this machine, as `plan --machine` "
                        "does")
    parser.add_argument("--calibrate", action="store_true", help="calibrate each number of ranks first, for the plan: "
                        "minutes each")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", metavar="FILE.png", help="draw them (needs matplotlib: pip install 'mpitp[plot]')")


def run(arguments: argparse.Namespace) -> int:
    """Run the study; returns 0."""
    ranks, kinds = check_arguments(arguments)
    words = launcher_words(arguments.launcher, arguments.threads)
    predictions = Predictions(arguments, lambda size: calibrated(words, size, arguments))
    points: list[Point] = []
    report: dict[str, Any] = {}
    with Progress("scale", len(kinds) * len(ranks)) as bar:
        for kind, size in product(kinds, ranks):
            bar.what = f"{kind} scaling, {tables.count(size, 'rank')}"
            predictions.machine_for(size)
            tokens = arguments.seq_length * (size // ranks[0] if kind == "weak" else 1)
            report = run_job(words, size, tokens, arguments)
            points += points_of(report, kind, points)
            for point in points:
                if point.ranks == size and point.kind == kind:
                    point.planned_seconds = predictions.seconds(point.bench, point.case, size, tokens)
            bar.advance()
    study = Study(__version__, report["machine"], report["mpi"], shlex.join(words), arguments.threads,
                  options_of(arguments), predictions.note, points)
    print("\n".join(lines(study)), flush=True)
    if arguments.json:
        tables.write_json(arguments.json, "mpitp.scale/1", study)
    if arguments.plot:
        from .plots import draw_scaling
        draw_scaling(arguments.plot, tables.plain(study))
    return 0


def check_arguments(arguments: argparse.Namespace) -> tuple[list[int], list[str]]:
    """Return the numbers of ranks and the kinds of scaling. Raises InputError for what cannot be run or drawn."""
    name, size = started_by()
    require(size == 1, f"{size} ranks started by {name}", "scale without a launcher: it starts the ranks itself")
    unknown = [what for what in arguments.what if what not in BENCHES]
    require(not unknown, f"bench {', '.join(unknown)}", f"one of {', '.join(BENCHES)}")
    parts = arguments.ranks.split(",")
    require(all(part.isdigit() and int(part) for part in parts), f"--ranks {arguments.ranks}", "numbers such as 1,2,4")
    ranks, kinds = list(map(int, parts)), arguments.scaling.split(",")
    require(ranks == sorted(set(ranks)), f"--ranks {arguments.ranks}", "ascending numbers, each once")
    require(set(kinds) <= set(KINDS), f"--scaling {arguments.scaling}", "strong, weak, or both with a comma between")
    require("strong" in kinds or set(arguments.what or BENCHES) != {"decode"}, "weak scaling of decode alone",
            "another bench beside it: one token is not divided over ranks")
    require_positive(hidden_size=arguments.hidden_size, seq_length=arguments.seq_length, rounds=arguments.rounds,
                     num_attention_heads=arguments.num_attention_heads)
    if arguments.threads is None:
        arguments.threads = max(1, usable_cores() // ranks[-1])
    require_positive(threads=arguments.threads)
    require(arguments.limit > 0, f"--limit {arguments.limit}", "seconds above 0")
    if arguments.plot:
        require_picture(arguments.plot)
    if arguments.json:
        tables.require_writable(arguments.json)
    return ranks, kinds


def launcher_words(asked: str | None, threads: int) -> list[str]:
    """Return the words that start ranks: those asked for, in a Slurm job srun with a core a thread, else mpirun."""
    words = shlex.split(asked or os.environ.get("MPITP_LAUNCHER", ""))
    in_slurm = ["srun", "--overlap", f"--cpus-per-task={threads}"]
    return words or (in_slurm if "SLURM_JOB_ID" in os.environ else ["mpirun"])


def shared_folder() -> tempfile.TemporaryDirectory:
    """Return a folder that this process and rank 0 see; in a Slurm job, whose /tmp may be another's, one beside us."""
    return tempfile.TemporaryDirectory(prefix=".mpitp-scale-", dir="." if "SLURM_JOB_ID" in os.environ else None)


def options_of(arguments: argparse.Namespace) -> list[str]:
    """Return the options of bench that are the same for all jobs."""
    return [f"--hidden-size={arguments.hidden_size}", f"--num-attention-heads={arguments.num_attention_heads}",
            f"--rounds={arguments.rounds}", f"--dtype={arguments.dtype}", f"--device={arguments.device}"]


def run_job(words: list[str], ranks: int, tokens: int, arguments: argparse.Namespace) -> dict:
    """Run bench on so many ranks; returns its report. Raises InputError, with what the job said, where it fails."""
    with shared_folder() as folder:
        path = Path(folder, "bench.json")
        run_bench(words, ranks, arguments, [*(arguments.what or BENCHES), *options_of(arguments),
                                            f"--seq-length={tokens}", f"--json={path}"], path)
        return read_report(str(path))


def calibrated(words: list[str], ranks: int, arguments: argparse.Namespace) -> Machine:
    """Return this machine as so many ranks of it were measured. Raises InputError as run_job."""
    with shared_folder() as folder:
        path = Path(folder, "machine.json")
        run_bench(words, ranks, arguments, [f"--calibrate={path}", f"--dtype={arguments.dtype}"], path)
        return read_machine(str(path))


def run_bench(words: list[str], ranks: int, arguments: argparse.Namespace, options: list[str], path: Path) -> None:
    """Run bench with these options on so many ranks, which is to write `path`."""
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(OF_A_LAUNCHER) or name.startswith(SETTINGS)}
    environment |= dict.fromkeys(THREAD_VARIABLES, str(arguments.threads))
    command = [*words, "-n", str(ranks), sys.executable, "-m", "mpitp", "bench", *options]
    try:
        job = subprocess.Popen(command, env=environment, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    except FileNotFoundError:
        raise InputError(f"found no {words[0]}, expected a launcher: --launcher WORDS") from None
    with job:
        try:
            output, errors = job.communicate(timeout=arguments.limit)
        except BaseException as error:
            stop(job)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise InputError(f"found {tables.count(ranks, 'rank')} still at work after {arguments.limit:g} seconds, "
                             f"expected an end: --limit") from None
    what = shlex.join(command[:len(words) + 2])
    if job.returncode:
        said = (errors.strip() or output.strip() or "nothing").splitlines()[-1]
        raise InputError(f"{what}: found exit status {job.returncode}, expected 0; it said: {said}")
    require(path.exists(), f"{what}: no report in {path.parent}", "a folder that rank 0 shares: TMPDIR=FOLDER")


def stop(job: subprocess.Popen) -> None:
    """End a launcher and what it started: killed at once, it could not end its ranks."""
    job.terminate()
    try:
        job.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        job.kill()


def points_of(report: dict, kind: str, before: list[Point]) -> list[Point]:
    """Return the points of one job; `before`, those of smaller numbers of ranks, have what they are measured by."""
    points = []
    for row in report["rows"]:
        is_token = row["bench"] == "decode" or "token" in row["case"]
        if row["share_of_limit"] is None or "products" in row["case"] or row["bench"] not in BENCHES or \
                is_token and kind == "weak":
            continue                                        # limits are not layers, and one token is not divided
        first = next((point for point in before if (point.kind, point.bench, point.case)
                      == (kind, row["bench"], row["case"])), None)
        base_seconds = first.median_seconds if first else row["median_seconds"]
        grown = report["ranks"] / first.ranks if first and kind == "strong" else 1
        points.append(Point(kind, row["bench"], row["case"], report["ranks"], report["tokens"], row["median_seconds"],
                            row["least_seconds"], row["most_seconds"], base_seconds / (grown * row["median_seconds"])))
    return points


def lines(study: Study) -> Iterator[str]:
    """Return the lines that people read."""
    yield f"mpitp {study.mpitp}, {study.mpi}, {study.launcher}; {tables.count(study.threads, 'thread')} a rank"
    yield study.machine
    yield f"bench {' '.join(study.options)}"
    yield study.planned
    yield "Look at `efficiency`: to 100% is missing communication, and what does not shrink with the share."
    for kind in dict.fromkeys(point.kind for point in study.points):
        yield ""
        yield from tables.table((f"{kind} scaling", "ranks", "tokens", "median", "fastest", "slowest", "efficiency",
                                 "planned", "of median"), [
            (f"{point.bench} {point.case}", str(point.ranks), str(point.tokens), tables.seconds(point.median_seconds),
             tables.seconds(point.least_seconds), tables.seconds(point.most_seconds), f"{point.efficiency:.0%}",
             *planned(point))
            for point in sorted((p for p in study.points if p.kind == kind), key=lambda p: (p.bench, p.case, p.ranks))])


def planned(point: Point) -> tuple[str, str]:
    """Return the planned time, and how many times the measured one it is."""
    if point.planned_seconds is None:
        return "-", "-"
    return tables.seconds(point.planned_seconds), f"{point.planned_seconds / point.median_seconds:.2f}"
