"""What signals ask of a training run: save and go on, or save and stop."""
from __future__ import annotations

import signal
import threading
from collections.abc import Iterable
from types import FrameType
from typing import Any

from ..errors import InputError

SIGNALS = ("TERM", "USR1", "USR2")
NOTHING, SAVE, STOP = 0, 1, 2


class Requests:
    """Signals to any rank, noted while the body of a `with` runs; the loop asks for them between two steps.

    Parameters
    ----------
    stop_on : names, optional
        The signals that ask to save and stop, of SIGNALS; the others ask to save and go on.

    Raises
    ------
    InputError
        For a signal that is none of these.

    Attributes
    ----------
    wish : (int, str)
        NOTHING, SAVE or STOP, and the name of the signal that asked for it.
    """

    def __init__(self, stop_on: Iterable[str] = ("TERM",)):
        self.stop_on = tuple(stop_on)
        for name in self.stop_on:
            if name not in SIGNALS:
                raise InputError(f"found signal {name!r}, expected of {', '.join(SIGNALS)}")
        self.wish = NOTHING, ""
        self.before: list[dict[int, Any]] = []

    def __enter__(self) -> Requests:
        handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():           # Python sets handlers nowhere else
            numbers = [getattr(signal, f"SIG{name}") for name in SIGNALS if hasattr(signal, f"SIG{name}")]
            handlers = {number: signal.signal(number, self.note) for number in numbers}
            if hasattr(signal, "pthread_sigmask"):                          # those that came while they were blocked
                signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        self.before.append(handlers)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.pop().items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        name = signal.Signals(number).name.removeprefix("SIG")
        self.wish = max(self.wish, (STOP if name in self.stop_on else SAVE, f"SIG{name}"))

    def take(self) -> tuple[int, str]:
        """Return the wish, which is then seen to."""
        wish, self.wish = self.wish, (NOTHING, "")
        return wish


def hold_signals() -> None:
    """Keep signals for a run that has not begun: they are delivered when Requests are entered."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [getattr(signal, f"SIG{name}") for name in SIGNALS])
