"""The sum of gradients over the data ranks, begun bucket by bucket while backward goes on to earlier blocks.

A Flat holds the gradients in the order of the layers, so backward of a step's last piece fills it from the end. Once
those of a block are complete, so is all that lies behind, and the buckets there are begun:

    the array      embedding  | block 0       | block 1       | block 2       | final norm, head
    buckets        0               | 1               | 2               | 3

    backward       head     block 2     block 1     block 0      embedding
    begun                          3           2           1             0      then all are waited for, and clipped

Every data rank begins every bucket in this order, whatever it has of a step: fewer pieces than others, none, or one
whose norms overflow.
"""
from __future__ import annotations

from ..arrays import Array
from ..comm.group import TensorParallelGroup
from ..comm.pending import PendingReduction
from ..layers.block import ParallelBlock
from ..layers.decoder import Decoder
from ..sharding.partition import Block, Partition
from .gradients import GradientSum


class GradientBuckets(GradientSum):
    """GradientSum whose messages are begun beside backward: on GPUs on another stream, by MPI as MPI_Iallreduce.

    They are the same messages, of the same numbers. In sequence parallelism gradients of norms are complete at the end
    of a step, so they lie before all others, in the buckets that are begun last.

    Use: as GradientSum, and backward of this rank's last piece takes `beside`, this sum.

    Parameters
    ----------
    model, data, partition
        GradientSum's, with a data group.
    """
    overlaps = True

    def __init__(self, model: Decoder, data: TensorParallelGroup, partition: Partition):
        super().__init__(model, data, partition)
        self.complete_from = 0                          # where the gradients that are complete begin
        self.waiting: list[slice] = []                  # the buckets that are not begun
        self.under_way: list[PendingReduction] = []

    def begin(self) -> None:
        super().begin()
        assert self.total is not None
        self.complete_from = self.total.array.size
        self.waiting = self.messages(self.total.array)

    def complete(self, block: ParallelBlock) -> None:
        """Begin the buckets that are complete, now that backward of this block is done, and of all behind it."""
        assert self.total is not None
        start = self.total.start_of(block)
        self.add_from(start)
        self.begin_from(start)

    def add(self, piece: Block, loss: float) -> None:
        self.add_from(0)
        self.complete_from = self.total.array.size if self.total else 0
        self.count, self.loss = self.count + 1, self.loss + loss

    def add_from(self, start: int) -> None:
        """Add what lies in room() from `start` on, but for what has been added, to the pieces before."""
        if self.count and self.total and self.more:
            self.total.array[start:self.complete_from] += self.more.array[start:self.complete_from]
        self.complete_from = start

    def begin_from(self, start: int) -> None:
        """Begin the buckets that lie from `start` on."""
        assert self.total is not None and self.data is not None
        while self.waiting and self.waiting[-1].start >= start:
            bucket = self.total.array[self.waiting.pop()]
            self.under_way.append(self.data.begin_all_reduce(bucket, out=bucket))

    def sum_over_ranks(self, data: TensorParallelGroup, total: Array) -> None:
        self.begin_from(0)
        while self.under_way:
            self.under_way.pop(0).wait()

    def abandon(self) -> None:
        if self.total and self.data:
            self.sum_over_ranks(self.data, self.total.array)
