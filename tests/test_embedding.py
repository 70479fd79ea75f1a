"""The embeddings against a lookup in the dense table; any vocabulary on any number of ranks."""
import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpitp
from groups import group_fixture
from mpitp import oracle
from mpitp.layers import embedding
from mpitp.layers.embedding import PositionEmbedding, VocabParallelEmbedding
from mpitp.ops.embedding import embedding_backward
from spmd import draw, job, same_bytes

RANKS = (1, 3, 5)


group = group_fixture("ordinary", "reproducible", scope="module")


def draw_ids(vocab, lead, seed=0):
    """The first and the last token among them, where there is room, and some several times."""
    ids = np.random.default_rng(seed).integers(0, vocab, lead)
    ids.reshape(-1)[:2] = (vocab - 1, 0)[:ids.size]
    return ids


def plain_gradient(dy, ids, rows):
    dw = np.zeros((rows, dy.shape[-1]))
    for d, row in zip(dy.reshape(-1, dy.shape[-1]).astype(float), ids.reshape(-1)):
        dw[row] += d
    return dw


def problems(group, vocab, hidden, multiplier=1.0, lead=(3, 5), dtype="float64", ids=None):
    """Names of what VocabParallelEmbedding does otherwise than a lookup in the dense table."""
    layer = VocabParallelEmbedding(group, vocab, hidden, multiplier, dtype=dtype, name="e")
    w, dy = draw(1, vocab, hidden, dtype=dtype), draw(2, *lead, hidden, dtype=dtype)
    w.reshape(-1)[::3] *= 0                                     # zeros of both signs
    ids = draw_ids(vocab, lead) if ids is None else ids
    layer.load_dense({"e.weight": w})
    before = [a.tobytes() for a in (ids, dy, w, *layer.weights.values())]
    group.ledger.clear()
    y, saved = layer.forward(ids)
    forward_counts = group.ledger.counts()
    nothing, gradients = layer.backward(dy, saved)
    found = [] if nothing is None else ["a gradient of ids"]
    if before != [a.tobytes() for a in (ids, dy, w, *layer.weights.values())]:
        found.append("an input was changed")
    expected_forward, expected_backward = layer.collectives(ids.size)
    if forward_counts != expected_forward or group.ledger.counts() != expected_forward + expected_backward:
        found.append(f"ledger {dict(group.ledger.counts())}")
    if not same_bytes(y, w[ids] * np.dtype(dtype).type(multiplier) + np.dtype(dtype).type(0)):
        found.append("y")
    y_again, unsaved = layer.forward(ids, save=False)
    if unsaved is not None or not same_bytes(y, y_again):
        found.append("forward(save=False) differs")
    dw = group.comm.bcast(layer.gather(gradients))["e.weight"]
    exact, size = (plain_gradient(f(dy.astype(float)) * f(multiplier), ids, vocab) for f in (np.asarray, np.abs))
    if dw.dtype != dtype or not oracle.error_ratio(dw, exact, size) <= 4:
        found.append("weight")
    return found


def require_none(found, group):
    found = group.comm.allgather(found)
    assert not any(found), f"problems by rank: {found}"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("multiplier", [1.0, 0.3, -22.627416998])
@pytest.mark.parametrize("hidden", [1, 6])
@pytest.mark.parametrize("sizes", [(0, 1), (0, 2), (0, 9), (13, 1), (16, 0)],
                         ids=lambda sizes: f"V={sizes[0]}P+{sizes[1]}")
def test_equals_dense(group, sizes, hidden, multiplier, dtype):
    """A vocabulary of one, fewer than ranks, uneven, even."""
    require_none(problems(group, sizes[0] * group.size + sizes[1], hidden, multiplier, dtype=dtype), group)


@settings(derandomize=True, deadline=None, database=None, max_examples=25)
@given(vocab=st.integers(1, 40), hidden=st.integers(1, 9), lead=st.lists(st.integers(0, 4), max_size=3).map(tuple),
       dtype=st.sampled_from(["float32", "float64"]))
def test_any_shape(group, vocab, hidden, lead, dtype):
    require_none(problems(group, vocab, hidden, lead=lead, dtype=dtype), group)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64", "uint64"])
def test_any_integers(group, dtype):
    require_none(problems(group, 30, 3, ids=draw_ids(30, (3, 5)).astype(dtype)), group)


