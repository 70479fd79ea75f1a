"""The oracle on trial: the dense feed-forward block against PyTorch's numbers, numeric derivatives and planted errors;
the two ratios by hand."""
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from make_golden_mlp import ACTIVATIONS, FILE, inputs
from mpitp import oracle
from mpitp.oracle import activation as activations
from spmd import draw

GOLDEN = {(case["activation"], case["gated"]): case for case in json.loads(FILE.read_text())["cases"]}
BOTH = pytest.mark.parametrize("gated", [False, True], ids=["single", "gated"])
EVERY = pytest.mark.parametrize("activation", ACTIVATIONS)


def block(tokens, hidden, ffn, gated, bias=True, dtype=np.float64, scale=1.0):
    """x, dy and weights of about unit size."""
    shapes = {"up.weight": (ffn, hidden), "up.bias": (ffn,), "gate.weight": (ffn, hidden), "gate.bias": (ffn,),
              "down.weight": (hidden, ffn), "down.bias": (hidden,)}
    w = {name: draw(number, *shape, dtype=dtype) / dtype(shape[-1] ** 0.5 if len(shape) == 2 else 1)
         for number, (name, shape) in enumerate(shapes.items())
         if (bias or "weight" in name) and (gated or "gate" not in name)}
    return draw(10, tokens, hidden, dtype=dtype) * dtype(scale), draw(11, tokens, hidden, dtype=dtype), w


def results(x, dy, w, activation):
    y, saved = oracle.feed_forward.forward(x, w, activation)
    dx, gradients = oracle.feed_forward.backward(dy, saved)
    return {"y": y, "dx": dx, **gradients}


def compared(found, x, dy, w, activation):
    """{name: Comparison}"""
    found = oracle.compare_all(found, lambda w, x, dy: results(x, dy, w, activation), w, x, dy)
    return {comparison.name: comparison for comparison in found}


def errors(found, x, dy, w, activation):
    return {name: comparison.error for name, comparison in compared(found, x, dy, w, activation).items()}


@BOTH
@EVERY
def test_the_numbers_of_pytorch(activation, gated):
    w = inputs(gated)
    x, dy = w.pop("x"), w.pop("dy")
    golden = {name: np.array(value) for name, value in GOLDEN[activation, gated].items() if isinstance(value, list)}
    found = errors(golden, x, dy, w, activation)
    assert max(found.values()) <= 4, found


@BOTH
@EVERY
def test_numeric_gradients(activation, gated):
    """(L(v + e d) - L(v - e d)) / 2e = <dL/dv, d>, L = <dy, y>, for one random direction d of each variable v."""
    x, dy, w = block(4, 6, 9, gated)
    gradients = results(x, dy, w, activation)
    for number, name in enumerate(["x", *w]):
        value, gradient = (x, gradients["dx"]) if name == "x" else (w[name], gradients[name])
        d = draw(20 + number, *value.shape)

        def loss(step):
            moved = value + step * d
            y, _ = oracle.feed_forward.forward(*((moved, w) if name == "x" else (x, {**w, name: moved})), activation)
            return (dy * y).sum()

        e = 1e-6
        numeric, analytic = (loss(e) - loss(-e)) / (2 * e), (gradient * d).sum()
        assert abs(numeric - analytic) <= 1e-7 * np.abs(gradient * d).sum(), name


@EVERY
def test_slope_and_bend_of_the_activations(activation):
    h, e = np.linspace(-8, 8, 4001) + 1e-4, 1e-6            # not on relu's kink
    (_, slope), bend = activations.forward(h, activation), activations.BEND[activation]
    (right, right_slope), (left, left_slope) = (activations.forward(h + s, activation) for s in (e, -e))
    assert np.abs((right - left) / (2 * e) - slope).max() < 1e-8
    assert np.abs((right_slope - left_slope) / (2 * e)).max() <= bend + 1e-8
    with np.errstate(invalid="ignore"):
        assert np.isnan(activations.forward(np.array([np.nan]), activation)[0]).all()


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(tokens=st.integers(1, 40), hidden=st.integers(1, 40), ffn=st.integers(1, 90), gated=st.booleans(),
       activation=st.sampled_from(ACTIVATIONS), bias=st.booleans(), scale=st.sampled_from([0.1, 1, 4]))
def test_float32_is_a_few_roundings_away(tokens, hidden, ffn, gated, activation, bias, scale):
    """With magnitudes that are too small the limit would be void, with ones that are too large it would be blind."""
    x, dy, w = block(tokens, hidden, ffn, gated, bias, np.float32, scale)
    found = errors(results(x, dy, w, activation), x, dy, w, activation)
    assert max(found.values()) < 2.5, found
    assert tokens * hidden * ffn < 50 or max(found.values()) > 0.02, found


