"""What one rank does, as spans of time: its layers, the operations in them, its collectives.

While nothing is recorded nothing here is called: recording puts a timed function in the place of each layer's methods
and of each operation that layers import, and a timed ledger in the place of the group's; stopping puts them back.
"""
import importlib
import pkgutil
import time
from collections.abc import Callable
from functools import wraps
from inspect import signature
from threading import get_ident
from typing import Any, NamedTuple

from .. import layers
from ..arrays import Array
from ..comm.ledger import Ledger
from .places import DEVICE, MPI, WORKERS, timed_places

now = time.perf_counter_ns
MOST = 1_000_000                # spans of a rank; then nothing is timed any more, and the answer says so
SHORT = 10_000                  # nanoseconds: of a shorter call no shapes are kept, which would take a tenth of it
FIELDS = 5                      # entries of Spans.calls that each takes


class Span(NamedTuple):
    """A span is one call: on which track, of what, from when to when in nanoseconds, and what it was given.

    Attributes
    ----------
    details : object
        Shapes of the arrays of a call; the Collective, or the name of a check, of a collective; of a span of the GPU
        the two CUDA events.
    """
    track: str
    name: str
    start: int
    end: int
    details: Any


class OfGroup(NamedTuple):
    """The details of a collective of a part of the ranks: a Collective, or the name of a check; and these ranks."""
    what: Any
    ranks: list[int]


class Place(NamedTuple):
    """A place is what is called again and again.

    Attributes
    ----------
    track, name : str
    is_method : bool
        Whether its spans are named for the object, too.
    arrays : tuple of int
        Which of its parameters are its first arrays, at most two.
    """
    track: str
    name: str
    is_method: bool = False
    arrays: tuple[int, ...] = ()


COLLECTIVE, ON_DEVICE = Place(MPI, ""), Place(DEVICE, "")


class TimedLedger(Ledger):
    """A ledger that makes a span of each collective, from where this rank enters it to where it leaves."""

    spans: "Spans"
    ranks: list[int] | None = None
    inside: Any = None
    began: int = 0

    @property
    def current(self) -> Any:
        """What this rank is inside of, as Ledger's."""
        return self.inside

    @current.setter
    def current(self, collective: Any) -> None:
        if collective is not None:
            self.inside, self.began = collective, now()
        elif self.inside is not None:
            self.spans.calls.extend((COLLECTIVE, self.began, now(), self.inside, self.ranks))
            self.inside = None
            if len(self.spans.calls) > FIELDS * MOST:
                self.spans.stop_at_limit()