def test_adjoint_and_numeric(group):
    """<dy, W[ids]> = <dW, W>: linear in W, whose parts are counted once each."""
    layer = VocabParallelEmbedding(group, 7, 4, 1.5, dtype="float64")
    w, d, ids, dy, h = draw(1, 7, 4), draw(2, 7, 4), draw_ids(7, (2, 9)), draw(3, 2, 9, 4), 1e-4

    def value(weight):
        layer.load_dense({"weight": weight})
        return (dy * layer.forward(ids, save=False)[0]).sum()

    layer.load_dense({"weight": w})
    dw = layer.backward(dy, layer.forward(ids)[1])[1]["weight"]
    part = layer.partition.range(group.rank)
    assert abs(value(w) - group.comm.allreduce((dw * w[part]).sum())) <= 1e-13 * np.abs(dy).sum()
    numeric = (value(w + h * d) - value(w - h * d)) / (2 * h)
    assert abs(numeric - group.comm.allreduce((dw * d[part]).sum())) <= 1e-9 * np.abs(dy).sum()


def test_the_gradient_is_added_in_order_of_tokens():
    """1e8 + 1 - 1e8 in float32 is 0, 1e8 - 1e8 + 1 is 1: no other order, no atomics."""
    d = np.array([[1e8], [1], [-1e8], [5], [1]], "float32")
    assert embedding_backward(d, np.array([2, 2, 2, 0, -1]), 4).tolist() == [[5], [0], [0], [0]]
    assert embedding_backward(d[[0, 2, 1]], np.array([2, 2, 2]), 3).tolist() == [[0], [0], [1]]
    d, ids = draw(1, 300, 5, dtype="float32"), draw_ids(7, 300)
    expected = np.zeros((7, 5), "float32")
    np.add.at(expected, ids, d)
    assert same_bytes(embedding_backward(d, ids, 7), expected)
    out = np.full((7, 5), np.nan, "float32")
    assert embedding_backward(d, ids, 7, out=out) is out and same_bytes(out, expected)


def test_the_same_weights_for_any_number_of_ranks(group, world):
    split = VocabParallelEmbedding(group, 29, 6, seed=5, init_std=0.5, name="embedding").gather()
    with mpitp.TensorParallelGroup(world.Split(world.rank)) as alone:
        whole = VocabParallelEmbedding(alone, 29, 6, seed=5, init_std=0.5, name="embedding").weights
    if split is not None:
        assert same_bytes(split["embedding.weight"], whole["embedding.weight"])
        assert 0.4 < whole["embedding.weight"].std() < 0.6


def test_gradient_buffers_are_used_again(group):
    ids, dy = draw_ids(9, (4,)), draw(1, 4, 3, dtype="float32")
    for layer, given_x in ((VocabParallelEmbedding(group, 9, 3), ids), (PositionEmbedding(group, 9, 3), 4)):
        _, saved = layer.forward(given_x)
        first = layer.backward(dy, saved)[1]["weight"]
        kept = first.copy()
        first.fill(np.nan)
        second = layer.backward(dy, saved, out={"weight": first})[1]["weight"]
        assert second is first and same_bytes(second, kept)


@pytest.mark.parametrize("ids, message", [
    ([[1, 2], [3, 53]], r"ids\[1, 1\]: found token id 53, expected 0 to 52"),
    ([5, -1, 99], r"ids\[1\]: found token id -1, expected 0 to 52"),
    (np.uint8([1, 200]), r"ids\[1\]: found token id 200, expected 0 to 52"),
    (np.uint64([2 ** 64 - 1]), r"ids\[0\]: found token id 18446744073709551615, expected 0 to 52"),
    (77, r"ids\[\]: found token id 77, expected 0 to 52"),
    ([1.0, 2.0], "ids: found dtype float64, expected integers"),
    ([True, False], "ids: found dtype bool, expected integers"),
    (["a"], "ids: found dtype <U1, expected integers"),
])
def test_bad_ids(group, ids, message):
    """One line on every rank, and no rank has entered a collective."""
    layer = VocabParallelEmbedding(group, 53, 4)
    group.ledger.clear()
    with pytest.raises(mpitp.InputError, match=message):
        layer.forward(ids)
    assert group.ledger.counts() == {} and not group.ledger.control


def test_bad_arguments(group):
    for wrong in (dict(vocab_size=0, hidden_size=4), dict(vocab_size=4, hidden_size=1.5),
                  dict(vocab_size=4, hidden_size=4, multiplier="2"), dict(vocab_size=4, hidden_size=4, dtype="int8")):
        with pytest.raises(mpitp.InputError, match="found .* expected"):
            VocabParallelEmbedding(group, **wrong)
    layer = VocabParallelEmbedding(group, 5, 4)
    _, saved = layer.forward([1, 2])
    with pytest.raises(mpitp.InputError, match="dy: found 3 rows, expected 2"):
        layer.backward(np.ones((3, 4), "float32"), saved)
    with pytest.raises(mpitp.InputError, match="found saved = None"):
        layer.backward(np.ones((2, 4), "float32"), None)


