"""A bar on standard error while something long runs: on rank 0, in a terminal, after the first second.

    for window in progress(windows, len(windows), "windows"): ...
    with Progress("dense side in float64"): ...

Logs get nothing. Under mpirun a process cannot see whether people watch: MPICH gives it pipes even in a terminal, and
Open MPI gives rank 0 a pseudo-terminal as its standard output even where mpirun's goes to a file. So the launching
shell decides by the variable MPITP_PROGRESS (run.sh sets it to 1 in a terminal, to 0 elsewhere), and without that
variable both standard output and standard error must be terminals.
"""
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from ..comm.launch import is_first_rank

Item = TypeVar("Item")
SILENT = 1.0            # seconds until the bar appears, and from one update to the next
FORWARDING = 0.1        # seconds for the launcher to forward the wiped line before the next line of standard output
VARIABLE = "MPITP_PROGRESS"


def is_watched() -> bool:
    """Return whether this process writes to a terminal: rank 0 alone, and by MPITP_PROGRESS where that is set."""
    if not is_first_rank():
        return False
    wanted = os.environ.get(VARIABLE, "")
    if wanted in ("0", "1"):
        return wanted == "1"
    return all(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr))


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
