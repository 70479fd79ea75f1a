"""Spare cores in reproducible mode: blocks run side by side, each on one BLAS thread.

The number of BLAS threads is part of the bits of a product, so it is fixed to one; a rank with more cores
computes several blocks at once instead (NumPy releases the interpreter lock inside a product).
"""
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from ..errors import InputError


def one_blas_thread():
    """Hold BLAS to one thread. Returns a function that gives the threads back.

    Raises InputError where neither threadpoolctl nor the environment can do it.
    """
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        if any(os.environ.get(name) == "1" for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")):
            return lambda: None
        raise InputError("found no threadpoolctl, expected it for reproducible=True (it holds BLAS to one thread): "
                         "pip install threadpoolctl, or start with OMP_NUM_THREADS=1") from None
    limits = threadpool_limits(1, user_api="blas")
    return limits.restore_original_limits


class Workers:
    """A pool of threads, made when first used."""

    def __init__(self, count):
        self.count, self.pool = count, None

    def each(self, function, items):
        """Yield function(item) for each item, in order; at most `count` are computed or waiting at a time."""
        if self.count == 1 or len(items) < 2:
            yield from map(function, items)
            return
        self.pool = self.pool or ThreadPoolExecutor(self.count, thread_name_prefix="mpitp-block")
        waiting = deque()
        for item in items:
            if len(waiting) == self.count:
                yield waiting.popleft().result()
            waiting.append(self.pool.submit(function, item))
        while waiting:
            yield waiting.popleft().result()

    def close(self):
        if self.pool:
            self.pool.shutdown()
            self.pool = None
