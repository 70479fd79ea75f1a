"""The attention of one sequence against a literal (Q, S) softmax in float64; its bits; its memory.

Dimension key: G key/value heads, H query heads of each, Q queries, S keys, K features of a head.
"""
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitp.ops import attention
from mpitp.ops.attention import TILE, attention_backward, attention_forward
from spmd import draw, same_bytes

NAMES = "out", "dq", "dk", "dv", "lse"
SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=150)


def inputs(G, H, Q, S, K, dtype=np.float64):
    """q, k, v, dout."""
    return [draw(number, *shape, dtype=dtype)
            for number, shape in enumerate(((G, H, Q, K), (G, S, K), (G, S, K), (G, H, Q, K)))]


def run(q, k, v, dout, scale, keep=None, out=None, dq=None, **choices):
    """(out, dq, dk, dv, lse). keep: (G, H, Q, S), or None."""
    out, dq = np.full_like(q, np.nan) if out is None else out, np.full_like(q, np.nan) if dq is None else dq
    if keep is not None:
        choices["keep"] = lambda first, stop: keep[:, :, first:stop]
    lse = attention_forward(q, k, v, scale, out=out, **choices)
    dk, dv = attention_backward(dout, lse, q, k, v, out, scale, dq=dq, **choices)
    return out, dq, dk, dv, lse


def literal(q, k, v, dout, scale, keep=None, causal=True, window=None, slopes=None, mask=None):
    """(out, dq, dk, dv, lse), exact in float64, and for each the magnitude of what is added up in it, times the error
    of the scores in eps."""
    q, k, v, dout = (x.astype(np.float64) for x in (q, k, v, dout))
    Q, S = q.shape[2], k.shape[1]
    k, v = k[:, None], v[:, None]
    query, key = np.arange(S - Q, S)[:, None], np.arange(S)
    bias = 0 if slopes is None else slopes[..., None, None] * (key - query)
    keep = 1 if keep is None else keep
    seen = np.ones((Q, S), bool)
    if causal:
        seen &= key <= query
    if window is not None:
        seen &= abs(query - key) < window
    if mask is not None:
        seen &= mask
    score = np.where(seen, scale * q @ k.swapaxes(2, 3) + bias, -1e30)
    e = np.where(seen, np.exp(score - score.max(axis=-1, keepdims=True)), 0)
    p = e / np.where(seen.any(axis=1), e.sum(axis=-1), 1)[..., None]

    def results(q, k, v, dout, ds):
        return ((p * keep) @ v, scale * ds @ k, (scale * ds.swapaxes(2, 3) @ q).sum(axis=1),
                ((p * keep).swapaxes(2, 3) @ dout).sum(axis=1))

    dp = dout @ v.swapaxes(2, 3) * keep
    lse = np.log(np.where(seen.any(axis=1), e.sum(axis=-1), 1)) + np.where(seen.any(axis=1), score.max(axis=-1), 0)
    exact = *results(q, k, v, dout, p * (dp - (p * dp).sum(axis=-1, keepdims=True))), lse
    sizes = [np.abs(x) for x in (q, k, v, dout)]
    dp = sizes[3] @ sizes[2].swapaxes(2, 3) * keep
    error = 2 + (abs(scale) * sizes[0] @ sizes[1].swapaxes(2, 3) + np.abs(bias)).max(initial=0)
    magnitudes = *results(*sizes, p * (dp + (p * dp).sum(axis=-1, keepdims=True))), np.ones_like(lse)
    return exact, [error * x for x in magnitudes]


def check(case, dtype, **choices):
    exact, magnitudes = literal(*case, **choices)
    with warnings.catch_warnings(), np.errstate(all="raise", under="ignore"):
        warnings.simplefilter("error")
        found = run(*case, **choices)
    for name, x, right, magnitude in zip(NAMES, found, exact, magnitudes):
        assert x.dtype == dtype and x.shape == right.shape, name
        tiny = np.finfo(dtype).tiny * 1e4                   # what underflows is no error
        assert (np.abs(x - right) <= 2 * np.finfo(dtype).eps * magnitude + tiny).all(), name


@SETTINGS
@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 3, 7, 8, 16, 31]),
       st.sampled_from([1, 2, 7, TILE - 1, TILE, TILE + 1, 2 * TILE, 2 * TILE + 3]), st.sampled_from(["f", "d"]))
def test_against_the_literal_softmax(data, G, H, K, S, dtype):
    Q = data.draw(st.one_of(st.just(S), st.integers(1, S)), "queries")
    numbers = np.random.default_rng(data.draw(st.integers(0, 9), "seed"))
    masks = {"none": None, "keys": numbers.random(S) < 0.3, "pairs": numbers.random((Q, S)) < 0.1}
    choices = dict(
        causal=data.draw(st.booleans(), "causal"),
        window=data.draw(st.one_of(st.none(), st.integers(1, S + 1)), "window"),
        slopes=data.draw(st.sampled_from([None, numbers.random((G, H))]), "slopes"),
        mask=masks[data.draw(st.sampled_from(list(masks)), "mask")],
        keep=data.draw(st.sampled_from([None, ((numbers.random((G, H, Q, S)) < 0.7) / 0.7).astype(dtype)]), "keep"))
    case = [x.astype(dtype) for x in inputs(G, H, Q, S, K)]
    check([*case, K ** -0.5], np.dtype(dtype), **choices)


