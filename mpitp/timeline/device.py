"""When the GPU worked on an operation: CUDA events before and behind it, on the clock of the host."""
import time
from typing import Any


class DeviceClock:
    """Events of one GPU, and the time of the host at which each happened.

    Parameters
    ----------
    xp : module
        CuPy.
    """

    def __init__(self, xp: Any):
        self.cuda = xp.cuda
        self.cuda.get_current_stream().synchronize()
        self.base, self.at = self.event(), time.perf_counter_ns()

    def event(self) -> Any:
        """Return an event behind what this stream was given until now; None while a graph is recorded."""
        stream = self.cuda.get_current_stream()
        return None if stream.is_capturing() else stream.record()

    def time_of(self, event: Any) -> int:
        """Return when the event happened, in nanoseconds of the host's clock; wait for it."""
        event.synchronize()
        return self.at + int(self.cuda.get_elapsed_time(self.base, event) * 1e6)
