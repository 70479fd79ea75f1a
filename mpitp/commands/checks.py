"""What `verify` computes: the notebook's example, and a block against the dense one. Prints nothing."""
import hashlib
import os
import time
from dataclasses import dataclass, field, replace

import numpy as np

from ..oracle import feed_forward as dense
from ..sharding import rng
from ..errors import InputError, require_positive
from ..layers.mlp import ParallelMLP
from ..ops.linear import linear_forward
from ..sharding.parameters import initialise
from .layers import Ratio, on_host

REPEATS = 3         # of the timed passes; the median is reported


@dataclass
class RankPart:
    """What one rank of the notebook's example holds and computes."""
    rank: int
    features: list              # first and last + 1 of the 40 in the middle
    up_shape: tuple
    down_shape: tuple
    partial_shape: tuple
    partial_first_value: float


@dataclass
class Notebook:
    parts: list
    sum_first_value: float
    dense_first_value: float
    allclose: bool
    largest_difference: float


@dataclass
class Block:
    """A block checked against dense: everything that is printed of it."""
    what: str
    hidden_size: int
    ffn_hidden_size: int
    tokens: int
    activation: str
    gated: bool
    bias: bool
    ratios: list
    collectives: dict           # "operation elements dtype" -> calls
    expected_collectives: dict
    wire_bytes_per_rank: int
    parameter_bytes_of_ranks: list
    parameter_bytes_dense: int
    bytes_read_of_ranks: list | None
    forward_seconds: float
    backward_seconds: float
    communication_share: float  # of forward and backward, on the rank that waited least
    sha256: dict = field(default_factory=dict)

    @property
    def good(self):
        return all(ratio.good for ratio in self.ratios) and self.collectives == self.expected_collectives


def notebook_example(group, seed):
    """Input (1, 5, 10), 10 -> 40 -> 10 without bias or activation, over the ranks. On rank 0; None elsewhere."""
    layer = ParallelMLP(group, 10, 40, "identity", bias=False, seed=seed)
    x = numbers(group, seed, "notebook.x", (1, 5, 10), "float32")
    up, down = layer.parameter("up.weight"), layer.parameter("down.weight")
    # This rank's share by hand, as the ranks' partial sums are what the example is about.
    partial = linear_forward(linear_forward(x.reshape(-1, 10), up)[0], down)[0].reshape(x.shape)
    y, _ = layer.forward(x, save=False)
    owned = layer.partition.range(group.rank)
    parts = group.report(RankPart(group.rank, [owned.start, owned.stop], up.shape, down.shape, partial.shape,
                                  float(partial.flat[0])))
    weights = layer.gather()
    if group.rank != 0:
        return None
    expected = on_host(x) @ on_host(weights["up.weight"]).T @ on_host(weights["down.weight"]).T
    y = on_host(y)
    return Notebook(parts, float(y.flat[0]), float(expected.flat[0]),
                    bool(np.allclose(y, expected, rtol=1e-5, atol=1e-5)), float(np.abs(y - expected).max()))


def random_layer(group, arguments):
    """The block that the options describe, its weights (and biases, which would start at 0) from addressed numbers."""
    require_positive(hidden_size=arguments.hidden_size, ffn_hidden_size=arguments.ffn_hidden_size)
    require_room(group, arguments.hidden_size, arguments.ffn_hidden_size, arguments)
    layer = ParallelMLP(group, arguments.hidden_size, arguments.ffn_hidden_size, arguments.activation, arguments.gated,
                        arguments.bias, dtype=arguments.dtype, seed=arguments.seed)
    for name, spec in layer.specs.items():
        if len(spec.shape) == 1:
            values = initialise(replace(spec, init_std=0.1), arguments.seed, layer.dtype, group.place)
            layer.weights[name][...] = group.xp.asarray(values)
    return layer


def checkpoint_layer(group, arguments):
    """The block of one layer of a checkpoint, what it is, and on rank 0 the bytes that each rank read: its slices."""
    from ..checkpoints.loading import feed_forward
    from ..checkpoints.safetensors import Checkpoint

    def find():
        checkpoint = Checkpoint(arguments.model)
        return checkpoint, feed_forward(checkpoint, arguments.layer or 0)

    checkpoint, found = group.root_first(find)
    require_room(group, found.hidden_size, found.ffn_hidden_size, arguments)
    layer = ParallelMLP(group, found.hidden_size, found.ffn_hidden_size, found.activation, found.gated, found.bias,
                        dtype=arguments.dtype, seed=None)
    layer.load_dense(found.weights)
    stored = sorted({weight.dtype for weight in found.weights.values()})
    what = f"layer {arguments.layer or 0} of a {checkpoint.config.get('model_type', 'nameless')} checkpoint " \
           f"({'/'.join(map(str, stored))} on disk)"
    return layer, what, group.report(checkpoint.bytes_read)


