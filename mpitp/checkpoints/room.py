"""Is there memory for what is to be loaded? Asked before anything of its size is made."""
from __future__ import annotations

import contextlib
import platform

from ..comm.group import TensorParallelGroup
from ..errors import InputError
from ..sharding.parameters import ParameterSpec
from .model_folder import ModelFolder

CGROUP = "/sys/fs/cgroup/memory.max"


def require_room(group: TensorParallelGroup, folder: ModelFolder, dtype: str, weights: str) -> None:
    """Raise InputError on every rank where a host's memory cannot hold the slices of its ranks. Collective.

    The page cache counts as free, as the kernel gives it up. On a GPU, whose memory is another one, nothing is asked.
    """
    if group.device != "cpu":
        return
    mine = sum(spec.local_bytes(group.place, kept_in(name, spec, dtype, weights)) for name, spec in
               folder.specs.items())
    of_ranks = group.comm.allgather((platform.node(), mine, free_bytes()))
    for host in dict.fromkeys(host for host, _, _ in of_ranks):
        needed = [size for other, size, _ in of_ranks if other == host]
        free = min((free for other, _, free in of_ranks if other == host and free is not None), default=None)
        if free is not None and sum(needed) > free:
            kept = dtype if weights == "float32" else weights
            raise InputError(f"{folder.checkpoint.folder}: found {free / 2 ** 30:.1f} GiB of memory free on {host}, "
                             f"expected {sum(needed) / 2 ** 30:.1f} GiB for the {kept} weights of the "
                             f"{len(needed)} rank{'s' if len(needed) > 1 else ''} there")


def kept_in(name: str, spec: ParameterSpec, dtype: str, weights: str) -> str:
    """Return the dtype of a parameter in memory, "float16" for any of 16 bits: matrices alone stay in bfloat16."""
    return "float16" if weights == "bfloat16" and is_matrix(name, spec) else dtype


def is_matrix(name: str, spec: ParameterSpec) -> bool:
    """Return whether a parameter is a matrix that layers multiply with, or look rows up in by vocabulary."""
    return len(spec.shape) == 2 and not name.startswith("position.")


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
