"""Running error analysis on trial: operations by hand, float32 runs of each layer below it, planted errors above it.

How small an error of a product the bound shows was found by planting, and is in SEEN. Through a block the bound
grows: in float32, with norms before and after, it hides a product ten times too large, which the normwise ratio shows.
"""
import numpy as np
import pytest

from decoder_cases import KINDS, config
from golden_decoder import ids_and_targets, shapes, weights_of
from mpitp import oracle
from mpitp.oracle import Magnitude, activation
from mpitp.oracle.activation import ACTIVATIONS
from mpitp.oracle.linear import part
from mpitp.oracle.magnitude import numbers_of
from spmd import draw

LIMIT = oracle.limit()                      # where the dense run itself is good
# What float32 runs stay below, of any kind and seed.
BELOW = {"linear": 2, "norm": 1, "attention": 1, "mlp": 1, "cross entropy": 1, "block": 0.5}
# What relative error of any one product is seen, in any kind.
SEEN = {("linear", "f"): 1e-5, ("norm", "f"): 1e-4, ("attention", "f"): 1e-2, ("mlp", "f"): 1e-4,
        ("cross entropy", "f"): 2e-3, ("linear", "d"): 1e-13, ("norm", "d"): 1e-12, ("attention", "d"): 1e-10,
        ("mlp", "d"): 1e-12, ("cross entropy", "d"): 1e-11, ("block", "d"): 1e-5}


def layer_case(layer, kind, seed=0, dtype="f"):
    """results(weights, x, dy), weights, x and dy of one layer: all float32 numbers of about unit size."""
    configuration = config(kind)
    x, dy = (draw(2 * seed + number, 2, 7, 20, dtype="f").astype(dtype) for number in (500, 501))
    name = {"block": "layers.0", "norm": "final_norm"}.get(layer, f"layers.0.{layer}")
    of_layer = part(shapes(configuration), name)
    if layer == "linear":
        of_layer = {"weight": (20, 20), "bias": (20,)}
    elif layer == "norm":
        of_layer = {"weight": (20,), **({"bias": (20,)} if configuration.has_norm_bias else {})}
    weights = {}
    for number, (name, shape) in enumerate(of_layer.items()):
        w = draw(1000 * seed + number, *shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.3)
        weights[name] = (w + (len(shape) == 1 and name.endswith("weight"))).astype("f").astype(dtype)
    if layer == "cross entropy":
        targets = np.random.default_rng(seed).integers(0, 20, (2, 7))
        targets[0, 1] = -100
        return lambda w, x, dy: loss_and_gradient(x, targets), {}, x * 3, dy
    module = {"mlp": oracle.feed_forward}.get(layer) or getattr(oracle, layer)
    more = {"norm": oracle.norm.options(configuration), "mlp": {"activation": configuration.activation},
            "linear": {}}.get(layer, {"config": configuration})

    def results(w, x, dy):
        y, saved = module.forward(x, w, **more)
        dx, gradients = module.backward(dy, saved)
        return {"y": y, "dx": dx, **gradients}
    return results, weights, x, dy


def loss_and_gradient(logits, targets):
    loss, saved = oracle.cross_entropy.forward(logits, targets, 0.1)
    return {"loss": loss, "dx": oracle.cross_entropy.backward(saved)}


def largest(found, results, *arrays):
    """The largest error of any result, over eps times its magnitude."""
    found = {name: np.asarray(array, arrays[-1].dtype) for name, array in found.items()}
    return max(comparison.error for comparison in oracle.compare_all(found, results, *arrays))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", BELOW)
def test_float32_runs_lie_below(layer, kind):
    for seed in range(20 if kind == "gpt2" else 3):
        results, *arrays = layer_case(layer, kind, seed)
        assert largest(results(*arrays), results, *arrays) < BELOW[layer], seed


# --- planted errors ------------------------------------------------------------------------------------------------

