"""Spare cores in reproducible mode: blocks run side by side, each on one BLAS thread.

The number of BLAS threads is part of the bits of a product, so it is fixed to one; a rank with more cores
computes several blocks at once instead (NumPy releases the interpreter lock inside a product).
"""
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..errors import InputError
from .launch import THREAD_VARIABLES


_holders = 0        # groups that hold BLAS to one thread now
_before: Callable[[], None] | None = None       # what gives the threads back that the first of them found


def one_blas_thread() -> Callable[[], None]:
    """Hold BLAS to one thread. Returns a function that gives the threads back once no group holds them.

    Raises InputError where neither threadpoolctl nor the environment can do it.
    """
    global _holders, _before
    try:
        from threadpoolctl import ThreadpoolController
        blas = ThreadpoolController().select(user_api="blas")
        problem = None if blas.lib_controllers else "a BLAS that threadpoolctl does not know, expected one that it does"
    except ImportError:
        problem = "no threadpoolctl, expected it"
    if problem is None:
        give_back = blas.limit(limits=1).restore_original_limits
    elif environment_says_one_thread():
        give_back = do_nothing
    else:
        raise InputError(f"found {problem} for reproducible=True (it holds BLAS to one thread): "
                         f"pip install threadpoolctl, or start with OMP_NUM_THREADS=1")
    if _holders == 0:
        _before = give_back
    _holders += 1
    return release


def release() -> None:
    """Give the threads back once the last holder is through."""
    global _holders
    _holders -= 1
    if _holders == 0 and _before:
        _before()


def environment_says_one_thread() -> bool:
    """Return whether BLAS, which reads the environment once when NumPy is imported, found 1 wherever it looks."""
    found = {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}
    return not found.keys().isdisjoint(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")) and set(found.values()) == {"1"}


def do_nothing() -> None:
    """Give nothing back."""


class Workers:
    """A pool of threads that computes items ahead, made when first used.

    Attributes
    ----------
    count : int
        How many items are computed or wait at a time, at most; 1: none is computed ahead.
    """

    def __init__(self, count: int):
        self.count = count
        self.pool: ThreadPoolExecutor | None = None

    def each(self, compute: Callable, items: Sequence, *arguments: Any) -> Iterator[tuple[Any, Any]]:
        """Yield (item, compute(item, *arguments)) for each item, in order."""
        if self.count == 1 or len(items) < 2:
            for item in items:
                yield item, compute(item, *arguments)
            return
        self.pool = self.pool or ThreadPoolExecutor(self.count, thread_name_prefix="mpitp-block")
        waiting: deque = deque()
        for item in items:
            if len(waiting) == self.count:
                ready, future = waiting.popleft()
                yield ready, future.result()
            waiting.append((item, self.pool.submit(compute, item, *arguments)))
        for ready, future in waiting:
            yield ready, future.result()

    def close(self) -> None:
        """End the threads."""
        if self.pool:
            self.pool.shutdown()
            self.pool = None