def check_block(group, layer, what, bytes_read, arguments):
    """Forward and backward over the ranks against dense in float64 on rank 0. Returns Block on rank 0, else None."""
    shape = (arguments.batch, arguments.seq_length, layer.hidden_size)
    x = numbers(group, arguments.seed, "x", shape, layer.dtype)
    dy = numbers(group, arguments.seed, "dy", shape, layer.dtype)
    tokens = arguments.batch * arguments.seq_length

    y, saved = layer.forward(x)                         # once to warm up
    dx, gradients = layer.backward(dy, saved)
    forward_seconds, backward_seconds, shares = [], [], []
    for _ in range(REPEATS):
        group.ledger.clear()
        start = time.perf_counter()
        y, saved = layer.forward(x)
        middle = time.perf_counter()
        dx, gradients = layer.backward(dy, saved, out=gradients)
        end = time.perf_counter()
        forward_seconds.append(middle - start)
        backward_seconds.append(end - middle)
        shares.append(group.ledger.seconds() / (end - start))
    counts, sent = group.ledger.counts(), group.ledger.wire_bytes()
    shares = group.report(sorted(shares)[REPEATS // 2])
    local_bytes = group.report(layer.local_bytes())

    weights = layer.gather()
    gradients = layer.gather(gradients)
    if group.rank != 0:
        return None
    forward, backward = layer.collectives(tokens)
    found = {"y": rows(y), "dx": rows(dx), **{name: on_host(g) for name, g in gradients.items()}}
    ratios = error_ratios(found, rows(x), rows(dy), {k: on_host(w) for k, w in weights.items()}, layer)
    sha256 = {name: hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest() for name, value in found.items()}
    return Block(what, layer.hidden_size, layer.ffn_hidden_size, tokens, layer.activation, layer.gated,
                 layer.parameter("down.bias") is not None, ratios, readable(counts), readable(forward + backward), sent,
                 local_bytes, sum(w.nbytes for w in weights.values()), bytes_read,
                 sorted(forward_seconds)[REPEATS // 2], sorted(backward_seconds)[REPEATS // 2], min(shares),
                 sha256 if group.reproducible else {})


def error_ratios(found, x, dy, weights, layer):
    """The error ratio of every result, parallel and dense in the layer's dtype, from dense in float64."""
    name, gated = layer.activation, layer.gated

    def compute(dtype):
        w = {key: value.astype(dtype, copy=False) for key, value in weights.items()}
        y, saved = dense.mlp_forward(x.astype(dtype, copy=False), w, name, gated)
        dx, gradients = dense.mlp_backward(dy.astype(dtype, copy=False), saved, w, name, gated)
        return {"y": y, "dx": dx, **gradients}

    exact, same_dtype = compute(np.float64), compute(layer.dtype)
    magnitude = dense.mlp_magnitudes(x.astype(np.float64), dy.astype(np.float64),
                                     {key: value.astype(np.float64) for key, value in weights.items()}, name, gated)
    ratios = []
    for key, value in found.items():
        parallel = dense.error_ratio(value, exact[key], magnitude[key])
        as_dense = dense.error_ratio(same_dtype[key], exact[key], magnitude[key])
        limit = dense.limit(as_dense)
        ratios.append(Ratio(key, value.shape, parallel, as_dense, limit, parallel <= limit))
    return ratios


def require_room(group, hidden_size, ffn_hidden_size, arguments):
    """Raise InputError when the dense side in float64, all on rank 0, would not fit the memory of its machine."""
    def check():
        if group.rank != 0 or not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
            return
        tokens = arguments.batch * arguments.seq_length
        weights = hidden_size * ffn_hidden_size * (3 if arguments.gated else 2)
        # float64 weights, gradients, their magnitudes and copies; a dozen activations of both kinds
        needed = 8 * (6 * weights + 12 * tokens * (hidden_size + ffn_hidden_size))
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > there:
            raise InputError(f"found {there / 2**30:.0f} GiB of memory, expected {needed / 2**30:.0f} GiB for the "
                             f"dense side of verify in float64 on rank 0: choose smaller sizes")
    group.root_first(check)


def numbers(group, seed, name, shape, dtype):
    """Standard normals of the group's device, the same on every rank."""
    values = rng.normals(rng.key(seed, name), 0, int(np.prod(shape))).reshape(shape).astype(dtype)
    return group.xp.asarray(values)


def rows(x):
    return on_host(x).reshape(-1, x.shape[-1])


def readable(counts):
    return {f"{key.operation} {key.elements} {key.dtype}": calls for key, calls in sorted(counts.items())}
