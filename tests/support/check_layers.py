"""The checks of the parallel layers against dense, as functions: the tests call them, and so do the planted faults."""
import numpy as np

import mpitp
from mpitp import oracle
from mpitp.oracle.linear import named, part
from spmd import draw


def dense_weights(specs, seed, dtype):
    """Random dense weights for every parameter, biases included, by their names inside the layer."""
    weights = {}
    for number, (name, spec) in enumerate(specs.items()):
        scale = spec.shape[-1] ** -0.5 if len(spec.shape) == 2 else 1.0
        weights[name] = (draw(seed + 1 + number, *spec.shape) * scale).astype(dtype)
    return weights


def mlp_problems(group, hidden, ffn, activation="gelu_tanh", gated=False, bias=True, dtype="float64", lead=(3, 2),
                 seed=0, load=None):
    """What is wrong with ParallelMLP against dense: names of results over the limit, and what else was expected."""
    layer = mpitp.ParallelMLP(group, hidden, ffn, activation, gated, bias, dtype=dtype, seed=seed)
    weights = dense_weights(layer.specs, seed, dtype)
    (load or mpitp.ParallelMLP.load_dense)(layer, weights)
    x, dy = draw(seed + 90, *lead, hidden, dtype=dtype), draw(seed + 91, *lead, hidden, dtype=dtype)
    before = [a.tobytes() for a in (x, dy, *layer.weights.values())]
    group.ledger.clear()
    y, saved = layer.forward(x)
    forward_counts = group.ledger.counts()
    dx, gradients = layer.backward(dy, saved)
    counts = group.ledger.counts()
    problems = []
    if [a.tobytes() for a in (x, dy, *layer.weights.values())] != before:
        problems.append("an input was changed")
    tokens = int(np.prod(lead))
    expected_forward, expected_backward = layer.collectives(tokens)
    if forward_counts != expected_forward or counts != expected_forward + expected_backward:
        problems.append(f"ledger {dict(counts)}")
    if y.shape != x.shape or dx.shape != x.shape or y.dtype != x.dtype or dx.dtype != x.dtype:
        problems.append("shape or dtype")
    y_again, nothing = layer.forward(x, save=False)
    if nothing is not None or not np.array_equal(y, y_again):
        problems.append("forward(save=False) differs")
    gradients = group.comm.bcast(layer.gather(gradients))
    found = {"y": y.reshape(-1, hidden), "dx": dx.reshape(-1, hidden), **gradients}
    return problems + over_the_limit(found, x.reshape(-1, hidden), dy.reshape(-1, hidden), weights, activation, gated)


def over_the_limit(found, x, dy, weights, activation, gated):
    """Names of results of a feed-forward block that lie further from exact than the accuracy formula allows."""
    assert gated == ("gate.weight" in weights)

    def dense(w, x, dy):
        y, saved = oracle.feed_forward.forward(x, w, activation)
        dx, gradients = oracle.feed_forward.backward(dy, saved)
        results = {"y": y, "dx": dx, **gradients}
        return {name: results[name] for name in found}

    # The derivative of relu jumps at 0: a sign that rounding flips is within the magnitude, and not within the norm.
    return [comparison.name for comparison in oracle.compare_all(found, dense, weights, x, dy)
            if not (comparison.good and (comparison.near or activation == "relu"))]


def dense_linear(w, x, dy):
    """The results of a linear layer named "l"."""
    y, saved = oracle.linear.forward(x, part(w, "l"))
    dx, gradients = oracle.linear.backward(dy, saved)
    return {"y": y, "dx": dx, **named("l", gradients)}


def linear_problems(group, kind, in_features, out_features, bias=True, whole=False, dtype="float64", lead=(5,), seed=0):
    """What is wrong with a parallel linear. whole: gather_output, or input_is_parallel=False."""
    if kind == "column":
        layer = mpitp.ColumnParallelLinear(group, in_features, out_features, bias, whole, dtype=dtype, name="l")
    else:
        layer = mpitp.RowParallelLinear(group, in_features, out_features, bias, not whole, dtype=dtype, name="l")
    weights = dense_weights(layer.specs, seed, dtype)
    layer.load_dense(weights)
    x, dy = draw(seed + 90, *lead, in_features, dtype=dtype), draw(seed + 91, *lead, out_features, dtype=dtype)
    mine = layer.partition.range(group.rank)
    x_given = np.ascontiguousarray(x[..., mine]) if kind == "row" and not whole else x
    dy_given = np.ascontiguousarray(dy[..., mine]) if kind == "column" and not whole else dy
    before = [a.tobytes() for a in (x_given, dy_given, *layer.weights.values())]
    group.ledger.clear()
    y, saved = layer.forward(x_given)
    dx, gradients = layer.backward(dy_given, saved)
    counts = group.ledger.counts()
    problems = []
    if [a.tobytes() for a in (x_given, dy_given, *layer.weights.values())] != before:
        problems.append("an input was changed")
    forward, backward = layer.collectives(int(np.prod(lead)))
    if counts != forward + backward:
        problems.append(f"ledger {dict(counts)}")
    if kind == "column" and not whole:
        y = group.all_gather(y, layer.partition)
    if kind == "row" and not whole:
        dx = group.all_gather(dx, layer.partition)
    gradients = group.comm.bcast(layer.gather(gradients))
    found = {"y": y, "dx": dx, **gradients}
    if y.shape != (*lead, out_features) or dx.shape != (*lead, in_features):
        problems.append("shape")
    return problems + [comparison.name for comparison in oracle.compare_all(found, dense_linear, weights, x, dy)
                       if not (comparison.good and comparison.near)]
