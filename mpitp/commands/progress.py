"""A bar on standard error while something long runs: on rank 0, in a terminal, after the first second.

    for window in progress(windows, len(windows), "windows"): ...
    with Progress("dense side in float64"): ...

Logs get nothing. Under mpirun a process cannot see by its own streams whether people watch: MPICH gives it pipes even
in a terminal, and Open MPI gives rank 0 a pseudo-terminal as its standard output even where mpirun's goes to a file.
So the streams of mpirun itself count, where it runs on this host and the system shows them (Linux). The variable
MPITP_PROGRESS decides before that: run.sh sets it to 1 in a terminal, to 0 elsewhere.
"""
import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from ..comm.launch import is_first_rank, launcher

Item = TypeVar("Item")
SILENT = 1.0            # seconds until the bar appears, and from one update to the next
FORWARDING = 0.1        # seconds for the launcher to forward the wiped line before the next line of standard output
VARIABLE = "MPITP_PROGRESS"
LAUNCHERS = "mpirun", "mpiexec", "prterun", "orterun"


def launcher_process() -> int | None:
    """Return the process id of the mpirun that started this process, None where this host does not show one."""
    process = os.getpid()
    with contextlib.suppress(OSError, ValueError):
        while process > 1:
            with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
                name, _, fields = file.read().partition("(")[2].rpartition(")")
            if name.startswith(LAUNCHERS):
                return process
            process = int(fields.split()[1])
    return None


def are_terminals(process: int, streams: Iterable[int] = (1, 2)) -> bool:
    """Return whether these standard streams, by number, of a process of this host are terminals."""
    try:
        return all(os.readlink(f"/proc/{process}/fd/{stream}").startswith(("/dev/pts/", "/dev/tty", "/dev/console"))
                   for stream in streams)
    except OSError:
        return False


def is_watched() -> bool:
    """Return whether this job writes to a terminal: asked on rank 0 alone, and by MPITP_PROGRESS where that is set."""
    if not is_first_rank():
        return False
    wanted = os.environ.get(VARIABLE, "")
    if wanted in ("0", "1"):
        return wanted == "1"
    if all(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr)):
        return True
    started_by = launcher_process() if launcher()[0] else None
    return started_by is not None and are_terminals(started_by)


def progress(iterable: Iterable[Item], total: int | None, what: str) -> Iterator[Item]:
    """Yield the items while a bar tells how many are done.

    Parameters
    ----------
    iterable : iterable
    total : int or None
        How many items there are, None where that is not known.
    what : str
        What the items are, such as "windows".

    Yields
    ------
    object
        The items, in order.
    """
    with Progress(what, total) as bar:
        for item in iterable:
            yield item
            bar.advance()


class Progress:
    """A bar while the body of a `with` runs: in a terminal alone, and not where the body takes less than SILENT.

    A thread draws it, so that one long product does not look like a job that hangs. tqdm is imported by that thread,
    hence only when there is something to show.

    Parameters
    ----------
    what : str
        What runs, such as "loading".
    total : int or None
        How many calls of `advance` there will be.
    """

    def __init__(self, what: str, total: int | None = None):
        self.what, self.total, self.done = what, total, 0
        self.is_over, self.thread = threading.Event(), threading.Thread(target=self.draw, name="progress", daemon=True)

    def __enter__(self) -> "Progress":
        if is_watched():
            self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.is_over.set()
        if self.thread.is_alive():
            self.thread.join()

    def advance(self, what: str | None = None) -> None:
        """Count one more; `what` names what runs from now on."""
        self.done += 1
        self.what = self.what if what is None else what

    def draw(self) -> None:
        """Draw the bar once a second until the body is through, then wipe it out. Without tqdm: one line, once."""
        started = time.time()
        if self.is_over.wait(SILENT):
            return
        try:
            from tqdm import tqdm
        except ImportError:
            print(f"{self.what} ...", file=sys.stderr, flush=True)
            return
        tqdm.monitor_interval = 0               # no thread of its own beside this one
        columns = min(100, shutil.get_terminal_size().columns) - 1
        shape = "{desc}  {elapsed}" if self.total is None else "{desc}  {n_fmt}/{total_fmt} {bar} {elapsed}"
        # nrows: a pseudo-terminal that says it has no rows is a terminal all the same.
        with tqdm(desc=self.what, total=self.total, file=sys.stderr, ncols=columns, nrows=20, leave=False,
                  bar_format=shape) as bar:
            bar.start_t = started
            while True:
                bar.n = self.done
                bar.set_description_str(self.what)
                if self.is_over.wait(SILENT):
                    break
        time.sleep(FORWARDING)