class Planted(np.ndarray):
    """An array whose products are right but for one, counted from 0, which is too large by a relative `error`."""
    at, error, count = None, 0.0, 0

    def product(self, y):
        y = y * y.dtype.type(1 + self.error) if Planted.count == self.at else y
        Planted.count += 1
        return y

    def __matmul__(self, other):
        return self.product(np.asarray(self) @ np.asarray(other)).view(Planted)


class PlantedElementwise(Planted):
    def __mul__(self, other):
        return self.product(np.asarray(self) * np.asarray(other)).view(PlantedElementwise)

    def __truediv__(self, other):
        return self.product(np.asarray(self) / np.asarray(other)).view(PlantedElementwise)


def planted(layer, results, weights, x, dy, at=None, error=0.0):
    """The results with an error in one product, and how many products there are. at None: no error."""
    kind = PlantedElementwise if layer in ("norm", "cross entropy") else Planted
    Planted.at, Planted.error, Planted.count = at, error, 0
    return results({name: w.view(kind) for name, w in weights.items()}, x.view(kind), dy.view(kind)), Planted.count


@pytest.mark.parametrize("layer, dtype", SEEN)
def test_an_error_in_any_product_is_seen(layer, dtype):
    for kind in ("gpt2", "llama, one kv head", "gemma3", "after the residual"):
        results, *arrays = layer_case(layer, kind, dtype=dtype)
        found, count = planted(layer, results, *arrays)
        assert largest(found, results, *arrays) <= LIMIT and count > 2
        for at in range(count):
            found, _ = planted(layer, results, *arrays, at=at, error=SEEN[layer, dtype])
            Planted.at = None                               # not in what `largest` computes
            assert largest(found, results, *arrays) > LIMIT, (kind, at)


@pytest.mark.parametrize("dtype, error", [("f", 1e-3), ("d", 1e-11)])
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_in_any_product_of_a_decoder_is_seen_by_norms(kind, dtype, error):
    configuration, (ids, targets) = config(kind), ids_and_targets(config(kind))
    weights, known = {name: w.astype(dtype) for name, w in weights_of(configuration).items()}, {}

    def results(w):
        logits, saved = oracle.decoder.forward(ids, w, configuration)
        loss = loss_and_gradient(logits, targets)
        return {"logits": logits, "loss": loss["loss"], **oracle.decoder.backward(loss["dx"], saved)}

    def once(w):                                            # what `compare_all` asks for does not change
        first = w["embedding.weight"]
        key = type(first), first.dtype
        if key not in known:
            known[key] = results(w)
        return known[key]

    def far(at):
        Planted.at, Planted.error, Planted.count = at, error, 0
        found = results({name: w.view(Planted) for name, w in weights.items()})
        found = {name: np.asarray(array, dtype) for name, array in found.items()}
        return [comparison.name for comparison in oracle.compare_all(found, once, weights) if not comparison.near]
    assert far(None) == [] and Planted.count > 50
    assert [at for at in range(Planted.count) if not far(at)] == []


# --- operations by hand ----------------------------------------------------------------------------------------------

A, B = Magnitude([3.0, -2.0], np.array([0.5, 0.25])), Magnitude([4.0, 1.0], np.array([1.0, 2.0]))
FOUR = Magnitude(4.0, np.array(1.0))


