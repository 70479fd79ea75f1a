"""The one place where an operation asks whether it was given a NumPy or a CuPy array, or a packed weight."""
import importlib
import sys
from collections.abc import Callable
from functools import wraps, cache
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import numpy as np

P = ParamSpec("P")
Result = TypeVar("Result")


@cache
def twin(name: str) -> ModuleType:
    """Import the CuPy twin of mpitp.ops.<name>: the same functions with the same arguments, as kernels of the GPU."""
    return importlib.import_module(f"{__package__}.cuda.{name}")


def is_cupy(value: Any) -> bool:
    """Return whether this is a CuPy array, or the module cupy itself."""
    cupy = sys.modules.get("cupy")          # an array of a module that was never imported does not exist
    return cupy is not None and (value is cupy or isinstance(value, cupy.ndarray))


def cuda_twin(by: str) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Hand an operation's CuPy arrays to its twin, the function of the same name in mpitp/ops/cuda.

    by : the parameter that decides: an array or, where an operation makes arrays out of none, their array module

    The twin's module, and with it CuPy's kernels, is imported when the first CuPy array arrives.
    """
    def decorate(operation: Callable[P, Result]) -> Callable[P, Result]:
        code, name = operation.__code__, operation.__name__
        position, module = code.co_varnames[:code.co_argcount].index(by), operation.__module__.rpartition(".")[2]

        @wraps(operation)
        def dispatch(*args: P.args, **kwargs: P.kwargs) -> Result:
            decisive = args[position] if len(args) > position else kwargs.get(by)
            others = None if type(decisive) is np.ndarray else twin(module) if is_cupy(decisive) else \
                getattr(decisive, "operations", None)           # those of a PackedWeight
            return (getattr(others, name) if others else operation)(*args, **kwargs)
        return dispatch
    return decorate
