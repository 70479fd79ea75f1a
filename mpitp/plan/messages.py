"""Messages and bytes by the layers' own closed forms: each layer says what it sends for so many tokens."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ..arrays import compute_dtype, sum_dtype
from ..comm.ledger import Collective, wire_bytes
from ..config import DecoderConfig
from ..layers.closed_forms import Ways, block_collectives, norm_collectives
from ..layers.decoder import Decoder
from ..layers.loss import cross_entropy_collectives
from ..sharding.parameters import Place
from .job import Job, Layout, own_rows, pieces
from .paper import PaperGroup
from .tensors import bytes_of_ranks

BUCKET = 32 << 20       # bytes of a message of gradients at most: training/gradients.py


@dataclass(frozen=True)
class Message:
    """A Message is one kind of collective of a phase.

    Attributes
    ----------
    where : str
        What sends it: "embedding", "layers.*", "head", "loss", "gradient norm", "gradients", "choice".
    direction : str
        "forward" or "backward".
    operation, elements, dtype
        As a Collective's.
    calls : int
        How many of them in the phase.
    sent_bytes : int
        What a rank sends for all of them by the bandwidth-optimal algorithm.
    over : str
        "tensor" or "data": the group that it is summed over.
    ranks : int
        Of that group.
    """
    where: str
    direction: str
    operation: str
    elements: int
    dtype: str
    calls: int
    sent_bytes: int
    over: str
    ranks: int


def messages(job: Job, layout: Layout, phase: str, rank: int | None = None) -> list[Message]:
    """Return the data collectives of one "step" of training, of a "prefill", a "token", or a "window".

    They are those that the ledgers of a rank's groups count, the same on every rank but for the sizes of the gradients
    that a data group sums; rank None: those of the rank that has the most.
    """
    model, found = paper_decoder(job, layout), []
    whole, of_one = job.batch * (1 if phase == "token" else job.tokens), Group("tensor", layout.tensor)
    sequences = pieces(job, layout) if phase == "step" else [1]
    for batch, times in Counter(sequences).items():
        rows = batch * job.tokens if phase == "step" else whole
        lengths = own_rows(job, layout, rows)
        by_rows = replace(of_one, own=max(lengths) if rank is None else lengths[rank], rows=rows)
        for where, forward, backward, count in of_layers(job, model, rows):
            found += by_rows.messages(where, "forward", forward, count * times)
            if phase == "step":
                found += by_rows.messages(where, "backward", backward, count * times)
        if phase in ("step", "window"):
            loss = cross_entropy_collectives(rows, job.label_smoothing, job.dtype)
            found += of_one.messages("loss", "forward", loss, times)
    if phase == "step":
        if job.sequence_parallel:               # once for all forwards
            norms = [norm for norm in (model.embedding_norm, model.final_norm) if norm]
            layers = [*job.config.num_layers * [model.blocks[0]], *norms]
            found += of_one.messages("norms", "backward", norm_collectives(layers, len(sequences)), 1)
        found += of_one.messages("gradient norm", "backward", Counter({Collective("all_reduce", 1, "float64"): 1}), 1)
        if layout.data > 1:
            found += Group("data", layout.data).messages("gradients", "backward", of_gradients(job, layout, rank), 1)
    if phase in ("prefill", "token"):
        greatest = Counter({Collective("all_gather", layout.tensor * job.batch * 2, "float64"): 1})
        found += of_one.messages("choice", "forward", greatest, 1)
    return found


def of_layers(job: Job, model: Any, rows: int) -> Iterator[tuple[str, Counter, Counter, int]]:
    """Yield (where, forward's collectives, backward's, how many such layers there are) of a forward of so many rows."""
    block, layers = model.blocks[0], job.config.num_layers
    if not job.sequence_parallel:
        for where, layer, count in (("embedding", model.embedding, 1), ("layers.*", block, layers),
                                    ("head", model.head, 1)):
            yield where, *layer.collectives(rows), count
        return
    ways = Ways(rows * job.config.hidden_size, block.dtype.name, True)
    yield "embedding", ways.summed(), ways.to_all(), 1
    yield "layers.*", *block_collectives(block, rows, job.gather_again, with_norms=False), layers
    yield "head", ways.to_all(), ways.summed() + (ways.to_all() if job.gather_again else Counter()), 1


def of_gradients(job: Job, layout: Layout, rank: int | None) -> Counter:
    """Return the collectives in which a rank's gradients, and the loss, are summed over its data group."""
    dtype = sum_dtype(compute_dtype(job.dtype, job.device))
    of_ranks = bytes_of_ranks(job, layout)["gradients"]
    elements = (max(of_ranks) if rank is None else of_ranks[rank]) // dtype.itemsize
    step = elements if layout.blocks is not None else BUCKET // dtype.itemsize
    parts = [min(step, elements - at) for at in range(0, elements, step)]
    return Counter([*(Collective("all_reduce", part, dtype.name) for part in parts),
                    Collective("all_reduce", 1, "float64")])


@dataclass(frozen=True)
class Group:
    """A Group is the ranks that take part in a collective: the "tensor" group of a rank, or its "data" group.

    own, rows : of a rank in sequence parallelism, its rows and all of them, which it sends the others
    """
    over: str
    ranks: int
    own: int = 0
    rows: int = 0

    def messages(self, where: str, direction: str, counts: Mapping[Collective, int], times: int) -> list[Message]:
        """Return the Messages of a Counter of collectives that happens so many times."""
        found = []
        for (operation, elements, dtype), calls in counts.items():
            kind = compute_dtype(dtype, "gpu")
            itemsize = sum_dtype(kind).itemsize if operation == "all_reduce" and self.ranks > 1 else kind.itemsize
            sent = wire_bytes(operation, elements, itemsize, self.ranks)
            if self.rows and operation == "all_gather":         # its rows to each other rank
                sent = (self.ranks - 1) * elements // self.rows * self.own * itemsize
            elif self.rows and operation == "reduce_scatter":   # of its partial result the rows of the others
                sent = elements // self.rows * (self.rows - self.own) * sum_dtype(kind).itemsize
            found.append(Message(where, direction, operation, elements, dtype, calls * times, sent * calls * times,
                                 self.over, self.ranks))
        return found


def totals(found: list[Message]) -> tuple[int, int]:
    """Return how many messages there are, and the bytes that a rank sends for all."""
    return sum(message.calls for message in found), sum(message.sent_bytes for message in found)


def counts(found: list[Message], over: str = "tensor") -> Counter:
    """Return the messages of a group as a Counter of Collective, to compare with its ledger's counts."""
    total: Counter = Counter()
    for message in found:
        if message.over == over:
            total[Collective(message.operation, message.elements, message.dtype)] += message.calls
    return total


@lru_cache(maxsize=64)
def paper_decoder(job: Job, layout: Layout) -> Any:
    """Return a Decoder on paper with one layer, whose collectives are those of each of the job's layers."""
    group: Any = PaperGroup(Place(0, layout.tensor, layout.blocks or layout.tensor), job.device,
                            layout.blocks is not None)
    return Decoder(group, of_one_layer(job.config), dtype=job.dtype, seed=None,
                   sequence_parallel=job.sequence_parallel, gather_again=job.gather_again, recompute=job.recompute)


def of_one_layer(config: DecoderConfig) -> DecoderConfig:
    """Return the config of a decoder with the first of its layers alone."""
    first = {name: getattr(config, name)[:1] for name in ("rotary", "sliding_window")
             if isinstance(getattr(config, name), (tuple, list))}
    return replace(config, num_layers=1, **first)
