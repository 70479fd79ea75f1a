"""One feed-forward block of a real size over the ranks against the dense one: errors, collectives, memory, time."""
import hashlib
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .. import oracle
from ..arrays import Array, on_host
from ..comm.agreement import same_everywhere
from ..comm.group import TensorParallelGroup
from ..errors import InputError, require_positive
from ..layers.mlp import ParallelMLP
from ..oracle.comparison import Comparison, compare_results, in_float32, on_magnitudes
from ..sharding.parameters import initialise
from . import Step
from .numbers import standard_normals

REPEATS = 3         # of the timed passes; the median is reported


@dataclass
class FeedForwardResult:
    """Everything that is printed of one block.

    Parameters
    ----------
    what : str
        Where the weights are from.
    hidden_size, ffn_hidden_size, tokens : int
    activation : str
    gated, bias : bool
    comparisons : list of Comparison
        One of every output and gradient.
    collectives, expected_collectives : dict
        "operation elements dtype" -> calls: counted by the ledger, and by the closed form.
    wire_bytes_per_rank : int
        Sent by a rank, forward and backward.
    parameter_bytes_of_ranks : list of int
    parameter_bytes_dense : int
    bytes_read_of_ranks : list of int or None
        Of the checkpoint, by rank; None without one.
    forward_seconds, backward_seconds : float
        Medians on rank 0.
    communication_share : float
        Of forward and backward, on the rank that waited least.
    sha256 : dict
        Of each result, in reproducible mode.
    """
    what: str
    hidden_size: int
    ffn_hidden_size: int
    tokens: int
    activation: str
    gated: bool
    bias: bool
    comparisons: list[Comparison]
    collectives: dict
    expected_collectives: dict
    wire_bytes_per_rank: int
    parameter_bytes_of_ranks: list
    parameter_bytes_dense: int
    bytes_read_of_ranks: list | None
    forward_seconds: float
    backward_seconds: float
    communication_share: float
    sha256: dict = field(default_factory=dict)

    def is_good(self, comparison: Comparison) -> bool:
        """Return whether a result is within its limits.

        The derivative of relu jumps at 0. A sign that rounding flips changes a gradient by its own size, which the
        magnitudes admit and the norm does not: with relu the elementwise limit alone counts.
        """
        return comparison.good and (comparison.near or self.activation == "relu")

    @property
    def good(self) -> bool:
        """Whether every result is within its limits, and the collectives are those of the closed form."""
        return all(map(self.is_good, self.comparisons)) and self.collectives == self.expected_collectives


