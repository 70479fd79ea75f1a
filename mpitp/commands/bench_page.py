"""What `bench` prints and writes: its rows as a table, as JSON and as CSV; and reports read back to be drawn."""
import csv
from collections.abc import Iterator
from dataclasses import dataclass

from .. import tables
from ..checkpoints.json_files import read_json
from ..errors import require
from . import report


@dataclass
class Row:
    """One thing that was timed, in seconds of one call.

    share_of_limit is the time that it cannot beat over its own, the median over the rounds.
    """
    bench: str
    case: str
    bytes: int | None
    flops: int | None
    median_seconds: float
    least_seconds: float
    most_seconds: float
    bytes_per_second: float | None = None
    flops_per_second: float | None = None
    share_of_limit: float | None = None


@dataclass
class Fit:
    """The time of a collective as alpha + beta n, for n bytes: latency, and seconds of one more byte."""
    operation: str
    alpha_seconds: float
    beta_seconds_per_byte: float


@dataclass
class BenchReport(report.Report):
    """Everything that is printed and written of one run."""
    device: str                 # "cpu", or the GPU's name and the transport
    dtype: str
    hidden_size: int
    ffn_hidden_size: int
    tokens: int
    rounds: int
    rows: list[Row]
    fits: list[Fit]


def lines(result: BenchReport) -> Iterator[str]:
    """Return the lines that people read."""
    ranks, cores = tables.count(result.ranks, "rank"), tables.count(result.cores_per_rank, "core")
    yield f"mpitp {result.mpitp}: {ranks}, {cores} a rank, {result.mpi}"
    yield result.machine if result.device == "cpu" else f"{result.machine}; {result.device}"
    yield f"{result.hidden_size} -> {result.ffn_hidden_size} -> {result.hidden_size}, {result.tokens} tokens, " \
          f"{result.dtype}; {result.rounds} interleaved rounds"
    yield "Look at `of limit`: 100% is the time of the bare products, of reading the weights once,"
    yield "or in which neighbours exchange as many bytes as a rank sends."
    for bench in dict.fromkeys(r.bench for r in result.rows):
        yield ""
        yield from tables.table(
            (bench, "size", "median", "fastest", "slowest", "rate", "of limit"),
            [(r.case, tables.size(r.bytes) if r.bytes else "-", tables.seconds(r.median_seconds),
              tables.seconds(r.least_seconds), tables.seconds(r.most_seconds), rate(r),
              f"{r.share_of_limit:.1%}" if r.share_of_limit else "-") for r in result.rows if r.bench == bench])
    if result.fits:
        yield ""
        yield "As alpha + beta n for n bytes: alpha is latency, 1/beta the rate that large arrays approach."
        yield from tables.table(("allreduce", "alpha", "1/beta"), [
            (fit.operation, tables.seconds(fit.alpha_seconds), tables.rate(1 / fit.beta_seconds_per_byte))
            for fit in result.fits])


def rate(found: Row) -> str:
    """Return the rate of a row in its unit."""
    if found.bytes_per_second:
        return tables.rate(found.bytes_per_second)
    return f"{found.flops_per_second / 1e9:.0f} GF/s" if found.flops_per_second else "-"


def write_csv(path: str, rows: list[Row]) -> None:
    """Write the figures as comma-separated values with a header."""
    with open(path, "w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, tables.plain(rows[0]))
        writer.writeheader()
        writer.writerows(tables.plain(r) for r in rows)


def read_report(path: str) -> dict:
    """Return a report that --json wrote. Raises InputError for any other file."""
    value = read_json(path)
    require(value.get("schema") == "mpitp.bench/1", f"no mpitp.bench/1 report in {path}",
            "a file that bench --json wrote")
    return value


def draw(path: str, reports: list[dict]) -> None:
    """Draw the reports to an image."""
    from .plots import draw_bench
    draw_bench(path, reports)
