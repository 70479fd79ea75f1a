"""Is there memory for a job? The plan is asked before anything of its size is made."""
from __future__ import annotations

import contextlib
import platform

from ..comm.group import TensorParallelGroup
from ..errors import InputError
from ..plan.job import Job, Layout
from ..plan.outcome import memory, smallest_that_fits

CGROUP = "/sys/fs/cgroup/memory.max"
GIB = 2 ** 30
NEEDED_FOR = {"load": ["weights"], "train": ["weights", "gradients", "optimizer"],
              "decode": ["weights", "keys", "values"], "score": ["weights"]}


def require_room(group: TensorParallelGroup, subject: str, job: Job, tensor: TensorParallelGroup | None = None) -> None:
    """Raise InputError on every rank where a host's memory cannot hold what its ranks need. Collective.

    The page cache counts as free, as the kernel gives it up. On a GPU, whose memory is another one, nothing is asked.

    Parameters
    ----------
    group : TensorParallelGroup
        All ranks.
    subject : str
        What begins the message.
    job : Job
        What they are about to do.
    tensor : TensorParallelGroup, optional
        The ranks that share a copy of the model; None: all.

    Raises
    ------
    InputError
        With the smallest number of ranks, as many on a host as now, that such hosts have the memory for.
    """
    if group.device != "cpu":
        return
    tensor = tensor or group
    layout = Layout(tensor.size, group.size // tensor.size, tensor.blocks if tensor.reproducible else None)
    of_ranks = group.comm.allgather((platform.node(), memory(job, layout)[1][tensor.rank], free_bytes()))
    for host in dict.fromkeys(host for host, _, _ in of_ranks):
        needed = [size for other, size, _ in of_ranks if other == host]
        free = min((free for other, _, free in of_ranks if other == host and free is not None), default=None)
        if free is not None and sum(needed) > free:
            here, kept = len(needed), job.dtype if job.weights == "float32" else job.weights
            enough = smallest_that_fits(job, free, here, layout)
            remedy = f"{enough} ranks, {here} a host, would do" if enough else "no number of ranks needs as little"
            raise InputError(f"{subject}: found {free / GIB:.1f} GiB of memory free on {host}, expected "
                             f"{sum(needed) / GIB:.1f} GiB for the {kept} {needed_for(job)} of the "
                             f"{here} rank{'s' if here > 1 else ''} there ({remedy})")


def needed_for(job: Job) -> str:
    """Return what a job needs memory for, in words."""
    words = NEEDED_FOR[job.kind] + (["activations"] if job.kind != "load" else [])
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def free_bytes() -> int | None:
    """Return the bytes that this process could have, swap space included; None where that is not known."""
    found = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in file}
        found.append(sizes["MemAvailable"] + sizes["SwapFree"])
    with contextlib.suppress(OSError, ValueError), open(CGROUP, encoding="ascii") as file:
        found.append(int(file.read()))          # "max": no limit
    with contextlib.suppress(ImportError, OSError):
        import resource                         # not everywhere
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            found.append(limit)
    return min(found, default=None)
