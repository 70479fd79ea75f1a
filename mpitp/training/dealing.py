"""How the sequences of a global batch are dealt over data ranks, and cut into what is computed at one time.

A step sees the same sequences, in the same order, on every grid. Each data rank has a run of them, as equal as can be;
where there are fewer sequences than data ranks, some have none.

    ordinary              10 sequences, micro-batches of 4, 2 data ranks     [0 1 2 3][4]   [5 6 7][8 9]
    unit = "sequence"     each sequence by itself, whatever a micro-batch is  [0][1][2][3][4] [5][6][7][8][9]
    unit = "micro-batch"  12 sequences, micro-batches of 4: dealt whole       [0 1 2 3]      [4 5 6 7][8 9 10 11]
"""
from __future__ import annotations

from typing import Any

from ..ops.dropout import PartOfStep
from ..sharding.partition import Block, Partition
from .settings import SEQUENCE, Settings


class Dealing:
    """What one data rank computes of each global batch.

    Parameters
    ----------
    settings : Settings
    rank, ranks : int
        Of the data group.
    reproducible : bool
        Whether pieces are leaves of a fixed tree: a sequence, or a micro-batch, by settings.reproducible_unit.

    Attributes
    ----------
    unit : str or None
        "sequence" or "micro-batch"; None in ordinary mode, where a piece has no meaning for the bits.
    partition : Partition
        Of the sequences. Its blocks are the leaves; in ordinary mode there is one a data rank.
    pieces : tuple of Block
        What this data rank computes, a forward and a backward each: sequences start..stop-1 of the global batch.
    """

    def __init__(self, settings: Settings, rank: int = 0, ranks: int = 1, reproducible: bool = False):
        self.settings = settings
        self.unit = settings.reproducible_unit if reproducible else None
        size, count = settings.micro_batch_size, settings.gradient_accumulation
        if self.unit == SEQUENCE:
            count *= size
        self.partition = Partition(settings.global_batch_size, ranks, count if reproducible else ranks)
        self.pieces = self.partition.blocks_of(rank) if reproducible else cut(self.partition.range(rank), size)

    def windows(self) -> tuple[int, int]:
        """Return the size of a validation batch and the number of batches, which the same windows make everywhere."""
        settings = self.settings
        if self.unit == SEQUENCE:
            return 1, settings.eval_batches * settings.global_batch_size
        return settings.micro_batch_size, settings.eval_batches

    def address(self, step: int, piece: Block) -> Any:
        """Return what the dropout masks of a piece depend on, a number or a PartOfStep: its place in the run.

        step : 0, 1, ...
        """
        settings, size = self.settings, self.settings.micro_batch_size
        if self.unit == SEQUENCE:
            return step * settings.global_batch_size + piece.start
        number, first = step * settings.gradient_accumulation + piece.start // size, piece.start % size
        count = piece.stop - piece.start
        return number if count == size else PartOfStep(number, first, count, size)


def cut(run: slice, size: int) -> tuple[Block, ...]:
    """Cut a run of sequences at the multiples of `size`; a piece's index is that of its micro-batch."""
    pieces, start = [], run.start
    while start < run.stop:
        stop = min(run.stop, start - start % size + size)
        pieces.append(Block(start // size, start, stop, slice(start - run.start, stop - run.start)))
        start = stop
    return tuple(pieces)