# Mistakes: what `problems` must see.

def one_short(d, ids, rows, out=None):
    """The last row of every shard is nobody's."""
    return embedding_backward(d, np.where(ids == rows - 1, -1, ids), rows, out)


def not_masked(d, ids, rows, out=None):
    """The ids of other ranks counted for this rank's first row."""
    return embedding_backward(d, np.where((ids < 0) | (ids >= rows), 0, ids), rows, out)


@pytest.mark.host
@pytest.mark.parametrize("fault", [one_short, not_masked])
def test_faults_of_the_gradient(group, monkeypatch, fault):
    assert problems(group, 26, 4) == []
    if group.size == 1 and fault is not_masked:
        pytest.skip("on one rank this is no mistake")
    monkeypatch.setattr(embedding, "embedding_backward", fault)
    assert problems(group, 26, 4) == ["weight"]


def test_zeros_not_summed_is_seen(group, monkeypatch):
    if group.size == 1:
        pytest.skip("on one rank this is no mistake")
    monkeypatch.setattr(group, "all_reduce", lambda x, out: x, raising=False)
    found = problems(group, 26, 4)
    assert "y" in found and any(problem.startswith("ledger") for problem in found)


# Positions.

@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("lead", [(), (1,), (4,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_positions(group, count, lead, dtype):
    layer = PositionEmbedding(group, 8, 3, dtype=dtype, name="position")
    w, dy = draw(1, 8, 3, dtype=dtype), draw(2, *lead, count, 3, dtype=dtype)
    layer.load_dense({"position.weight": w})
    group.ledger.clear()
    y, saved = layer.forward(count)
    _, gradients = layer.backward(dy, saved)
    assert group.ledger.counts() == Counter() == layer.collectives(count)[0] + layer.collectives(count)[1]
    assert same_bytes(y, w[:count]) and layer.forward(count, save=False)[1] is None
    y += 1                                                      # not the weight itself
    assert same_bytes(layer.parameter("weight"), w)
    dw = gradients["position.weight"]
    exact = np.zeros((8, 3))
    exact[:count] = dy.astype(float).reshape(-1, count, 3).sum(0) if dy.size else 0
    assert dw.dtype == dtype and oracle.error_ratio(dw, exact, 1 + np.abs(exact)) <= 4
    value = (dy * np.ones(lead + (1, 1)) * w[:count]).sum()     # linear in w: the adjoint
    assert abs(value - (dw * w).sum()) <= 1e-5 * (1 + np.abs(dy).sum())


def test_bad_positions(group):
    layer = PositionEmbedding(group, 8, 3)
    for count in (9, -1, 2.0, True):
        with pytest.raises(mpitp.InputError, match=f"found {count} positions, expected 0 to 8"):
            layer.forward(count)
    _, saved = layer.forward(4)
    for shape in ((5, 3), (3,), (2, 4, 2)):
        with pytest.raises(mpitp.InputError, match="dy: found shape|found dy: shape"):
            layer.backward(np.ones(shape, "float32"), saved)


# The same bytes for any number of ranks: this file is the job.

def main():
    with mpitp.TensorParallelGroup(reproducible=True, check=True) as group:
        for vocab in (1, 2, 5, 13 * 3 + 1, 64):
            for dtype in ("float32", "float64"):
                layer = VocabParallelEmbedding(group, vocab, 7, 3.3, dtype=dtype, init_std=1.0)
                layer.weights["weight"][:, ::3] = -0.0
                y, saved = layer.forward(draw_ids(vocab, (4, 9)))
                dw = layer.gather(layer.backward(draw(1, 4, 9, 7, dtype=dtype), saved)[1])
                if group.rank == 0:
                    for name, value in (("y", y), ("dw", dw["weight"])):
                        print(vocab, dtype, name, hashlib.sha256(value.tobytes()).hexdigest())


@pytest.mark.launcher
def test_same_bytes_on_any_number_of_ranks():
    done = {ranks: job(ranks, __file__) for ranks in RANKS}
    assert all(run.returncode == 0 for run in done.values()), [run.stderr for run in done.values()]
    assert len(done[1].stdout.splitlines()) == 20
    assert {run.stdout for run in done.values()} == {done[1].stdout}


if __name__ == "__main__":
    main()
