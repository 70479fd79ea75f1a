"""What a timeline times: which functions of which classes and modules, and on which track each stands."""
import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

from ..layers.base import ParallelLayer

HOME = __name__.partition(".")[0]
PYTHON, PRODUCTS, MPI, WORKERS, DEVICE = "Python", "BLAS products", "MPI", "workers", "GPU"
TRACKS = (PYTHON, PRODUCTS, MPI, WORKERS, DEVICE)
# Operations that are matrix products, or hold those of attention.
IS_PRODUCT = ("linear_forward", "two_linears_forward", "linear_backward", "linear_weight_backward", "product",
              "attention_forward", "attention_backward", "last_query_forward")
LAYER_METHODS = ("forward", "backward", "extend", "loss", "loss_backward")
# Other functions that are named in a timeline where their module is in use: module, class or "", name.
OTHERS = (("training.loop", "Trainer", "train_step"), ("training.loop", "Trainer", "validate"),
          ("training.loop", "Trainer", "save"), ("training.optimizer", "AdamW", "step"),
          ("training.optimizer", "", "gradient_norm"), ("inference.generation", "Choice", "__call__"),
          ("inference.graph", "Captured", "__call__"))
NOT_TIMED = ("overflows", "overflow_text", "refuse_softcap")      # checks, which take less time than a span
# Where operations are called from; those that operations call are part of them.
CALLERS = (f"{HOME}.layers.", f"{HOME}.training.", f"{HOME}.inference.")


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
    return isinstance(function, FunctionType) and function.__module__.startswith(f"{HOME}.ops.") and \
        function.__name__ not in NOT_TIMED


def subclasses(cls: type) -> Iterator[type]:
    """Yield the subclasses of a class, and theirs."""
    sub: type
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)
