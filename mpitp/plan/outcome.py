"""What a job takes on each of several numbers of ranks: does it fit, how long, which number is best, and why."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from .. import tables
from ..arrays import compute_dtype
from ..config import DecoderConfig
from ..errors import require, require_positive
from .job import Job, Layout, layout_of
from .machine import PARTS, Machine
from .messages import Message, messages
from .tensors import Tensor, bytes_of_ranks, persistent, specs_of
from .transient import peaks
from .work import Item, work, working_bytes

MOST_RANKS = 1 << 14
PHASES = {"train": ("step",), "decode": ("prefill", "token"), "score": ("window",)}


@dataclass(frozen=True)
class Phase:
    """The time of a phase on the rank that has the most to do, by parts, and what it sends.

    Attributes
    ----------
    name : str
        "step", "prefill", "token" or "window".
    seconds : float
    seconds_of : {part: seconds}
        products, memory, messages and python; on a GPU Python counts where it is slower than the device.
    messages, sent_bytes : int
        How many collectives, and the bytes that a rank sends.
    """
    name: str
    seconds: float
    seconds_of: dict[str, float]
    messages: int
    sent_bytes: int


@dataclass(frozen=True)
class OfRanks:
    """What a job takes on one number of ranks.

    Attributes
    ----------
    ranks, tensor, data : int
        All ranks, those of a tensor group, and the groups.
    bytes_of : {kind: bytes}
        Of the fullest rank: weights, gradients and so on, and what is "transient".
    rank_bytes, host_bytes : int
        Of the fullest rank at its peak, and of all ranks of the fullest host.
    hosts : int
    fits : bool
        Whether each host has the memory.
    phases : list of Phase
    tensors : list of Tensor
        Every array that stays on the fullest rank.
    messages : list of Message
        Every collective, of all phases.
    """
    ranks: int
    tensor: int
    data: int
    bytes_of: dict[str, int]
    rank_bytes: int
    host_bytes: int
    hosts: int
    fits: bool
    phases: list[Phase]
    tensors: list[Tensor]
    messages: dict[str, list[Message]]

    @property
    def seconds(self) -> float:
        """The time that is compared: of a training step, a token, a window."""
        return self.phases[-1].seconds


def plan(job: Job, machine: Machine, ranks: Sequence[int], data: int = 1) -> list[OfRanks]:
    """Return what the job takes on each number of ranks. Raises InputError for a number that cannot be."""
    require(max(ranks) <= MOST_RANKS, f"{max(ranks)} ranks", f"at most {MOST_RANKS}")
    require(job.dtype in machine.flops_per_second, f"{job.dtype} on machine {machine.name!r}",
            f"one of {', '.join(machine.flops_per_second)}, whose products it knows")
    return [of_ranks(job, machine, layout_of(number, data)) for number in ranks]


def of_ranks(job: Job, machine: Machine, layout: Layout) -> OfRanks:
    """Return what the job takes on one layout."""
    of_kinds, most = memory(job, layout)
    fullest = max(range(layout.tensor), key=lambda rank: sum(sizes[rank] for sizes in of_kinds.values()))
    on_host = min(machine.ranks_per_host, layout.ranks)
    host_bytes = fullest_host(most, layout, on_host)
    rank_limit = machine.memory_bytes // machine.ranks_per_host if machine.device == "gpu" else machine.memory_bytes
    return OfRanks(
        layout.ranks, layout.tensor, layout.data, {kind: sizes[fullest] for kind, sizes in of_kinds.items()},
        max(most), host_bytes, machine.hosts(layout.ranks), host_bytes <= machine.memory_bytes and
        max(most) <= rank_limit, [phase_of(job, machine, layout, name, fullest) for name in PHASES[job.kind]],
        persistent(job, layout, fullest),
        {name: messages(job, layout, name) for name in PHASES[job.kind]})


def memory(job: Job, layout: Layout) -> tuple[dict[str, list[int]], list[int]]:
    """Return {kind: bytes on each rank of a tensor group}, "transient" among them, and each rank's sum."""
    found = dict(bytes_of_ranks(job, layout))
    found["transient"] = peaks(job, layout)
    return found, [sum(sizes) for sizes in zip(*found.values())]


def fullest_host(of_ranks: Sequence[int], layout: Layout, on_host: int) -> int:
    """Return the bytes of the host that has the most: ranks lie in order, tensor group after tensor group."""
    every = list(of_ranks) * layout.data
    return max(sum(every[first:first + on_host]) for first in range(0, len(every), on_host))


def phase_of(job: Job, machine: Machine, layout: Layout, name: str, rank: int) -> Phase:
    """Return the time of one phase."""
    seconds_of = parts_of_time(machine, work(job, layout, name, rank), job.dtype,
                               compute_dtype(job.dtype, job.device).itemsize, working_bytes(job, layout, name, rank),
                               name == "token")
    sent = messages(job, layout, name)
    return Phase(name, sum(seconds_of.values()), seconds_of, sum(m.calls for m in sent),
                 sum(m.sent_bytes for m in sent))


