"""The oracle on trial: dense.py against PyTorch's numbers, numeric derivatives, and errors planted in its results."""
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from make_golden_mlp import ACTIVATIONS, FILE, inputs
from mpitp.oracle import feed_forward as dense
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


def results(x, dy, w, activation, gated):
    y, saved = dense.mlp_forward(x, w, activation, gated)
    dx, gradients = dense.mlp_backward(dy, saved, w, activation, gated)
    return {"y": y, "dx": dx, **gradients}


def widened(*arrays):
    return [{name: a.astype(np.float64) for name, a in x.items()} if isinstance(x, dict) else x.astype(np.float64)
            for x in arrays]


def ratios(found, x, dy, w, activation, gated):
    x, dy, w = widened(x, dy, w)
    exact = results(x, dy, w, activation, gated)
    magnitude = dense.mlp_magnitudes(x, dy, w, activation, gated)
    assert found.keys() == exact.keys() == magnitude.keys()
    return {name: dense.error_ratio(found[name], exact[name], magnitude[name]) for name in found}


@BOTH
@EVERY
def test_the_numbers_of_pytorch(activation, gated):
    w = inputs(gated)
    x, dy = w.pop("x"), w.pop("dy")
    golden = {name: np.array(value) for name, value in GOLDEN[activation, gated].items() if isinstance(value, list)}
    found = ratios(golden, x, dy, w, activation, gated)
    assert max(found.values()) <= 4, found


@BOTH
@EVERY
def test_numeric_gradients(activation, gated):
    """(L(v + e d) - L(v - e d)) / 2e = <dL/dv, d>, L = <dy, y>, for one random direction d of each variable v."""
    x, dy, w = block(4, 6, 9, gated)
    gradients = results(x, dy, w, activation, gated)
    for number, name in enumerate(["x", *w]):
        value, gradient = (x, gradients["dx"]) if name == "x" else (w[name], gradients[name])
        d = draw(20 + number, *value.shape)

        def loss(step):
            moved = value + step * d
            y, _ = dense.mlp_forward(*((moved, w) if name == "x" else (x, {**w, name: moved})), activation, gated)
            return (dy * y).sum()

        e = 1e-6
        numeric, analytic = (loss(e) - loss(-e)) / (2 * e), (gradient * d).sum()
        assert abs(numeric - analytic) <= 1e-7 * np.abs(gradient * d).sum(), name


@EVERY
def test_slope_and_bend_of_the_activations(activation):
    h, e = np.linspace(-8, 8, 4001) + 1e-4, 1e-6            # not on relu's kink
    value, slope, bend = dense.activation(activation, h)
    (right, right_slope, _), (left, left_slope, _) = (dense.activation(activation, h + s) for s in (e, -e))
    assert np.abs((right - left) / (2 * e) - slope).max() < 1e-8
    assert np.abs((right_slope - left_slope) / (2 * e)).max() <= bend + 1e-8
    with np.errstate(invalid="ignore"):
        assert np.isnan(dense.activation(activation, np.array([np.nan]))[0]).all()


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(tokens=st.integers(1, 40), hidden=st.integers(1, 40), ffn=st.integers(1, 90), gated=st.booleans(),
       activation=st.sampled_from(ACTIVATIONS), bias=st.booleans(), scale=st.sampled_from([0.1, 1, 4]))
def test_float32_is_a_few_roundings_away(tokens, hidden, ffn, gated, activation, bias, scale):
    """So that `limit` means something: were the magnitudes too small, it would be void, too large, blind."""
    x, dy, w = block(tokens, hidden, ffn, gated, bias, np.float32, scale)
    found = ratios(results(x, dy, w, activation, gated), x, dy, w, activation, gated)
    assert max(found.values()) < 2.5, found
    assert tokens * hidden * ffn < 50 or max(found.values()) > 0.02, found


@BOTH
@EVERY
def test_an_error_of_a_thousandth_in_one_entry_is_far_over_the_limit(activation, gated):
    x, dy, w = block(16, 12, 48, gated, dtype=np.float32)
    right = results(x, dy, w, activation, gated)
    good = ratios(right, x, dy, w, activation, gated)
    for name, value in right.items():
        wrong = value.copy()
        wrong[np.unravel_index(np.abs(wrong).argmax(), wrong.shape)] *= np.float32(1.001)
        found = ratios({**right, name: wrong}, x, dy, w, activation, gated)
        assert found[name] > 10 * dense.limit(good[name]), name
        assert {**found, name: good[name]} == good, name


def test_a_sign_that_float32_may_lose_is_no_error():
    """relu of h = 1 - 1 + 1e-9: 0 in float32, and either derivative is as good."""
    x, dy = np.array([[1.0, 1.0, 1.0]]), np.array([[1.0, 1.0, 1.0]])
    w = {"up.weight": np.array([[1.0, -1.0, 1e-9]]), "down.weight": np.ones((3, 1))}
    flipped = {name: value.astype("f") for name, value in w.items()}
    flipped["up.weight"][0, 2] = -1e-9
    found = results(x.astype("f"), dy.astype("f"), flipped, "relu", False)
    assert max(ratios(found, x, dy, w, "relu", False).values()) < 4
    w["up.weight"][0, 2] = 1e-3                             # but this one float32 sees
    assert ratios(found, x, dy, w, "relu", False)["dx"] > 1e6


def test_error_ratio_of_what_is_no_number():
    one, ratio = np.ones(3), dense.error_ratio
    eps = np.finfo(np.float64).eps
    assert ratio(one, one, one) == 0 and ratio(one * (1 + eps), one, one) == 1
    assert ratio(one, one * 0, one * 0) == math.inf
    assert ratio(one * 0, one * 0, one * 0) == 0 and ratio(np.ones((0, 3)), np.ones((0, 3)), np.ones((0, 3))) == 0
    for wrong in (np.nan, np.inf, -np.inf):
        assert ratio(np.array([1, wrong, 1]), one, one) == math.inf
    assert ratio(np.ones(1), one, one) == math.inf and ratio(np.ones((0, 3)), one, one) == math.inf
    assert ratio(one.astype("f") + np.float32(1e-6), one, one) < 10 < ratio(one + 1e-6, one, one)
    assert dense.limit(0.5) == 4 and dense.limit(16) == 32 and dense.limit(math.inf) == 4


def test_an_unknown_activation():
    with pytest.raises(ValueError, match="found activation 'swish', expected gelu_tanh, "):
        dense.activation("swish", np.ones(2))