class FeedForwardCheck:
    """A FeedForwardCheck runs a ParallelMLP forward and backward on random inputs, against the dense block.

    Parameters
    ----------
    group : TensorParallelGroup
    layer : ParallelMLP
        With its weights.
    batch, seq_length : int
        Sequences, and tokens of each.
    seed : int
        Of x and dy.
    what : str
        Where the weights are from.
    bytes_read : list of int, optional
        What each rank read of a checkpoint.
    """

    def __init__(self, group: TensorParallelGroup, layer: ParallelMLP, batch: int, seq_length: int, seed: int,
                 what: str = "random weights", bytes_read: list | None = None) -> None:
        self.group, self.layer, self.what, self.bytes_read = group, layer, what, bytes_read
        shape = batch, seq_length, layer.hidden_size
        self.tokens = batch * seq_length
        self.x, self.dy = (group.xp.asarray(standard_normals(seed, name, shape, layer.dtype)) for name in ("x", "dy"))
        self.figures: dict[str, Any] = {}                       # fields of the result
        self.weights: Mapping[str, Array] = {}                  # these by name, on rank 0
        self.found: Mapping[str, Array] = {}
        self.exact: Mapping[str, oracle.Magnitude] = {}
        self.single: Mapping[str, Array] = {}

    def steps(self) -> list[Step]:
        """Return what is to be done, in order; the last step returns the FeedForwardResult, None but on rank 0."""
        return [("forward and backward over the ranks", self.run_over_ranks),
                ("exact results and their magnitudes", self.run_exact),
                ("dense results in float32", self.run_single),
                ("comparison", self.compare)]

    def run_over_ranks(self) -> None:
        """Run forward and backward several times, and leave on rank 0 what came out and what it took."""
        group, layer = self.group, self.layer
        y, saved = layer.forward(self.x)                        # once to warm up
        dx, gradients = layer.backward(self.dy, saved)
        forward_seconds, backward_seconds, shares = [], [], []
        for _ in range(REPEATS):
            group.ledger.clear()
            start = time.perf_counter()
            y, saved = layer.forward(self.x)
            middle = time.perf_counter()
            dx, gradients = layer.backward(self.dy, saved, out=gradients)
            end = time.perf_counter()
            forward_seconds.append(middle - start)
            backward_seconds.append(end - middle)
            shares.append(group.ledger.seconds() / (end - start))
        forward, backward = layer.collectives(self.tokens)
        self.figures.update(
            collectives=readable(group.ledger.counts()), expected_collectives=readable(forward + backward),
            wire_bytes_per_rank=group.ledger.wire_bytes(), forward_seconds=sorted(forward_seconds)[REPEATS // 2],
            backward_seconds=sorted(backward_seconds)[REPEATS // 2],
            communication_share=min(group.report(sorted(shares)[REPEATS // 2]) or [0.0]),
            parameter_bytes_of_ranks=group.report(layer.local_bytes()))
        weights, dense_gradients = layer.gather(), layer.gather(gradients)
        if weights is not None and dense_gradients is not None:             # rank 0
            self.weights = {name: on_host(w) for name, w in weights.items()}
            self.found = {"y": rows(y), "dx": rows(dx), **{name: on_host(g) for name, g in dense_gradients.items()}}

    def dense(self, w: dict[str, Array], x: Array, dy: Array) -> dict[str, Array]:
        """Compute the same results by the dense block."""
        y, saved = oracle.feed_forward.forward(x, w, self.layer.activation)
        dx, gradients = oracle.feed_forward.backward(dy, saved)
        return {"y": y, "dx": dx, **gradients}

    def run_exact(self) -> None:
        """Compute the exact results on rank 0, which takes what it takes."""
        if self.group.watch:
            self.group.watch.wait_for_ever()
        if self.group.rank == 0:
            self.exact = on_magnitudes(self.dense, self.weights, rows(self.x), rows(self.dy))

    def run_single(self) -> None:
        """Compute the results of one process in float32 on rank 0."""
        if self.group.rank == 0:
            self.single = in_float32(self.dense, self.weights, rows(self.x), rows(self.dy))

    def compare(self) -> FeedForwardResult | None:
        """Judge what was found on rank 0."""
        if self.group.rank != 0:
            return None
        layer, sha256 = self.layer, {}
        if self.group.reproducible:
            sha256 = {name: hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
                      for name, array in self.found.items()}
        return FeedForwardResult(
            what=self.what, hidden_size=layer.hidden_size, ffn_hidden_size=layer.ffn_hidden_size, tokens=self.tokens,
            activation=layer.activation, gated=layer.gated, bias="down.bias" in self.weights,
            comparisons=compare_results(self.found, self.exact, self.single),
            parameter_bytes_dense=sum(w.nbytes for w in self.weights.values()), bytes_read_of_ranks=self.bytes_read,
            sha256=sha256, **self.figures)


# --- the layer -----------------------------------------------------------------------------------------------------

def random_layer(group: TensorParallelGroup, hidden_size: int, ffn_hidden_size: int, activation: str, gated: bool,
                 bias: bool, dtype: str, seed: int) -> ParallelMLP:
    """Return a block with random weights, and random biases, which would start at 0."""
    layer = ParallelMLP(group, hidden_size, ffn_hidden_size, activation, gated, bias, dtype=dtype, seed=seed)
    for name, spec in layer.specs.items():
        if len(spec.shape) == 1:
            values = initialise(replace(spec, init_std=0.1), seed, layer.dtype, group.place)
            layer.weights[name][...] = group.xp.asarray(values)
    return layer


def require_room(group: TensorParallelGroup, hidden_size: int, ffn_hidden_size: int, gated: bool, tokens: int) -> None:
    """Raise InputError on every rank when the dense side would not fit the memory of rank 0's machine. Collective."""
    require_positive(hidden_size=hidden_size, ffn_hidden_size=ffn_hidden_size)
    weights = hidden_size * ffn_hidden_size * (3 if gated else 2)
    # float64 weights, gradients, their magnitudes and copies; a dozen activations of both kinds
    needed = 8 * (6 * weights + 12 * tokens * (hidden_size + ffn_hidden_size))
    group.on_root(lambda: require_memory(needed))


def require_memory(needed: int) -> None:
    """Raise InputError unless this machine has so many bytes of memory; where it does not tell, it is believed to."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise InputError(f"found {there / 2**30:.0f} GiB of memory, expected {needed / 2**30:.0f} GiB for the dense "
                         f"side of verify in float64 on rank 0: choose smaller sizes")


def checkpoint_layer(group: TensorParallelGroup, folder: str, layer: int, dtype: str, tokens: int,
                     every_byte: bool = False) -> tuple[ParallelMLP, str, list | None]:
    """Return the block of one layer of a checkpoint folder. Collective.

    Raises InputError on every rank unless all have opened the same contents; every_byte: as fingerprint's.

    Returns
    -------
    layer : ParallelMLP
    what : str
        Where the weights are from.
    bytes_read : list of int or None
        What each rank read of the folder, its slices alone; None but on rank 0.
    """
    from ..checkpoints.fingerprint import fingerprint
    checked = group.on_root(lambda: open_layer(folder, layer))
    checkpoint, block = same_everywhere(group.comm, lambda: checked or open_layer(folder, layer),
                                        lambda opened: fingerprint(opened[0], every_byte))
    require_room(group, block.hidden_size, block.ffn_hidden_size, block.gated, tokens)
    mlp = ParallelMLP(group, block.hidden_size, block.ffn_hidden_size, block.activation, block.gated, block.bias,
                      dtype=dtype, seed=None)
    mlp.load_dense(block.weights)
    stored = sorted({str(weight.dtype) for weight in block.weights.values()})
    what = f"layer {layer} of a {checkpoint.kind} checkpoint ({'/'.join(stored)} on disk)"
    return mlp, what, group.report(checkpoint.bytes_read)


def open_layer(folder: str, layer: int) -> tuple[Any, Any]:
    """Return the checkpoint of a folder, and what it holds of one feed-forward block."""
    from ..checkpoints.loading import feed_forward
    from ..checkpoints.step_models import open_checkpoint
    checkpoint = open_checkpoint(folder)
    return checkpoint, feed_forward(checkpoint, layer)


# --- small things --------------------------------------------------------------------------------------------------

def rows(x: Array) -> Array:
    """Return the array on the host, all its tokens in one axis."""
    return on_host(x).reshape(-1, x.shape[-1])


def readable(counts: Counter) -> dict[str, int]:
    """Return counts of collectives by names such as "all_reduce 65536 float32"."""
    return {f"{key.operation} {key.elements} {key.dtype}": calls for key, calls in sorted(counts.items())}
