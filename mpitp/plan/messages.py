"""Messages and bytes by the layers' own closed forms: each layer says what it sends for so many tokens."""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from ..arrays import compute_dtype, sum_dtype
from ..comm.ledger import Collective, wire_bytes
from ..config import DecoderConfig
from ..layers.decoder import Decoder
from ..layers.loss import cross_entropy_collectives
from ..sharding.parameters import Place
from .job import Job, Layout
from .paper import PaperGroup


@dataclass(frozen=True)
class Message:
    """A Message is one kind of collective of a phase.

    Attributes
    ----------
    where : str
        What sends it: "embedding", "layers.*", "head", "loss", "gradient norm", "choice".
    direction : str
        "forward" or "backward".
    operation, elements, dtype
        As a Collective's.
    calls : int
        How many of them in the phase.
    sent_bytes : int
        What a rank sends for all of them by the bandwidth-optimal algorithm.
    ranks : int
        That take part: those of a tensor group.
    """
    where: str
    direction: str
    operation: str
    elements: int
    dtype: str
    calls: int
    sent_bytes: int
    ranks: int


def messages(job: Job, layout: Layout, phase: str) -> list[Message]:
    """Return the data collectives of one "step" of training, of a "prefill", a "token", or a "window".

    They are those that the ledger of any rank counts.
    """
    model, found = paper_decoder(job, layout), []
    rows = job.batch if phase == "token" else job.rows
    times = job.accumulation if phase == "step" else 1
    for where, layer, count in (("embedding", model.embedding, 1), ("layers.*", model.blocks[0], job.config.num_layers),
                                ("head", model.head, 1)):
        forward, backward = layer.collectives(rows)
        found += as_messages(job, layout, where, "forward", forward, count * times)
        if phase == "step":
            found += as_messages(job, layout, where, "backward", backward, count * times)
    if phase in ("step", "window"):
        loss = cross_entropy_collectives(rows, job.label_smoothing, job.dtype)
        found += as_messages(job, layout, "loss", "forward", loss, times)
    if phase == "step":
        norm = Counter({Collective("all_reduce", 1, "float64"): 1})
        found += as_messages(job, layout, "gradient norm", "backward", norm, 1)
    if phase in ("prefill", "token"):
        greatest = Counter({Collective("all_gather", layout.tensor * job.batch * 2, "float64"): 1})
        found += as_messages(job, layout, "choice", "forward", greatest, 1)
    return found


def as_messages(job: Job, layout: Layout, where: str, direction: str, counts: Mapping[Collective, int],
                times: int) -> list[Message]:
    """Return the Messages of a Counter of collectives that happens so many times."""
    found = []
    for (operation, elements, dtype), calls in counts.items():
        kind = compute_dtype(dtype, "gpu") if dtype != "float64" else np.dtype(dtype)
        itemsize = sum_dtype(kind).itemsize if operation == "all_reduce" and layout.tensor > 1 else kind.itemsize
        sent = wire_bytes(operation, elements, itemsize, layout.tensor)
        found.append(Message(where, direction, operation, elements, dtype, calls * times, sent * calls * times,
                             layout.tensor))
    return found


def totals(found: list[Message]) -> tuple[int, int]:
    """Return how many messages there are, and the bytes that a rank sends for all."""
    return sum(message.calls for message in found), sum(message.sent_bytes for message in found)


def counts(found: list[Message]) -> Counter:
    """Return the messages as a Counter of Collective, to compare with a ledger's counts."""
    total: Counter = Counter()
    for message in found:
        total[Collective(message.operation, message.elements, message.dtype)] += message.calls
    return total


@lru_cache(maxsize=64)
def paper_decoder(job: Job, layout: Layout) -> Any:
    """Return a Decoder on paper with one layer, whose collectives are those of each of the job's layers."""
    group: Any = PaperGroup(Place(0, layout.tensor, layout.blocks or layout.tensor), job.device)
    return Decoder(group, of_one_layer(job.config), dtype=job.dtype, seed=None)


def of_one_layer(config: DecoderConfig) -> DecoderConfig:
    """Return the config of a decoder with the first of its layers alone."""
    first = {name: getattr(config, name)[:1] for name in ("rotary", "sliding_window")
             if isinstance(getattr(config, name), (tuple, list))}
    return replace(config, num_layers=1, **first)