@BOTH
@EVERY
def test_an_error_of_a_thousandth_in_one_entry_is_far_over_the_limit(activation, gated):
    x, dy, w = block(16, 12, 48, gated, dtype=np.float32)
    right = results(x, dy, w, activation)
    good = compared(right, x, dy, w, activation)
    for name, value in right.items():
        wrong, place = value.copy(), np.unravel_index(np.abs(value).argmax(), value.shape)
        wrong[place] *= np.float32(1.001)
        found = compared({**right, name: wrong}, x, dy, w, activation)
        assert found[name].error > 10 * good[name].limit and not found[name].good, name
        assert found[name].worst == tuple(place) and found[name].found == wrong[place], name
        assert {**found, name: good[name]} == good, name


def test_a_sign_that_float32_may_lose_is_no_error():
    """relu of h = 1 - 1 + 1e-9: 0 in float32, and either derivative is as good."""
    x, dy = np.array([[1.0, 1.0, 1.0]]), np.array([[1.0, 1.0, 1.0]])
    w = {"up.weight": np.array([[1.0, -1.0, 1e-9]]), "down.weight": np.ones((3, 1))}
    flipped = {name: value.astype("f") for name, value in w.items()}
    flipped["up.weight"][0, 2] = -1e-9
    found = results(x.astype("f"), dy.astype("f"), flipped, "relu")
    assert max(errors(found, x, dy, w, "relu").values()) < 4
    w["up.weight"][0, 2] = 1e-3                             # but this one float32 sees
    assert errors(found, x, dy, w, "relu")["dx"] > 1e6


def test_error_ratio_of_what_is_no_number():
    one, ratio = np.ones(3), oracle.error_ratio
    eps = np.finfo(np.float64).eps
    assert ratio(one, one, one) == 0 and ratio(one * (1 + eps), one, one) == 1
    assert ratio(one, one * 0, one * 0) == math.inf
    assert ratio(one * 0, one * 0, one * 0) == 0 and ratio(np.ones((0, 3)), np.ones((0, 3)), np.ones((0, 3))) == 0
    for wrong in (np.nan, np.inf, -np.inf):
        assert ratio(np.array([1, wrong, 1]), one, one) == math.inf
    assert ratio(np.ones(1), one, one) == math.inf and ratio(np.ones((0, 3)), one, one) == math.inf
    assert ratio(one.astype("f") + np.float32(1e-6), one, one) < 10 < ratio(one + 1e-6, one, one)


def test_limits():
    """Those of a dense run without one, of a good one, of a bad one, and of one that overflowed."""
    assert [oracle.limit(dense) for dense in (math.nan, 0.5, 16, math.inf)] == [4, 4, 32, 4]
    assert [oracle.normwise_limit(dense) for dense in (math.nan, 3, 16, math.inf)] == [128, 128, 512, 128]


def test_normwise_ratio():
    exact, eps = np.array([3.0, 4.0]), np.finfo(np.float32).eps
    found = np.float32([3 + 10 * eps, 4])
    assert oracle.normwise_ratio(found, exact) == 2 and oracle.normwise_ratio(np.float32(exact), exact) == 0
    nothing = np.zeros(2)
    assert oracle.normwise_ratio(np.float32([eps, 0]), nothing, scale=2.0) == 0.5           # 0 beside results of 2
    assert oracle.normwise_ratio(np.float32([eps, 0]), nothing) == math.inf
    for wrong in (np.float32([np.nan, 4]), np.float32([np.inf, 4]), np.ones((1, 2), "f"), np.ones(1, "f")):
        assert oracle.normwise_ratio(wrong, exact) == math.inf
    assert oracle.normwise_ratio(np.ones((0, 3), "f"), np.ones((0, 3))) == 0


def test_the_first_of_the_worst_elements(monkeypatch):
    monkeypatch.setattr(oracle.comparison, "PIECE", 4)
    exact, found = np.ones((3, 5)), np.ones((3, 5), "f")
    found[1, 3] = found[2, 2] = 1.5
    found[0, 1] = 1.25
    comparison = oracle.compare(found, exact, exact, name="y")
    assert comparison.worst == (1, 3) and comparison.found == 1.5 and comparison.exact == 1 and not comparison.good
    assert str(comparison).endswith("FAILED; worst at [1, 3]: found 1.5, expected 1.0")
    found[2, 4] = np.nan
    assert oracle.compare(found, exact, exact).worst == (2, 4)
    right = oracle.compare(np.ones((3, 5), "f"), exact, exact, name="y")
    assert right.worst is None and right.good and right.near and str(right).endswith("  ok")
    assert oracle.compare(np.ones((3, 4), "f"), exact, exact).worst is None
    assert oracle.compare(np.float32(2), np.float64(1), np.float64(1)).worst == ()


def test_what_compare_refuses():
    one = np.ones(3)
    with pytest.raises(ValueError, match="found no magnitude, expected one"):
        oracle.compare(one, one)
    with pytest.raises(ValueError, match=r"found results \['y'\], expected \['dx', 'y'\]"):
        oracle.compare_all({"y": one}, lambda w, x: {"y": x, "dx": x}, {}, one)


def test_an_unknown_activation():
    with pytest.raises(ValueError, match="found activation 'swish', expected one of gelu_tanh, "):
        oracle.feed_forward.forward(np.ones((2, 2)), {"up.weight": np.ones((2, 2))}, "swish")
