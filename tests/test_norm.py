"""Layer norm and RMS norm: against their formulas, numeric differences, and the bytes of a row on its own."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpitp
from mpitp import oracle
from mpitp.layers.norm import Norm
from mpitp.ops import norm
from mpitp.ops.norm import KINDS, norm_backward, norm_forward
from spmd import draw, same_bytes

SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=40)
EPSILON = 1e-5
kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


def plain_forward(x, w, b, kind, zero_centered):
    """y and the Jacobian of xhat, J[i, j] = d xhat_i / d x_j, of one row, in float64."""
    x, w = x.astype(float), w.astype(float) + zero_centered
    mean = x.mean() if kind == "layernorm" else 0.0
    rstd = 1 / np.sqrt(((x - mean) ** 2).mean() + EPSILON)
    xhat = (x - mean) * rstd
    jacobian = rstd * (np.eye(len(x)) - (kind == "layernorm") / len(x) - np.outer(xhat, xhat) / len(x))
    return xhat * w + (0 if b is None else b), xhat, jacobian, w, rstd


def problems(kind, shape, bias=True, zero_centered=False, dtype="float64", offset=0.0, forward=norm_forward,
             backward=norm_backward):
    """Names of results that are not what the formulas say."""
    K = shape[-1]
    x, dy = draw(1, *shape, dtype=dtype) + np.dtype(dtype).type(offset), draw(2, *shape, dtype=dtype)
    w, b = draw(3, K, dtype=dtype), draw(4, K, dtype=dtype) if bias else None
    before = [a.tobytes() for a in (x, dy, w)]
    y, saved = forward(x, w, b, kind, EPSILON, zero_centered)
    dx, dw, db = backward(dy, saved)
    found = [name for name, a, like in (("y", y, x), ("dx", dx, dy), ("dw", dw, w), ("db", db, b))
             if (a is None) != (like is None) or a is not None and (a.dtype != dtype or a.shape != like.shape)]
    if before != [a.tobytes() for a in (x, dy, w)]:
        found.append("an input was changed")
    exact = {"y": np.zeros(shape), "dx": np.zeros(shape), "dw": np.zeros(K), "db": np.zeros(K)}
    size = {name: np.zeros(value.shape) for name, value in exact.items()}
    for row in np.ndindex(*shape[:-1]):
        y_row, xhat, J, g, rstd = plain_forward(x[row], w, b, kind, zero_centered)
        d = dy[row].astype(float)
        exact["y"][row], exact["dx"][row] = y_row, (d * g) @ J
        exact["dw"] += d * xhat
        exact["db"] += d
        # What the rounding of x - mean, of rstd and of the sums grows to.
        xhat_size = (np.abs(x[row]) + np.abs(x[row]).mean()) * rstd + np.abs(xhat)
        size["y"][row] = xhat_size * np.abs(g) + (0 if b is None else np.abs(b))
        dg_size = np.abs(d * g)
        spread = dg_size + dg_size.mean() + (np.abs(xhat) + xhat_size) * (dg_size * (1 + xhat_size)).mean()
        size["dx"][row] = rstd * spread * (1 + np.abs(xhat).max())
        size["dw"] += np.abs(d) * xhat_size
        size["db"] += np.abs(d)
    results = {"y": y, "dx": dx, "dw": dw, **({"db": db} if bias else {})}
    return found + [name for name, value in results.items()
                    if not oracle.error_ratio(value, exact[name], size[name]) <= 4]


@dtypes
@kinds
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("zero_centered", [True, False], ids=["1+w", "w"])
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 4, 7), (1, 64), (9,), (0, 5), (3, 1), (40, 200)], ids=str)
def test_formulas(kind, shape, bias, zero_centered, dtype):
    assert problems(kind, shape, bias, zero_centered, dtype) == []


@kinds
def test_formulas_far_from_zero(kind):
    """The variance is that of x - mean: mean(x^2) - mean(x)^2 would have lost every digit."""
    assert problems(kind, (6, 300), dtype="float32", offset=3000.0) == []


def test_the_check_sees_mistakes():
    def no_epsilon_mean(x, w, b, kind, epsilon, zero_centered):
        return norm_forward(x, w, b, kind, epsilon * 1.001 + 1e-4, zero_centered)

    def without_mean(dy, saved):
        return norm_backward(dy, (*saved[:3], "rmsnorm", saved[4]))

    def of_w(x, w, b, kind, epsilon, zero_centered):
        return norm_forward(x, w, b, kind, epsilon)
    assert problems("layernorm", (5, 12), forward=no_epsilon_mean) == ["y", "dx", "dw"]
    assert problems("layernorm", (5, 12), backward=without_mean) == ["dx"]
    assert problems("rmsnorm", (5, 12), zero_centered=True, forward=of_w) == ["y", "dx"]


@kinds
@pytest.mark.parametrize("zero_centered", [True, False], ids=["1+w", "w"])
def test_numeric_gradients(kind, zero_centered):
    """(loss(v + h d) - loss(v - h d)) / 2h = <gradient, d>."""
    values = {"x": draw(1, 4, 6), "w": draw(2, 6), "b": draw(3, 6)}
    dy, h = draw(4, 4, 6), 1e-5

    def loss(x, w, b):
        return float((dy * norm_forward(x, w, b, kind, EPSILON, zero_centered)[0]).sum())

    gradients = dict(zip("xwb", norm_backward(dy, norm_forward(*values.values(), kind, EPSILON, zero_centered)[1])))
    for name, value in values.items():
        d = draw(5, *value.shape)
        numeric = (loss(**{**values, name: value + h * d}) - loss(**{**values, name: value - h * d})) / (2 * h)
        analytic = float((gradients[name] * d).sum())
        assert abs(numeric - analytic) <= 1e-8 * max(1, abs(gradients[name] * d).sum()), name


@kinds
def test_adjoint_in_w_and_b(kind):
    """y is linear in them: <dy, y(w + d) - y(w)> = <dw, d>."""
    x, w, b, dy, d, e = draw(1, 7, 5), draw(2, 5), draw(3, 5), draw(4, 7, 5), draw(5, 5), draw(6, 5)
    y, saved = norm_forward(x, w, b, kind, EPSILON)
    _, dw, db = norm_backward(dy, saved)
    moved, _ = norm_forward(x, w + d, b + e, kind, EPSILON)
    assert abs((dy * (moved - y)).sum() - (dw * d).sum() - (db * e).sum()) <= 1e-13 * np.abs(dy).sum()


@dtypes
@kinds
@pytest.mark.parametrize("K", [1, 2, 3, 7, 8, 16, 31, 64, 100, 512, 1000, 9000])
def test_bits_of_a_row_are_its_own(kind, K, dtype):
    """The same row alone, among others, and out of arrays with gaps, other orders and other offsets."""
    x, dy = draw(1, 37, K, dtype=dtype), draw(2, 37, K, dtype=dtype)
    w, b = draw(3, K, dtype=dtype), draw(4, K, dtype=dtype)

    def both(x, dy):
        y, saved = norm_forward(x, w, b, kind, EPSILON)
        return y, norm_backward(dy, saved)[0]

    def view(a, make):
        out = make(a)
        assert out.shape == a.shape and not np.shares_memory(out, a)
        out[...] = a
        return out

    whole = both(x, dy)
    for start, count in ((0, 1), (36, 1), (5, 2), (7, 3), (1, 5), (3, 16), (20, 17)):
        part = slice(start, start + count)
        assert all(same_bytes(a, b[part]) for a, b in zip(both(x[part], dy[part]), whole)), (start, count)
        heads = both(x[part].reshape(1, count, 1, K), dy[part].reshape(1, count, 1, K))
        assert all(same_bytes(a.reshape(count, K), b[part]) for a, b in zip(heads, whole))
    for make in (lambda a: np.empty((37, K + 5), dtype)[:, 3:3 + K], lambda a: np.empty((K, 37), dtype).T,
                 lambda a: np.empty((37, 2 * K), dtype)[:, ::2],
                 lambda a: np.empty(37 * K + 1, dtype)[1:].reshape(37, K)):
        assert all(map(same_bytes, both(view(x, make), view(dy, make)), whole))


@kinds
def test_pieces_do_not_change_rows(kind, monkeypatch):
    x, dy, w, b = draw(1, 50, 24), draw(2, 50, 24), draw(3, 24), draw(4, 24)
    y, saved = norm_forward(x, w, b, kind, EPSILON)
    dx, dw, db = norm_backward(dy, saved)
    for numbers in (1, 24, 100, 24 * 49):
        monkeypatch.setattr(norm, "PIECE", numbers)
        y2, saved = norm_forward(x, w, b, kind, EPSILON)
        dx2, dw2, db2 = norm_backward(dy, saved)
        assert same_bytes(y, y2) and same_bytes(dx, dx2)
        assert np.allclose(dw, dw2, 1e-13, 1e-13) and np.allclose(db, db2, 1e-13, 1e-13)


@kinds
def test_x_may_change_after_forward(kind):
    x, w, dy = draw(1, 5, 6), draw(2, 6), draw(3, 5, 6)
    _, saved = norm_forward(x, w, None, kind, EPSILON)
    dx, _, _ = norm_backward(dy, saved)
    x[...] = np.nan
    assert same_bytes(norm_backward(dy, saved)[0], dx)


@kinds
def test_nan_stays_in_its_row(kind):
    x = draw(1, 5, 6)
    x[2, 3] = np.nan
    y, _ = norm_forward(x, np.ones(6), None, kind, EPSILON)
    assert np.isnan(y[2]).all() and np.isfinite(y[[0, 1, 3, 4]]).all()


def test_unknown_kind():
    with pytest.raises(mpitp.InputError, match="found norm kind 'batch', expected one of layernorm, rmsnorm"):
        norm_forward(np.ones((2, 3)), np.ones(3), None, "batch", EPSILON)


# The layer.

def of_blocks(rows):
    """The sum of 10 rows by the tree over 8 blocks of them, as docs/fixed_tree.md specifies it."""
    bounds = [10 * b // 8 for b in range(9)]
    leaves = [np.add.reduce(rows[start:stop], axis=0) for start, stop in zip(bounds, bounds[1:])]
    pairs = [leaves[b] + leaves[b + 1] for b in range(0, 8, 2)]
    return (pairs[0] + pairs[1]) + (pairs[2] + pairs[3])


@pytest.mark.host
@kinds
@pytest.mark.parametrize("zero_centered", [True, False], ids=["1+w", "w"])
@pytest.mark.parametrize("bias", [None, True, False])
def test_layer(group, kind, zero_centered, bias):
    layer = Norm(group, 6, kind, 1e-6, bias, zero_centered, name="final_norm")
    has_bias = kind == "layernorm" if bias is None else bias
    assert list(layer.specs) == ["final_norm.weight", "final_norm.bias"][:1 + has_bias]
    assert not any(spec.decay or spec.axis is not None for spec in layer.specs.values())
    assert (layer.parameter("weight") == (0 if zero_centered else 1)).all()
    assert not has_bias or (layer.parameter("bias") == 0).all()
    weights = {name: draw(3 + i, 6, dtype="float32") for i, name in enumerate(layer.specs)}
    layer.load_dense(weights)
    x, dy = draw(1, 2, 5, 6, dtype="float32"), draw(2, 2, 5, 6, dtype="float32")
    group.ledger.clear()
    y, saved = layer.forward(x)
    dx, gradients = layer.backward(dy, saved)
    assert group.ledger.counts() == layer.collectives(10)[0] + layer.collectives(10)[1] == {}
    expected, kept = norm_forward(x, weights["final_norm.weight"], weights.get("final_norm.bias"), kind, 1e-6,
                                  zero_centered)
    dx_expected, dw, db = norm_backward(dy, kept)
    if group.reproducible:                      # the gradients are sums by the tree
        dw, db = (of_blocks(rows) if rows is not None else None
                  for rows in ((dy.reshape(10, 6) * kept[0]), dy.reshape(10, 6) if has_bias else None))
    assert same_bytes(y, expected) and same_bytes(dx, dx_expected) and same_bytes(gradients["final_norm.weight"], dw)
    assert not has_bias or same_bytes(gradients["final_norm.bias"], db)
    y_again, nothing = layer.forward(x, save=False)
    assert nothing is None and same_bytes(y, y_again)
    kept = {name: g.copy() for name, g in gradients.items()}
    for g in gradients.values():
        g.fill(np.nan)
    _, second = layer.backward(dy, saved, out=gradients)
    assert all(second[name] is gradients[name] and same_bytes(second[name], kept[name]) for name in kept)
    assert len(set(group.comm.allgather(y.tobytes() + dx.tobytes() + kept["final_norm.weight"].tobytes()))) == 1


@pytest.mark.parametrize("arguments, message", [
    (dict(hidden_size=0), "found hidden_size = 0, expected a positive integer"),
    (dict(hidden_size=4, kind="groupnorm"), "found norm kind 'groupnorm', expected one of layernorm, rmsnorm"),
    (dict(hidden_size=4, epsilon=0), "found epsilon = 0, expected a number above 0 and below 1"),
    (dict(hidden_size=4, epsilon="small"), "found epsilon = 'small', expected a number above 0 and below 1"),
    (dict(hidden_size=4, dtype="int32"), "found dtype 'int32', expected one of float32, float64"),
])
def test_bad_arguments(group, arguments, message):
    with pytest.raises(mpitp.InputError, match=message):
        Norm(group, **arguments)


def test_bad_input(group):
    layer = Norm(group, 4)
    with pytest.raises(mpitp.InputError, match=r"x: found shape \(2, 3\), expected \(\.\.\., 4\)"):
        layer.forward(np.ones((2, 3), "float32"))
    with pytest.raises(mpitp.InputError, match="x: found dtype float64, expected float32"):
        layer.forward(np.ones((2, 4)))
    _, saved = layer.forward(np.ones((2, 4), "float32"))
    with pytest.raises(mpitp.InputError, match="dy: found 3 rows, expected 2"):
        layer.backward(np.ones((3, 4), "float32"), saved)
    with pytest.raises(mpitp.InputError, match="found saved = None"):
        layer.backward(np.ones((2, 4), "float32"), None)


@SETTINGS
@given(lead=st.lists(st.integers(0, 4), max_size=3).map(tuple), K=st.integers(1, 40), kind=st.sampled_from(KINDS),
       bias=st.booleans(), zero_centered=st.booleans(), dtype=st.sampled_from(["float32", "float64"]))
def test_any_shape(lead, K, kind, bias, zero_centered, dtype):
    assert problems(kind, (*lead, K), bias, zero_centered, dtype) == []