def parts_of_time(machine: Machine, items: Sequence[Item], dtype: str, itemsize: int, working_bytes: int,
                  is_token: bool) -> dict[str, float]:
    """Return {part: seconds} of some work.

    A GPU computes while Python starts the next operation; there a token is one recorded graph.
    """
    seconds_of, started = dict.fromkeys(PARTS, 0.0), 0.0
    on_gpu = machine.device == "gpu"
    for item in items:
        seconds = machine.seconds(item, dtype, itemsize, working_bytes)
        if on_gpu and machine.tables is None and item.kind != "message":
            on_device = item.count * machine.least_seconds(item, dtype, itemsize)
            started += seconds - on_device
            seconds = on_device
        seconds_of[machine.part(item, dtype, itemsize)] += seconds
    if on_gpu and machine.tables is None:
        started *= not is_token
        seconds_of["python"] = max(0.0, started - seconds_of["products"] - seconds_of["memory"])
    elif on_gpu and not is_token:               # what was measured of Python is all that it takes, messages included
        seconds_of["python"] = max(0.0, 2 * seconds_of["python"] - sum(seconds_of.values()))
    return seconds_of


# --- the verdict ------------------------------------------------------------------------------------------------------

def fastest(found: Sequence[OfRanks]) -> OfRanks | None:
    """Return the number of ranks with the shortest time of those that fit, the smallest of equal ones; None: none."""
    return min((of for of in found if of.fits), key=lambda of: (of.seconds, of.ranks), default=None)


def cheapest(found: Sequence[OfRanks]) -> OfRanks | None:
    """Return the number of ranks with the least time times ranks of those that fit; None where none fits."""
    return min((of for of in found if of.fits), key=lambda of: (of.seconds * of.ranks, of.ranks), default=None)


def why(found: Sequence[OfRanks]) -> str:
    """Return one sentence: what keeps more ranks than the fastest number from helping, or that they still would."""
    best = fastest(found)
    if best is None:
        return "None of these numbers of ranks has the memory."
    noun = {"step": "step", "token": "token", "window": "window"}[best.phases[-1].name]
    more = [of for of in found if of.ranks > best.ranks and of.fits]
    before, now = best.phases[-1].seconds_of, best.phases[-1].seconds_of
    if more:
        now = more[0].phases[-1].seconds_of
        saved, added = (sum(now[part] - before[part] for part in parts) for parts in (PARTS[:2], PARTS[2:]))
        python = " and Python" if now["python"] - before["python"] > 0.05 * added else ""
        change = f"saves {tables.seconds(-saved)}" if saved <= 0 else f"adds {tables.seconds(saved)}"
        return f"From {best.ranks} to {more[0].ranks} ranks a {noun} {change} of products and memory and adds " \
               f"{tables.seconds(added)} of messages{python}."
    largest = max(PARTS, key=lambda part: now[part])
    share = f"{now[largest] / best.seconds:.0%} of its time is {'Python' if largest == 'python' else largest}"
    before_it = [of for of in found if of.ranks < best.ranks]
    if not before_it:
        return f"{share[0].upper()}{share[1:]}."
    last = before_it[-1]
    return f"The largest number is the fastest: {share}, and {best.ranks / last.ranks:.3g} times as many ranks as " \
           f"{last.ranks} make a {noun} {last.seconds / best.seconds:.3g} times as fast."


def smallest_that_fits(job: Job, memory_bytes: int, ranks_per_host: int, layout: Layout) -> int | None:
    """Return the smallest number of ranks, so many on each host of that memory, on which the job fits; None: none does.

    The data ranks and the blocks stay those of the layout. What every rank holds whole does not become less, so there
    may be no number.
    """
    require_positive(ranks_per_host=ranks_per_host)
    low, high = 0, 1
    while not fits(job, replace(layout, tensor=high), memory_bytes, ranks_per_host):
        low, high = high, 2 * high
        if high * layout.data > MOST_RANKS:
            return None
    while high - low > 1:                                           # more ranks hold less, but for whole heads
        middle = (low + high) // 2
        enough = fits(job, replace(layout, tensor=middle), memory_bytes, ranks_per_host)
        low, high = (low, middle) if enough else (middle, high)
    return high * layout.data


def fits(job: Job, layout: Layout, memory_bytes: int, ranks_per_host: int) -> bool:
    """Return whether each host has the memory for its ranks."""
    on_host = min(layout.ranks, ranks_per_host)
    return fullest_host(memory(job, layout)[1], layout, on_host) <= memory_bytes


def parameters(config: DecoderConfig) -> int:
    """Return the number of parameters of a model."""
    return sum(prod(spec.shape) for spec in specs_of(config).values())