@pytest.mark.parametrize("found, values, sizes", [
    (A + B, [7, -1], [7 + 0.5 + 1, 1 + 0.25 + 2]),
    (A - B, [-1, -3], [1 + 0.5 + 1, 3 + 0.25 + 2]),
    (A * B, [12, -2], [12 + 3 * 1 + 0.5 * 4, 2 + 2 * 2 + 0.25 * 1]),
    (A / B, [0.75, -2], [0.75 + (0.5 + 0.75 * 1) / 4, 2 + (0.25 + 2 * 2) / 1]),
    (-A, [-3, 2], [0.5, 0.25]),
    (A @ B, 10, 3 * (4 + 1) + 2 * (1 + 2) + 0.5 * 4 + 0.25 * 1),
    (A.sum(), 1, (3 + 0.5) + (2 + 0.25)),
    (np.exp(A - A), [1, 1], [1 + 1, 1 + 0.5]),
    (np.log(FOUR), np.log(4), np.log(4) + 1 / 4),
    (np.sqrt(FOUR), 2, 2 + 1 / (2 * 2)),
    (2 - A, [-1, 4], [1 + 0.5, 4 + 0.25]),
    (2 / A, [2 / 3, -1], [2 / 3 + 2 / 3 * 0.5 / 3, 1 + 1 * 0.25 / 2]),
    (2 * A + 1, [7, -3], [7 + 6 + 2 * 0.5, 3 + 4 + 2 * 0.25]),
    (np.array([1.0, 2.0]) + A, [4, 0], [4 + 0.5, 0.25]),            # NumPy is asked first, and gives way
    (np.array([[1.0, 2.0]]) @ A, [-1], [1 * 3.5 + 2 * 2.25]),
])
def test_operations(found, values, sizes):
    np.testing.assert_allclose(found.value, values, rtol=1e-15)
    np.testing.assert_allclose(found.size, np.broadcast_to(sizes, found.shape), rtol=1e-15)


def test_what_moves_numbers_adds_nothing():
    assert Magnitude([1, 2]).is_exact and Magnitude([[1, 2]]).T[0].is_exact and not A.T.is_exact
    m = Magnitude(draw(0, 2, 3, 4), np.abs(draw(1, 2, 3, 4)))
    for move in (lambda a: a.reshape(6, 4), lambda a: a.transpose(2, 0, 1), lambda a: a.swapaxes(0, 1), lambda a: a.T,
                 lambda a: a[1, ..., ::2]):
        assert (move(m).value == move(m.value)).all() and (move(m).size == move(m.size)).all()
    assert len(m) == 2 and m.ndim == 3 and m.shape == (2, 3, 4) and m.dtype == np.float64
    assert numbers_of(m) is m.value and numbers_of(m.value) is m.value
    assert (Magnitude([1, 2]).size == 0).all() and Magnitude([1, 2]).dtype == np.float64


@pytest.mark.parametrize("operation", [
    lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, lambda a, b: a / b, lambda a, b: a @ b.T,
    lambda a, b: np.exp(a), lambda a, b: np.log(b * b), lambda a, b: np.sqrt(b * b + 1), lambda a, b: a.sum(axis=0),
    lambda a, b: np.exp(a) / np.exp(a).sum(axis=-1, keepdims=True), lambda a, b: activation.forward(a, "gelu")[0],
    lambda a, b: activation.forward(a, "silu")[1]])
def test_no_small_errors_of_the_operands_do_more(operation):
    """The bound less that of exact operands is what their errors may become, to first order."""
    a, b, size_a, size_b = draw(0, 5, 4), 2 + np.abs(draw(1, 5, 4)), np.abs(draw(2, 5, 4)), np.abs(draw(3, 5, 4))
    bound, without = operation(Magnitude(a, size_a), Magnitude(b, size_b)), operation(Magnitude(a), Magnitude(b))
    tiny, worst = 1e-6, 0.0
    for seed in range(30):
        signs = np.sign(draw(seed, 2, 5, 4))
        moved = operation(a + tiny * signs[0] * size_a, b + tiny * signs[1] * size_b)
        ratio = np.abs(moved - operation(a, b)) / (tiny * (bound.size - without.size))
        worst = max(worst, ratio.max())
    assert 0.05 < worst < 1 + 1e-4, worst


def test_what_it_does_not_know_is_refused():
    for wrong in (lambda: np.sinh(A), lambda: np.exp(A, out=np.zeros(2)), lambda: np.add.reduce(A)):
        with pytest.raises(TypeError):
            wrong()


def test_activations_of_arrays_and_of_magnitudes():
    h = draw(0, 50)
    for name, plain in ACTIVATIONS.items():
        for found, right in zip(activation.forward(h, name), plain(h)):
            assert (found == right).all()
        for found, right in zip(activation.forward(Magnitude(h), name), plain(h)):
            assert (found.value == right).all() and found.size.shape == h.shape