@pytest.mark.parametrize("choices", [{}, {"window": 5}, {"causal": False, "window": 3}, {"slopes": True},
                                     {"mask": True}, {"keep": True}], ids=str)
def test_numeric_differences(choices):
    G, H, Q, S, K, scale = 2, 2, 6, 9, 3, 0.7
    arrays, numbers = inputs(G, H, Q, S, K), np.random.default_rng(5)
    real = {"slopes": numbers.random((G, H)), "mask": numbers.random((Q, S)) < 0.6,
            "keep": (numbers.random((G, H, Q, S)) < 0.7) / 0.7}
    choices = {name: real.get(name, value) for name, value in choices.items()}
    gradients = run(*arrays, scale, **choices)[1:4]
    for which, gradient in enumerate(gradients):
        def loss(step, direction):
            moved = list(arrays)
            moved[which] = arrays[which] + step * direction
            return (run(*moved, scale, **choices)[0] * arrays[3]).sum()

        direction = draw(20 + which, *arrays[which].shape)
        numeric = (loss(1e-5, direction) - loss(-1e-5, direction)) / 2e-5
        assert abs(numeric - (gradient * direction).sum()) < 1e-8 * np.abs(gradient * direction).sum()


def test_adjoint_in_the_values():
    """out is linear in v: <out(v), dout> = <v, dv>, over several tiles."""
    q, k, v, dout = inputs(2, 3, 2 * TILE + 3, 2 * TILE + 3, 5)
    out, _, _, dv, _ = run(q, k, v, dout, 0.4, window=TILE + 2)
    assert abs((out * dout).sum() - (v * dv).sum()) < 1e-13 * np.abs(out * dout).sum()


@pytest.mark.parametrize("dtype", ["f", "d"])
def test_a_query_that_may_attend_to_nothing(dtype):
    S = TILE + 5
    case = [x.astype(dtype) for x in inputs(2, 1, S, S, 4)]
    mask = np.ones((S, S), bool)
    mask[[0, 3, TILE + 1]] = False
    check([*case, 0.5], np.dtype(dtype), mask=mask)
    out, dq, dk, dv, lse = run(*case, 0.5, mask=mask)
    for x in (out, dq, lse):
        assert (x[:, :, [0, 3, TILE + 1]] == 0).all() and (x[:, :, 1] != 0).all()
    for x in run(*case, 0.5, mask=np.zeros(S, bool)):
        assert (x == 0).all()


def test_hidden_keys_leave_no_trace():
    """A huge key and value that nobody may attend to do not reach a result, nor do keys after a query."""
    S = TILE + 9
    q, k, v, dout = inputs(1, 2, S, S, 4)
    mask = np.arange(S) != 5
    right = run(q, k, v, dout, 0.5, mask=mask)
    k[:, 5] *= 1e6
    v[:, 5] *= 1e6
    assert all(map(same_bytes, run(q, k, v, dout, 0.5, mask=mask), right))
    first = run(q[:, :, :7], k[:, :7], v[:, :7], dout[:, :, :7], 0.5)[0]
    np.testing.assert_allclose(run(q, k, v, dout, 0.5)[0][:, :, :5], first[:, :, :5], rtol=1e-12)


def test_large_scores():
    """A score of 10000 overflows nothing: the softmax picks the largest."""
    q, k, v, dout = inputs(1, 1, 70, 70, 4, dtype=np.float32)
    with np.errstate(all="raise", under="ignore"):
        out, *rest = run(q, k, v, dout, 1e4, causal=False)
    best = (q[0, 0] @ k[0].T).argmax(axis=1)
    np.testing.assert_allclose(out[0, 0], v[0, best], rtol=1e-5)
    assert all(np.isfinite(x).all() for x in rest)


def test_the_last_queries_alone():
    """Q < S: what generation asks for is what the whole sequence has."""
    S = 2 * TILE + 6
    q, k, v, dout = inputs(2, 2, S, S, 6)
    choices = dict(window=TILE + 9, slopes=np.array([[0.5, 0.25], [0.1, 0.01]]))
    whole = run(q, k, v, dout, 0.4, **choices)
    for Q in (1, 5, TILE, TILE + 7):
        part = run(q[:, :, -Q:], k, v, dout[:, :, -Q:], 0.4, **choices)
        for x, y in ((part[0], whole[0]), (part[1], whole[1])):
            np.testing.assert_allclose(x, y[:, :, -Q:], rtol=1e-9, atol=1e-12)


