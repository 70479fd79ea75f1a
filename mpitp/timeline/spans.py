"""What one rank does, as spans of time: its layers, the operations in them, its collectives.

While nothing is recorded nothing here is called: recording puts a timed function in the place of each layer's methods
and of each operation that layers import, and a timed ledger in the place of the group's; stopping puts them back.
"""
import importlib
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import wraps
from threading import get_ident
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from .. import layers
from ..comm.ledger import Ledger
from ..layers.base import ParallelLayer

now = time.perf_counter_ns
HOME = __name__.partition(".")[0]
PYTHON, PRODUCTS, MPI, WORKERS, DEVICE = "Python", "BLAS products", "MPI", "workers", "GPU"
TRACKS = (PYTHON, PRODUCTS, MPI, WORKERS, DEVICE)
MOST = 1_000_000                # spans of a rank; later ones are left out, and the answer says so
# Operations that are matrix products, or hold those of attention.
IS_PRODUCT = ("linear_forward", "two_linears_forward", "linear_backward", "linear_weight_backward", "product",
              "attention_forward", "attention_backward", "last_query_forward")
LAYER_METHODS = ("forward", "backward", "extend", "loss", "loss_backward")
# Other functions that are named in a timeline where their module is in use: module, class or "", name.
OTHERS = (("training.loop", "Trainer", "train_step"), ("training.loop", "Trainer", "validate"),
          ("training.loop", "Trainer", "save"), ("training.optimizer", "AdamW", "step"),
          ("training.optimizer", "", "gradient_norm"), ("inference.generation", "Choice", "__call__"),
          ("inference.graph", "Captured", "__call__"))
# Where operations are called from; those that operations call are part of them.
CALLERS = (f"{HOME}.layers.", f"{HOME}.training.", f"{HOME}.inference.")


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


class TimedLedger(Ledger):
    """A ledger that makes a span of each collective, from where this rank enters it to where it leaves."""

    spans: "Spans"
    ranks: list[int] | None = None
    entered: tuple = ()

    @property
    def current(self) -> Any:
        """What this rank is inside of, as Ledger's."""
        return self.entered[0] if self.entered else None

    @current.setter
    def current(self, collective: Any) -> None:
        if collective is not None:
            self.entered = collective, now()
        elif self.entered:
            (what, start), self.entered = self.entered, ()
            name = what if isinstance(what, str) else what.operation
            self.spans.add(MPI, name, start, now(), what if self.ranks is None else OfGroup(what, self.ranks))


class Spans:
    """The spans of this rank since start(), in the order in which they ended.

    Parameters
    ----------
    ledgers : list of (Ledger, list of int or None)
        Of the groups whose collectives become spans, and their ranks where they are not all.
    device : object, optional
        A DeviceClock: each operation becomes a span of the GPU, too.
    """

    def __init__(self, ledgers: list[tuple[Ledger, list[int] | None]], device: Any = None):
        self.ledgers, self.device, self.thread = ledgers, device, get_ident()
        self.calls: list[tuple] = []            # (track, name, or object and name, start, end, details)
        self.left_out = 0
        self.replaced: list[tuple[Any, str, Any]] = []

    def add(self, track: str, name: Any, start: int, end: int, details: Any) -> None:
        """Keep a span."""
        if len(self.calls) < MOST:
            self.calls.append((track if get_ident() == self.thread else WORKERS, name, start, end, details))
        else:
            self.left_out += 1

    @property
    def found(self) -> list[Span]:
        """The spans; a method's is named for its object."""
        return [Span(track, name if isinstance(name, str) else f"{name_of(name[0])} {name[1]}", start, end, details)
                for track, name, start, end, details in self.calls]

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


def timed(function: Callable, spans: Spans, track: str, is_method: bool) -> Callable:
    """Return the function, which adds a span to `spans` at each call; a method's is named for its object."""
    name, device, calls, thread = function.__name__, spans.device, spans.calls, spans.thread

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        first = device.event() if device and not is_method else None
        start = now()
        try:
            return function(*args, **kwargs)
        finally:                                # written out, and names are made later: a token has hundreds of calls
            end, of = now(), (args[0], name) if is_method else name
            shapes = [getattr(x, "shape", None) for x in (args[1:2] if is_method else args[:2])]
            if len(calls) < MOST and get_ident() == thread:
                calls.append((track, of, start, end, shapes))
            else:
                spans.add(track, of, start, end, shapes)
            if first is not None:
                spans.add(DEVICE, name, start, end, (first, device.event()))
    return call


def name_of(layer: Any) -> str:
    """Return the name of a layer, "layers.0.mlp"; that of its class where it has none."""
    return getattr(layer, "name", "") or type(layer).__name__


def timed_places() -> Iterator[tuple[Any, str, str]]:
    """Yield (class or module, name, track) of every function that is timed."""
    for cls in subclasses(ParallelLayer):
        for name in LAYER_METHODS:
            if name in cls.__dict__:
                yield cls, name, PYTHON
        for name, held in list(vars(cls).items()):
            if isinstance(held, staticmethod) and is_operation(held.__func__):      # one that subclasses may replace
                yield cls, name, PRODUCTS if held.__func__.__name__ in IS_PRODUCT else PYTHON
    for module in [module for name, module in sys.modules.items() if name.startswith(CALLERS)]:
        for name, function in list(vars(module).items()):
            if is_operation(function):
                yield module, name, PRODUCTS if name in IS_PRODUCT else PYTHON
    for home, cls_name, name in OTHERS:
        loaded: ModuleType | None = sys.modules.get(f"{HOME}.{home}")
        owner = getattr(loaded, cls_name) if loaded and cls_name else loaded
        if owner:
            yield owner, name, PYTHON


def is_operation(function: Any) -> bool:
    """Return whether this is a function of mpitp/ops."""
    return isinstance(function, FunctionType) and function.__module__.startswith(f"{HOME}.ops.")


def subclasses(cls: type) -> Iterator[type]:
    """Yield the subclasses of a class, and theirs."""
    sub: type
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)
