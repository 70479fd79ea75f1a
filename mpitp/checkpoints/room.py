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
    """Raise InputError on every rank where the memory of a host or a GPU cannot hold what its ranks need. Collective.

    The page cache counts as free, as the kernel gives it up. Of a GPU only what stays is asked for: weights, gradients,
    optimizer, keys and values, and not what a forward makes.

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
    tensor, on_gpu = tensor or group, group.device == "gpu"
    layout = Layout(tensor.size, group.size // tensor.size, tensor.blocks if tensor.reproducible else None)
    of_kinds, most = memory(job, layout)
    needs = most[tensor.rank] - on_gpu * of_kinds["transient"][tensor.rank]
    of_ranks = group.comm.allgather((*free_on_gpu(group), needs) if on_gpu else (platform.node(), free_bytes(), needs))
    for place in dict.fromkeys(place for place, _, _ in of_ranks):
        needed = [size for other, _, size in of_ranks if other == place]
        free = min((free for other, free, _ in of_ranks if other == place and free is not None), default=None)
        if free is not None and sum(needed) > free:
            here, kept = len(needed), job.dtype if job.weights == "float32" else job.weights
            enough, a_place = smallest_that_fits(job, free, here, layout), "GPU" if on_gpu else "host"
            remedy = f"{enough} ranks, {here} a {a_place}, would do" if enough else "no number of ranks needs as little"
            raise InputError(f"{subject}: found {free / GIB:.1f} GiB of memory free on {place}, expected "
                             f"{sum(needed) / GIB:.1f} GiB for the {kept} {needed_for(job, on_gpu)} of the "
                             f"{here} rank{'s' if here > 1 else ''} there ({remedy})")


def free_on_gpu(group: TensorParallelGroup) -> tuple[str, int]:
    """Return this rank's GPU, in words, and the bytes that are free on it."""
    runtime = group.xp.cuda.runtime
    uuid = runtime.getDeviceProperties(runtime.getDevice())["uuid"].hex()
    return f"GPU {uuid} of {platform.node()}", runtime.memGetInfo()[0]


def needed_for(job: Job, on_gpu: bool) -> str:
    """Return what a job needs memory for, in words."""
    words = NEEDED_FOR[job.kind] + (["activations"] if job.kind != "load" and not on_gpu else [])
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
