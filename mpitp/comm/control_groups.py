"""What the control groups of Linux allot to this process: cores and memory, of its job or its container.

A batch system or a container that lets several jobs share a node says so here. Pinning by a launcher does not show: it
narrows the cores that a process runs on, not those that its control group has.
"""
import contextlib
from collections.abc import Iterator

ROOT, OWN = "/sys/fs/cgroup", "/proc/self/cgroup"


def contents(name: str, root: str = ROOT, own: str = OWN) -> Iterator[str]:
    """Yield what the files of this name say, in this process's control groups of either version."""
    folders = {root: None}                          # in order, each once
    with contextlib.suppress(OSError, ValueError), open(own) as lines:
        for line in lines:
            _, controllers, path = line.rstrip("\n").split(":", 2)             # version 2 names no controllers
            for folder in (f"{root}/{controllers}{path}", f"{root}/{controllers}"):
                folders[folder.replace("//", "/").rstrip("/")] = None
    for folder in folders:
        with contextlib.suppress(OSError), open(f"{folder}/{name}") as file:
            yield file.read()


def allotted_cores(root: str = ROOT, own: str = OWN) -> int | None:
    """Return how many cores this process's control group has, None where it does not say."""
    counts = [length_of_list(text) for name in ("cpuset.cpus.effective", "cpuset.effective_cpus")
              for text in contents(name, root, own)]
    return min(filter(None, counts), default=None)


def memory_limit(root: str = ROOT, own: str = OWN) -> int | None:
    """Return the bytes that this process's control group may use, None without a limit."""
    texts = [text.strip() for name in ("memory.max", "memory.limit_in_bytes") for text in contents(name, root, own)]
    limits = [int(text) for text in texts if text.isdigit()]                    # not so "max"
    return min((limit for limit in limits if limit < 1 << 60), default=None)    # version 1 has a huge number for none


def length_of_list(text: str) -> int:
    """Return how many numbers a list of the kernel has: '0-3,8' -> 5, and 0 for what is none."""
    count = 0
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            return 0
        count += int(last or first) - int(first) + 1
    return count
