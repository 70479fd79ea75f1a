"""The timeline of a group: recording, one clock, and what is written in the end."""
import socket
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import tables
from ..comm.group import TensorParallelGroup
from ..errors import require
from .answer import answer, table
from .clocks import Clock, read_clock
from .device import DeviceClock
from .picture import draw, require_matplotlib
from .places import DEVICE
from .spans import MOST, OfGroup, Span, Spans
from .trace import write_trace
from .waiting import waiting_of

if TYPE_CHECKING:
    from ..grid import Grid


class Timeline:
    """What every rank of a group did and when, for Perfetto or as a picture; and which rank the others wait for.

        with mpitp.TensorParallelGroup() as group, mpitp.Timeline(group, "run.json"):
            ...

    Parameters
    ----------
    group : TensorParallelGroup or Grid
        Its ranks, and the collectives that are recorded, a grid's those of its three groups. `group.timeline`, of a
        grid `grid.world.timeline`, is this timeline until it ends.
    path : str, optional
        FILE.json, for ui.perfetto.dev or chrome://tracing, or FILE.png, a picture. None: nothing is written.

    Attributes
    ----------
    answer : str
        On rank 0, after the end: who waits for whom.
    table : str
        On rank 0, after the end: where the time of each rank went.

    Raises
    ------
    InputError
        On every rank, for another ending, a second timeline of the process, a missing matplotlib.

    Notes
    -----
    Constructor, start() and finish() are collective: 60 small messages from and to each rank for the clocks, then one
    gather of all spans. A rank keeps up to a million spans. Times of the GPU are those of CUDA events.
    """

    running: "Timeline | None" = None

    def __init__(self, group: "TensorParallelGroup | Grid", path: str | None = None):
        require(path is None or path.endswith((".json", ".png")), f"timeline {path!r}", "FILE.json or FILE.png")
        whole: Any = group
        self.group: TensorParallelGroup = getattr(whole, "world", whole)
        self.parts = [whole.tensor, whole.data] if self.group is not whole else []
        self.path = path
        if path:
            self.group.on_root(self.require_writable)
        self.answer = self.table = ""

    def require_writable(self) -> None:
        """Raise before the work where the file cannot be written, or not drawn."""
        assert self.path, "there is a file"
        if self.path.endswith(".png"):
            require_matplotlib()
        tables.require_writable(self.path)

    def start(self) -> None:
        """Begin to record. Collective."""
        require(Timeline.running is None, "two timelines at once", "one of a process, whose functions it times")
        self.device = DeviceClock(self.group.xp) if self.group.device == "gpu" else None
        ledgers = [(part.ledger, part.comm.allgather(self.group.rank)) for part in self.parts]
        self.spans = Spans([(self.group.ledger, None), *ledgers], self.device,
                           any(part.workers is not None for part in (self.group, *self.parts)))
        self.began = read_clock(self.group.comm)
        Timeline.running = self.group.timeline = self       # type: ignore[attr-defined]
        self.spans.start()

    def stop(self) -> None:
        """Stop recording, and put back what was timed."""
        self.spans.stop()
        Timeline.running = self.group.timeline = None       # type: ignore[attr-defined]

    def finish(self) -> None:
        """Stop, align the clocks, and write the file on rank 0. Collective."""
        self.stop()
        comm = self.group.comm
        clock = Clock(self.began, read_clock(comm))
        found = comm.gather((self.aligned(clock), self.spans.is_full))
        hosts = comm.gather(socket.gethostname())
        self.group.on_root(lambda: self.write(found, hosts))

    def aligned(self, clock: Clock) -> list[Span]:
        """Return this rank's spans by rank 0's clock, with details that can be sent and written."""
        spans = []
        for span in self.spans.found:
            start, end, details = span.start, span.end, span.details
            if span.track == DEVICE:
                first, last = details
                if first is None or last is None:           # a call that was recorded, not done
                    continue
                start, end, details = self.device.time_of(first), self.device.time_of(last), None   # type: ignore
            elif isinstance(details, OfGroup):
                details = {**(described(details.what) or {}), "ranks": details.ranks}
            elif hasattr(details, "elements"):
                details = described(details)
            elif isinstance(details, tuple):
                details = {"shapes": [list(shape) for shape in details if shape is not None]}
            else:
                details = None
            spans.append(Span(span.track, span.name, clock(start), clock(end), details))    # type: ignore[arg-type]
        return spans

    def write(self, found: Any, hosts: Any) -> None:
        """Write the file, on rank 0."""
        of_ranks = [spans for spans, _ in found]
        waiting = waiting_of(of_ranks)
        self.answer, self.table = answer(of_ranks, waiting), table(of_ranks, waiting)
        if any(is_full for _, is_full in found):
            self.answer += f" (of the first {MOST:,} calls of a rank: later ones are left out)"
        if not self.path:
            return
        if self.path.endswith(".png"):
            draw(self.path, of_ranks, waiting, self.answer)
        else:
            write_trace(self.path, of_ranks, hosts, waiting, {"answer": self.answer})

    def until_closed(self) -> None:
        """Begin to record, and finish when the group is closed, which says the answer on stderr. Collective."""
        self.start()
        self.close, self.group.close = self.group.close, self.finish_and_close          # type: ignore[method-assign]

    def finish_and_close(self) -> None:
        """Finish, say the answer, close the group."""
        self.group.close = self.close                                                   # type: ignore[method-assign]
        self.finish()
        if self.group.rank == 0:
            written = f" ({self.path})" if self.path else ""
            print(f"timeline{written}: {self.answer}\n{self.table}", file=sys.stderr, flush=True)
        self.close()

    def __enter__(self) -> "Timeline":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if error is None:
            self.finish()
            return
        self.stop()                                         # other ranks may not come to the gather


def described(collective: Any) -> dict[str, Any] | None:
    """Return a Collective's elements, dtype and bytes, of the whole array; None for a check, which has a name alone."""
    if not hasattr(collective, "elements"):
        return None
    itemsize = 2 if collective.dtype == "bfloat16" else np.dtype(collective.dtype).itemsize     # not a name of NumPy's
    return {"elements": collective.elements, "dtype": collective.dtype, "bytes": collective.elements * itemsize}
