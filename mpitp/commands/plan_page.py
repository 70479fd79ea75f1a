"""What `plan` prints: memory and time by number of ranks, as tables, and the verdict."""
from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from .. import tables
from ..config import DecoderConfig
from ..errors import printable
from ..plan.outcome import OfRanks
from . import WIDTH

# What a rank holds: (heading, kinds of arrays).
COLUMNS = (("weights", ("weights", "master weights")), ("gradients", ("gradients", "more gradients")),
           ("optimizer", ("exp_avg", "exp_avg_sq")), ("keys, values", ("keys", "values")),
           ("other", ("cos", "sin", "slopes")), ("transient", ("transient",)))
NAMES = {"step": "training step", "prefill": "prefill", "token": "token", "window": "window"}


@dataclass
class PlanReport:
    """Everything that is written of a plan.

    Attributes
    ----------
    model : str
        Its folder or file, or "options".
    parameters : int
        Numbers, in all.
    machine, machine_source : str
        What the times are of.
    jobs : list of JobReport
    """
    model: str
    config: DecoderConfig
    parameters: int
    dtype: str
    machine: str
    machine_source: str
    host_memory_bytes: int
    ranks_per_host: int
    device: str
    jobs: list[JobReport]


@dataclass
class JobReport:
    """What one kind of job takes on each number of ranks, and which number is best."""
    kind: str
    batch: int
    tokens: int
    new_tokens: int
    accumulation: int
    of_ranks: list[OfRanks]
    fastest_ranks: int | None
    cheapest_ranks: int | None
    why: str
    sequence_parallel: bool
    gather_again: bool
    recompute: str | None


def lines(report: PlanReport, note: str) -> Iterator[str]:
    """Yield the lines that people read."""
    config = report.config
    yield f"{printable(report.model)}: {report.parameters:,} parameters, " \
          f"{tables.count(config.num_layers, 'layer')} of {config.hidden_size} features, {report.dtype}"
    yield f"on {report.machine}: {tables.count(report.ranks_per_host, 'rank')} and " \
          f"{tables.size(report.host_memory_bytes)} a host"
    if note:
        yield f"({note})"
    for job in report.jobs:
        yield ""
        yield from of_job(report, job)


def of_job(report: PlanReport, job: JobReport) -> Iterator[str]:
    """Yield the lines of one job."""
    sequences = tables.count(job.batch, "sequence")
    if job.kind == "train":
        micro = f", {job.accumulation} times a step" if job.accumulation > 1 else ""
        modes = ", rows of the tokens on each rank" if job.sequence_parallel else ""
        modes += ", gathered again" if job.gather_again else ""
        modes += f", {job.recompute} recomputed" if job.recompute else ""
        yield f"Training: {sequences} of {job.tokens} tokens{micro}{modes}"
    else:
        yield f"Generation: {sequences} of {job.tokens} tokens, and {job.new_tokens} new ones"
    yield "Look at `a host`: where it does not fit, the times are those of a larger host."
    columns = [(head, kinds) for head, kinds in COLUMNS if any(of.bytes_of.get(kind) for of in job.of_ranks
                                                               for kind in kinds)]
    yield from tables.table(
        ("ranks", *(["tensor x data"] if any(of.data > 1 for of in job.of_ranks) else []),
         *(head for head, _ in columns), "a rank", "a host", "fits"),
        [(of.ranks, *([f"{of.tensor} x {of.data}"] if any(of.data > 1 for of in job.of_ranks) else []),
          *(tables.size(sum(of.bytes_of.get(kind, 0) for kind in kinds)) for _, kinds in columns),
          tables.size(of.rank_bytes), tables.size(of.host_bytes), "yes" if of.fits else "NO") for of in job.of_ranks])
    for index, phase in enumerate(job.of_ranks[0].phases):
        yield ""
        yield from tables.table(
            ("ranks", "products", "memory", "messages", "Python", NAMES[phase.name], "calls", "sent by a rank"),
            [time_row(of, index) for of in job.of_ranks])
    yield ""
    yield from verdict(job)


def time_row(of: OfRanks, index: int) -> tuple:
    """Return a row of the times of one phase."""
    phase = of.phases[index]
    parts = (phase.seconds_of[part] for part in ("products", "memory", "messages", "python"))
    return (of.ranks, *map(tables.seconds, parts), tables.seconds(phase.seconds), phase.messages,
            tables.size(phase.sent_bytes))


def verdict(job: JobReport) -> Iterator[str]:
    """Yield which number of ranks is the fastest and which the cheapest, and why more do not help."""
    by_number = {of.ranks: of for of in job.of_ranks}
    if job.fastest_ranks is not None and job.cheapest_ranks is not None:
        fast, cheap = by_number[job.fastest_ranks], by_number[job.cheapest_ranks]
        name = NAMES[fast.phases[-1].name]
        yield f"fastest:  {tables.count(fast.ranks, 'rank')}, {tables.seconds(fast.seconds)} a {name}"
        yield f"cheapest: {tables.count(cheap.ranks, 'rank')}, {tables.seconds(cheap.seconds * cheap.ranks)} of one " \
              f"rank's time a {name}"
    yield from textwrap.wrap(job.why, WIDTH)