def test_no_heads():
    """A rank without a head."""
    for G, H in ((0, 2), (2, 0), (0, 0)):
        assert [x.shape for x in run(*inputs(G, H, 5, 5, 3), 1.0)] == [(G, H, 5, 3)] * 2 + [(G, 5, 3)] * 2 + [(G, H, 5)]


def test_inputs_stay_as_they_are():
    numbers = np.random.default_rng(1)
    arrays = inputs(2, 2, 70, 75, 4)
    choices = dict(slopes=numbers.random((2, 2)), mask=numbers.random((70, 75)) < 0.7,
                   keep=numbers.random((2, 2, 70, 75)))
    before = [x.copy() for x in (*arrays, *choices.values())]
    for x in (*arrays, *choices.values()):
        x.flags.writeable = False
    run(*arrays, 0.5, **choices)
    assert all(map(same_bytes, before, (*arrays, *choices.values())))


def layouts(x, heads, per):
    """The same (heads, per, rows, K) values as views of arrays of other layouts."""
    flat = x.reshape(heads * per, *x.shape[-2:])
    for shape, axes, window in (
            ((x.shape[-2], heads * per, x.shape[-1]), (1, 0, 2), np.s_[:]),                         # (S, heads * K)
            ((x.shape[-2] + 1, 2 * heads * per + 3, x.shape[-1]), (1, 0, 2), np.s_[2:-1:2, :-1]),   # every second head
            ((heads * per, x.shape[-1], x.shape[-2]), (0, 2, 1), np.s_[:]),                         # features first
            ((heads * per, *x.shape[-2:]), (0, 1, 2), np.s_[:, ::-1]),                              # the last row first
            ((heads * per, x.shape[-2], 2 * x.shape[-1]), (0, 1, 2), np.s_[..., ::2])):         # every second feature
        view = np.full(shape, np.nan, x.dtype).transpose(axes)[window]
        view[...] = flat
        split = view.reshape(heads, per, *x.shape[-2:])
        yield split if x.ndim == 4 else split[:, 0]


@pytest.mark.parametrize("dtype", ["f", "d"])
@pytest.mark.parametrize("K", [1, 2, 6, 7, 8, 16, 17, 64])
def test_bits_depend_on_neither_layout_nor_other_heads(K, dtype):
    G, H = 3, 2
    for Q, S in ((1, 1), (7, 7), (1, 77), (TILE + 1, TILE + 1), (13, 2 * TILE + 1)):
        case = inputs(G, H, Q, S, K, np.dtype(dtype))
        right = run(*case, 0.3)
        q, k, v, dout = (list(layouts(x, G, x.shape[1] if x.ndim == 4 else 1)) for x in case)
        if dtype == "f":                                            # a float64 scale widens nothing
            assert all(map(same_bytes, run(*case, np.float64(0.3)), right))
        targets = [list(layouts(np.zeros_like(case[0]), G, H)) for _ in range(2)]
        for number, arrays in enumerate(zip(q, k, v, dout)):
            found = run(*arrays, 0.3, out=targets[0][number], dq=targets[1][number])
            assert all(map(same_bytes, found, right)), (Q, S, number)
        for g in range(G):                                          # one key/value head a call
            found = run(*(x[g:g + 1] for x in case), 0.3)
            assert all(same_bytes(x, y[g:g + 1]) for x, y in zip(found, right)), (Q, S, g)
            for h in range(H):                                      # one query head a call
                found = run(*(x[g:g + 1, h:h + 1] if x.ndim == 4 else x[g:g + 1] for x in case), 0.3)
                assert all(same_bytes(found[i], right[i][g:g + 1, h:h + 1]) for i in (0, 1, 4)), (Q, S, g, h)


def test_bits_do_not_depend_on_how_many_heads_are_computed_at_once(monkeypatch):
    numbers = np.random.default_rng(2)
    case = inputs(3, 4, 2 * TILE + 3, 2 * TILE + 3, 8, np.float32)
    choices = dict(slopes=numbers.random((3, 4)), mask=numbers.random(2 * TILE + 3) < 0.8, window=TILE + 4,
                   keep=numbers.random((3, 4, 2 * TILE + 3, 2 * TILE + 3)).astype("f"))
    right = run(*case, 0.3, **choices)
    for scores in (1, 2 * TILE * TILE, 6 * TILE * TILE, 1 << 30):
        monkeypatch.setattr(attention, "SCORES", scores)
        assert all(map(same_bytes, run(*case, 0.3, **choices), right)), scores


def test_memory_is_linear_in_the_sequence():
    peaks = []
    for S in (512, 2048):
        case = inputs(2, 1, S, S, 8, np.float32)
        tracemalloc.start()
        run(*case, 0.3)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 4.5 * peaks[0], peaks
    assert peaks[1] < 2048 * 2048 * 4 / 2, peaks                    # less than half of one head's scores
