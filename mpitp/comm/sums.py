"""How partial results add up over the ranks: a sum is begun, each block of this rank is added, then all ranks reduce.

    total = group.sum(partition, shape, dtype)
    for block, y in group.each(compute, partition.blocks_of(group.rank)):
        total.add(block, y)
    y = total.all_reduce()

In ordinary mode a rank has one block, its partial result, and the reduction is one MPI_Allreduce. In reproducible mode
it is a fixed tree over the blocks, the same additions on any number of ranks: see tree.py.
"""
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from threading import get_ident
from typing import Any

import numpy as np

from ..arrays import Array, sum_dtype
from ..errors import InputError
from ..sharding.partition import Block, Partition
from .ledger import Collective, dtype_name, memory_order, refuse_thread


class Sum:
    """The sum over all blocks of all ranks of arrays of one shape, on every rank: made by `group.sum`.

    Attributes
    ----------
    summand_dtype : dtype
        What add() takes: the dtype of the result; but float32 for a result of 16 bits, so that it is rounded once,
        after the sum. On one rank nothing is added, and the one summand may have 16 bits.
    """

    def __init__(self, group: Any, partition: Partition, shape: Sequence[int], dtype: np.dtype):
        self.group, self.partition, self.shape, self.dtype = group, partition, tuple(shape), dtype
        self.summand_dtype = dtype if group.size == 1 and not group.reproducible else sum_dtype(dtype)
        self.total: Array | None = None
        self.waiting: deque = deque()               # work to be done while the ranks add up

    def add(self, block: Block, summand: Array) -> None:
        """Add this rank's partial result of a block: a new C-contiguous array of `summand_dtype`, overwritten."""
        self.total = self.checked(block, summand)

    def meanwhile(self, function: Callable, *arguments: Any) -> None:
        """Call function(*arguments), work that no other rank waits for, while the ranks add up.

        On a CPU, and wherever the transport cannot add up in the background, it is called at once: what it needs is
        in cache then, and is freed sooner.
        """
        if self.group.overlaps:
            self.waiting.append((function, arguments))
        else:
            function(*arguments)

    def all_reduce(self) -> Array:
        """Return the sum, on every rank. Collective: one all-reduce in place, 2 (P-1)/P n bytes a rank."""
        group, total = self.group, self.total
        if total is None:                           # more ranks than blocks: this one has nothing to add
            total = group.xp.zeros(self.shape, self.summand_dtype)
        collective, ledger = Collective("all_reduce", total.size, dtype_name(self.dtype)), group.ledger
        if get_ident() != ledger.thread:
            refuse_thread(ledger.thread)
        ledger.current, start = collective, time.perf_counter()
        if self.waiting:
            finish = group.transport.begin_all_reduce(total, "sum")
            while self.waiting:                     # one after the other, so that what each holds is freed
                function, arguments = self.waiting.popleft()
                function(*arguments)
            finish()
        else:
            group.transport.all_reduce(total, "sum")
        ledger.current, entry = None, ledger.data[collective]
        entry.calls += 1                            # Ledger.record_data, written out: a token's sum takes microseconds
        entry.wire_bytes += 2 * total.nbytes * (group.size - 1) // group.size
        entry.seconds += time.perf_counter() - start
        return total if total.dtype == self.dtype else total.astype(self.dtype)

    def local_sum(self) -> Array:
        """Return a sum whose blocks are all this rank's: the same additions as all_reduce()'s, no collective."""
        assert self.total is not None, "no block was added"
        return self.total

    def checked(self, block: Block, summand: Array) -> Array:
        """Return the summand. Raises InputError unless it is what add() takes: others would be summed wrongly."""
        good = summand.dtype == self.summand_dtype or summand.dtype == sum_dtype(self.dtype)
        if summand.shape != self.shape or not good or not summand.flags.c_contiguous:
            raise InputError(f"found a partial result {summand.dtype} {summand.shape} in {memory_order(summand)} order "
                             f"for block {block.index}, expected a C-contiguous {sum_dtype(self.dtype)} {self.shape}")
        return summand


class Sums:
    """The methods of TensorParallelGroup that add up over ranks and blocks."""

    def sum(self: Any, partition: Partition, shape: Sequence[int], dtype: str | np.dtype) -> Sum:
        """Begin a sum over the blocks of `partition`: add() each block of this rank, then all_reduce().

        Parameters
        ----------
        partition : Partition
            Which rank has which blocks: this group's.
        shape, dtype : tuple of int, dtype
            Of the result; every summand has this shape.

        Returns
        -------
        Sum
            In reproducible mode its bits are the same for any number of ranks.

        Raises
        ------
        InputError
            For a dtype that is not computed in on this device, or another group's partition.

        Notes
        -----
        all_reduce() is collective: 2 (P-1)/P n bytes a rank, n the bytes of the summands; in reproducible mode as many
        where P divides the blocks, up to twice as many elsewhere. With check=True, sum() is collective too.
        """
        dtype = np.dtype(dtype)
        if self.check:
            self._agree(self._describe_sum, partition, shape, dtype)
        elif partition.ranks != self.size or dtype_name(dtype) not in self.summed_dtypes:
            self._describe_sum(partition, shape, dtype)                 # raises
        return self.sum_class(self, partition, shape, dtype)

    def sum_of_own(self: Any, partition: Partition, shape: Sequence[int], dtype: str | np.dtype) -> Sum:
        """Begin a sum whose blocks are all this rank's; local_sum() ends it. Not collective."""
        return self.sum_class(self, partition, shape, np.dtype(dtype))

    def each(self: Any, compute: Callable, items: Sequence, *arguments: Any) -> Iterable[tuple[Any, Any]]:
        """Return pairs (item, compute(item, *arguments)), in order; the items are usually this rank's blocks.

        In ordinary mode all are computed now; in reproducible mode when they are asked for, and ahead by spare cores.
        """
        if self.workers is not None:
            return self.workers.each(compute, items, *arguments)
        computed = []
        for item in items:
            computed.append((item, compute(item, *arguments)))
        return computed

    def _describe_sum(self: Any, partition: Partition, shape: Sequence[int], dtype: np.dtype) -> tuple:
        if dtype_name(dtype) not in self.summed_dtypes:
            raise InputError(f"found a sum of {dtype}, expected one of {', '.join(self.summed_dtypes)}")
        self._require_partition("a sum", partition)
        if not self.reproducible and partition.blocks != self.size:
            raise InputError(f"found a sum over {partition}, expected one block a rank in ordinary mode")
        return "sum", dtype, tuple(map(int, shape)), partition
