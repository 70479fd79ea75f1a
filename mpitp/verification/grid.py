"""A step's gradients on a data x tensor grid of the ranks against one dense batch: rows of `verify --all`."""
from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np

from .. import oracle
from ..arrays import Array
from ..comm.group import TensorParallelGroup
from ..config import DecoderConfig
from ..grid import Grid
from ..layers.loss import cross_entropy_collectives
from ..training.data import IGNORED
from ..training.loop import Trainer
from ..training.settings import Settings

SEQUENCES, LENGTH = 5, 9        # which no number of data ranks divides


class Batch:
    """Tokens that a Trainer asks for: one batch, of whose last sequence one token counts."""
    seq_length = LENGTH

    def __init__(self, ids: Array, targets: Array):
        self.ids, self.targets = ids, targets.copy()
        self.targets[-1, 1:] = IGNORED

    def batch(self, number: int, size: int) -> tuple[Array, Array]:
        """Return inputs and targets (sequences, S)."""
        return self.ids, self.targets


def grids(group: TensorParallelGroup) -> tuple[tuple[str, int], ...]:
    """Return (title, data ranks) of the grids that are checked: the fewest data ranks that divide, and all."""
    fewest = next((data for data in range(2, group.size + 1) if group.size % data == 0), 1)
    return ("decoder on a data x tensor grid", fewest), ("decoder on a grid of data ranks", group.size)


def check(of_all: Any, title: str, data: int, options: dict[str, Any]) -> Any:
    """Check loss and gradients of a batch that is dealt over so many data ranks.

    of_all : EveryLayerCheck, which draws and judges
    """
    group, config = of_all.group, DecoderConfig(**options)
    chosen = replace(group.options, transport=group.transport.name, gpu=group.gpu and group.gpu.number, share_gpu=True)
    with Grid(group.comm, data=data, **asdict(chosen)) as grid:
        batch = Batch(of_all.ids("grid ids", SEQUENCES, LENGTH), of_all.ids("grid targets", SEQUENCES, LENGTH))
        settings = Settings(micro_batch_size=SEQUENCES, label_smoothing=0.1)
        tokens: Any = batch
        made = Trainer(grid, config, tokens, settings, dtype=of_all.dtype)
        weights = of_all.load(made.model)
        loss = made.sum_gradients()
        counts = made.group.ledger.counts() + grid.data.ledger.counts()
        expected = made.sum.collectives()
        for piece in made.dealing.pieces:
            count = (piece.stop - piece.start) * LENGTH
            for one in (*made.model.collectives(count), cross_entropy_collectives(count, 0.1, of_all.dtype)):
                expected += one
        found = {"loss": np.asarray(loss, of_all.dtype), **(made.model.gather(made.gradients) or {})}
    return of_all.judge(title, counts, [expected, Counter()], found, partial(dense, batch, config), weights)


def dense(batch: Batch, config: DecoderConfig, w: dict[str, Any]) -> dict[str, Any]:
    """Compute the same on one process."""
    logits, saved = oracle.decoder.forward(batch.ids, w, config)
    loss, saved_loss = oracle.cross_entropy.forward(logits, batch.targets, 0.1)
    return {"loss": loss, **oracle.decoder.backward(oracle.cross_entropy.backward(saved_loss), saved)}
