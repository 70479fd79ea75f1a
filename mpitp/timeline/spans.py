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
MOST = 1_000_000                # spans of a rank; later ones are left out, and the answer says so
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
    arrays : (int, int)
        Which of its parameters are its first two arrays; the same number twice if it has one.
    """
    track: str
    name: str
    is_method: bool = False
    arrays: tuple[int, int] = (0, 0)


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
            self.spans.add(COLLECTIVE, self.began, now(), self.inside, self.ranks)
            self.inside = None


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
        self.ledgers, self.device, self.thread, self.has_workers = ledgers, device, get_ident(), has_workers
        # Five entries a call, one after the other, as a tuple of each would be one more object for the garbage
        # collector: Place, start, end; an operation's two shapes, or a method's object and the shape of what it got.
        self.calls: list[Any] = []
        self.left_out = 0
        self.replaced: list[tuple[Any, str, Any]] = []

    def add(self, place: Place, start: int, end: int, first: Any, second: Any) -> None:
        """Keep a call of this thread, or of a worker."""
        if len(self.calls) >= FIELDS * MOST:
            self.left_out += 1
            return
        if get_ident() != self.thread:
            place = place._replace(track=WORKERS)
        self.calls += place, start, end, first, second

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

    def stop(self) -> None:
        """Put everything back."""
        for owner, name, function in reversed(self.replaced):
            setattr(owner, name, function)
        self.replaced.clear()
        for ledger, _ in self.ledgers:
            ledger.__class__ = Ledger
            ledger.current = None


def details_of(place: Place, first: Any, second: Any) -> Any:
    """Return the details of a span, out of the two entries that its place keeps of a call."""
    if place.track == MPI:
        return first if second is None else OfGroup(first, second)
    if place.track == DEVICE:
        return second
    if place.is_method:
        return [second]
    return [first] if place.arrays[0] == place.arrays[1] else [first, second]


def timed(function: Callable, spans: Spans, track: str, is_method: bool) -> Callable:
    """Return the function, which adds its call to `spans` each time."""
    place = Place(track, function.__name__, is_method, (0, 0) if is_method else positions_of_arrays(function))
    if spans.device or spans.has_workers:
        return timed_anywhere(function, spans, place)
    return timed_method(function, spans, place) if is_method else timed_operation(function, spans, place)


def timed_operation(function: Callable, spans: Spans, place: Place) -> Callable:
    """Return an operation with its times and the shapes of its first two arrays.

    A token has a hundred operations of some microseconds each, so everything is written out, and nothing is named.
    """
    calls, most = spans.calls, FIELDS * MOST
    one, two = place.arrays

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        start = now()
        try:
            return function(*args, **kwargs)
        finally:
            end = now()
            try:
                if len(calls) < most:
                    calls.extend((place, start, end, args[one].shape, args[two].shape))
                else:
                    spans.left_out += 1
            except (AttributeError, IndexError):            # None, or given by its name
                calls.extend((place, start, end, None, None))
    return call


def timed_method(function: Callable, spans: Spans, place: Place) -> Callable:
    """Return a method with its times, its object and the shape of what it was given."""
    calls, most = spans.calls, FIELDS * MOST

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        start = now()
        try:
            return function(*args, **kwargs)
        finally:
            end = now()
            if len(calls) < most:
                calls.extend((place, start, end, args[0], getattr(args[1], "shape", None) if len(args) > 1 else None))
            else:
                spans.left_out += 1
    return call


def timed_anywhere(function: Callable, spans: Spans, place: Place) -> Callable:
    """Return a function of either kind with its times, which other threads may call, and the GPU's."""
    device, is_method = spans.device, place.is_method
    one, two = place.arrays

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        first = device.event() if device and not is_method else None
        start = now()
        try:
            return function(*args, **kwargs)
        finally:
            end = now()
            shapes = [getattr(args[at], "shape", None) if at < len(args) else None for at in (one, two)]
            if is_method:
                shapes = [args[0], getattr(args[1], "shape", None) if len(args) > 1 else None]
            spans.add(place, start, end, *shapes)
            if first is not None:
                spans.add(ON_DEVICE, start, end, place.name, (first, device.event()))
    return call


def positions_of_arrays(function: Callable) -> tuple[int, int]:
    """Return which of a function's parameters are its first two arrays; those that may be None do not count."""
    positions = [at for at, parameter in enumerate(signature(function).parameters.values())
                 if parameter.annotation in (Array, "Array", "PackedWeight")]
    first = positions[0] if positions else 0
    return first, positions[1] if len(positions) > 1 else first


def name_of(layer: Any) -> str:
    """Return the name of a layer, "layers.0.mlp"; that of its class where it has none."""
    return getattr(layer, "name", "") or type(layer).__name__