class Spans:
    """The spans of this rank since start(), in the order in which they ended.

    Parameters
    ----------
    ledgers : list of (Ledger, list of int or None)
        Of the groups whose collectives become spans, and their ranks where they are not all.
    device : object, optional
        A DeviceClock: each operation becomes a span of the GPU, too.
    has_workers : bool
        Whether other threads compute, too.
    """

    def __init__(self, ledgers: list[tuple[Ledger, list[int] | None]], device: Any = None, has_workers: bool = False):
        self.ledgers, self.device, self.has_workers = ledgers, device, has_workers
        # Five entries a call, one after the other, as a tuple of each would be one more object for the garbage
        # collector: Place, start, end; the object of a method, and shapes; of a collective it, and its ranks.
        self.calls: list[Any] = []
        self.shapes: dict[tuple, tuple] = {}                # each once, however many calls have them
        self.is_full = False
        self.replaced: list[tuple[Any, str, Any]] = []

    @property
    def found(self) -> list[Span]:
        """The spans; a method's is named for its object."""
        spans = []
        for place, start, end, first, second in zip(*(self.calls[field::FIELDS] for field in range(FIELDS))):
            name, details = place.name, details_of(place, first, second)
            if place.is_method:
                name = f"{name_of(first)} {place.name}"
            elif place.track == MPI:
                name = first if isinstance(first, str) else first.operation
            elif place.track == DEVICE:
                name = first
            spans.append(Span(place.track, name, start, end, details))
        return spans

    def start(self) -> None:
        """Put timed functions in the place of what layers do, and timed ledgers in the place of the groups'."""
        for module in pkgutil.iter_modules(layers.__path__, f"{layers.__name__}."):
            importlib.import_module(module.name)            # now, as one that is imported later would not be timed
        for owner, name, track in timed_places():
            function = owner.__dict__[name]
            self.replaced.append((owner, name, function))
            if isinstance(function, staticmethod):
                setattr(owner, name, staticmethod(timed(function.__func__, self, track, False)))
            else:
                setattr(owner, name, timed(function, self, track, isinstance(owner, type)))
        for ledger, ranks in self.ledgers:
            ledger.__class__ = TimedLedger
            ledger.spans, ledger.ranks = self, ranks        # type: ignore[attr-defined]

    def shapes_of(self, args: tuple, place: Place) -> tuple:
        """Return the shapes of a call's first arrays, None for what is none; stop where there is no more room."""
        if len(self.calls) > FIELDS * MOST:
            self.stop_at_limit()
        shapes = tuple([getattr(args[at], "shape", None) for at in place.arrays if at < len(args)])
        return self.shapes.setdefault(shapes, shapes)

    def stop_at_limit(self) -> None:
        """Stop, as a rank keeps MOST spans."""
        self.is_full = True
        self.stop()

    def stop(self) -> None:
        """Put everything back."""
        for owner, name, function in reversed(self.replaced):
            setattr(owner, name, function)
        self.replaced.clear()
        for ledger, _ in self.ledgers:
            ledger.__class__ = Ledger
            ledger.current = None


def details_of(place: Place, first: Any, second: Any) -> Any:
    """Return the details of a span, out of the two entries that are kept of its call."""
    if place.track == MPI:
        return first if second is None else OfGroup(first, second)
    return second


def timed(function: Callable, spans: Spans, track: str, is_method: bool) -> Callable:
    """Return the function, which adds its call to `spans` each time."""
    arrays = (1,) if is_method else positions_of_arrays(function)
    place = Place(track, function.__name__, is_method, arrays)
    if spans.has_workers:
        in_worker = timed_call(function, spans, place._replace(track=WORKERS))
        function = timed_by_thread(timed_call(function, spans, place), in_worker, get_ident())
    else:
        function = timed_call(function, spans, place)
    return timed_on_device(function, spans) if spans.device and not is_method else function


def timed_call(function: Callable, spans: Spans, place: Place) -> Callable:
    """Return the function with the times of its calls, its object if it is a method, and shapes if it takes long.

    A token has a hundred operations of some microseconds each, between weights that push this code out of the caches:
    what is touched here for each of them is the least that makes a span.
    """
    calls, is_method = spans.calls, place.is_method

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        start = now()
        try:
            return function(*args, **kwargs)
        finally:
            end = now()
            calls.extend((place, start, end, args[0] if is_method else None,
                          None if end - start < SHORT else spans.shapes_of(args, place)))
    return call


def timed_by_thread(function: Callable, in_worker: Callable, thread: int) -> Callable:
    """Return a function that calls the first one in this thread, the second one in others."""
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if get_ident() == thread else in_worker)(*args, **kwargs)
    return call


def timed_on_device(function: Callable, spans: Spans) -> Callable:
    """Return an operation that also keeps an event of the GPU before and behind each of its calls."""
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        first = spans.device.event()
        try:
            return function(*args, **kwargs)
        finally:
            if first is not None:
                spans.calls.extend((ON_DEVICE, 0, 0, function.__name__, (first, spans.device.event())))
    return call


def positions_of_arrays(function: Callable) -> tuple[int, ...]:
    """Return which of a function's parameters are its first two arrays; those that may be None do not count."""
    return tuple(at for at, parameter in enumerate(signature(function).parameters.values())
                 if parameter.annotation in (Array, "Array", "PackedWeight"))[:2] or (0,)


def name_of(layer: Any) -> str:
    """Return the name of a layer, "layers.0.mlp"; that of its class where it has none."""
    return getattr(layer, "name", "") or type(layer).__name__
