"""Dropout from numbers with an address: the same mask for any number of ranks, another at every position."""
import hashlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitp.sharding import rng
from mpitp.ops import dropout
from mpitp.ops.dropout import dropout_scale
from mpitp.sharding.partition import Partition
from spmd import same_bytes

SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=150)


def whole_scale(seed, name, step, probability, shape, dtype):
    """The definition, for the whole array at once."""
    words = rng.words(rng.key(seed, f"{name}/{step}"), 0, int(np.prod(shape))).reshape(shape)
    dropped = (words >> np.uint64(11)).astype(float) < probability * 2.0 ** 53
    return np.where(dropped, 0, 1 / (1 - probability)).astype(dtype)


def axis_windows(n):
    bounds = st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted).map(lambda ends: slice(*ends))
    return st.just(slice(None)) | bounds | st.integers(0, n - 1)


@pytest.fixture(params=[(1 << 15, 1 << 11), (7, 3), (50, 20), (1, 0)], ids=str)
def piece_and_near(request, monkeypatch):
    monkeypatch.setattr(dropout, "PIECE", request.param[0])
    monkeypatch.setattr(dropout, "NEAR", request.param[1])


@pytest.mark.usefixtures("piece_and_near")
@SETTINGS
@given(st.data())
def test_any_window_is_a_slice_of_the_whole(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    window = tuple(data.draw(axis_windows(n)) for n in shape)
    probability = data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9]))
    dtype = data.draw(st.sampled_from(["float32", "float64"]))
    found = dropout_scale(3, "layers.0.mlp.dropout", 7, probability, shape, window, dtype)
    assert same_bytes(found, np.asarray(whole_scale(3, "layers.0.mlp.dropout", 7, probability, shape, dtype)[window]))


@pytest.mark.parametrize("window", [np.s_[:, :], np.s_[3:200, :], np.s_[:, 17:290], np.s_[5, :], np.s_[:, 4],
                                    np.s_[2:9, 0:0]], ids=str)
def test_longer_than_a_piece(window):
    whole = whole_scale(0, "a", 1, 0.3, (301, 300), "float32")
    assert same_bytes(dropout_scale(0, "a", 1, 0.3, (301, 300), window, "float32"), whole[window].copy())


def mask_problems(group, probability, shape, axis, scale=dropout_scale):
    """What is wrong with masks that are drawn in parts: the ranks' parts put together, and how they differ."""
    parts = Partition(shape[axis], group.size, group.blocks)
    window = [slice(None)] * len(shape)
    window[axis] = parts.range(group.rank)
    mine = scale(5, "layers.1.attention.dropout", 2, probability, shape, tuple(window), "float32")
    whole = np.concatenate(group.comm.allgather(mine), axis=axis)
    problems = [] if same_bytes(whole, whole_scale(5, "layers.1.attention.dropout", 2, probability, shape, "float32")) \
        else ["another mask than on one rank"]
    slabs = [part.tobytes() for part in np.split(whole, shape[axis], axis=axis)]
    return problems + (["the same mask at different positions"] if len(set(slabs)) < len(slabs) else [])


@pytest.mark.parametrize("shape, axis", [((64, 40), 0), ((64, 37), 1), ((2, 5, 8, 8), 1), ((3, 9, 20), 2)], ids=str)
def test_the_same_mask_for_any_number_of_ranks(group, shape, axis):
    assert mask_problems(group, 0.5, shape, axis) == []


def test_the_same_mask_on_every_shard_is_seen(group):
    """Mistakes of published code: every rank draws from the start; every rank has a seed of its own."""
    def from_the_start(seed, name, step, probability, shape, window, dtype):
        starts_at_0 = tuple(slice(0, len(range(*part.indices(n)))) for part, n in zip(window, shape))
        return dropout_scale(seed, name, step, probability, shape, starts_at_0, dtype)

    def own_seed(seed, *others):
        return dropout_scale(seed + group.rank, *others)

    if group.size == 1:
        pytest.skip("on one rank these are no mistakes")
    found = mask_problems(group, 0.5, (64, 40), 0, from_the_start)
    assert found == ["another mask than on one rank", "the same mask at different positions"]
    assert mask_problems(group, 0.5, (64, 40), 0, own_seed) == ["another mask than on one rank"]


def test_other_addresses_are_other_masks():
    masks = {dropout_scale(seed, name, step, 0.5, (8, 16), np.s_[:, :], "float32").tobytes()
             for seed in (0, 1) for name in ("a", "b") for step in (0, 1, 2)}
    assert len(masks) == 12


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("probability", [0.0, 0.1, 1 / 3, 0.5, 0.999])
def test_values_and_how_many(probability, dtype):
    scale = dropout_scale(0, "a", 0, probability, (300, 400), np.s_[:, :], dtype)
    kept = np.dtype(dtype).type(1 / (1 - probability))
    assert scale.dtype == dtype and set(np.unique(scale)) <= {0, kept}
    count, n = (scale == 0).sum(), scale.size
    assert abs(count - probability * n) <= 4 * (n * probability * (1 - probability)) ** 0.5
    assert abs(scale.mean(dtype=float) - 1) <= 4 * (probability / (1 - probability) / n) ** 0.5 + 1e-6


@pytest.mark.parametrize("probability, word, dropped", [
    (0.5, (2 ** 52 << 11) - 1, True), (0.5, 2 ** 52 << 11, False), (0.0, 0, False),
    (1 - 2.0 ** -53, 2 ** 64 - 2049, True), (1 - 2.0 ** -53, 2 ** 64 - 1, False),
    (2.0 ** -60, 2047, True), (2.0 ** -60, 2048, False),
    (0.1, (900719925474100 << 11) - 1, True), (0.1, 900719925474100 << 11, False)])
def test_the_limit_is_exact(probability, word, dropped, monkeypatch):
    """word >> 11 < probability 2^53, in integers."""
    assert ((word >> 11) < probability * 2 ** 53) == dropped
    monkeypatch.setattr(dropout, "words", lambda stream, start, stop: np.full(stop - start, word, np.uint64))
    assert (dropout_scale(0, "a", 0, probability, (3,), (slice(None),), "float64") == 0).all() == dropped


def test_a_window_of_a_huge_array_is_cheap():
    """(2^20, 2^20) numbers: the part alone is drawn."""
    tracemalloc.start()
    found = dropout_scale(0, "a", 0, 0.5, (2 ** 20, 2 ** 20), np.s_[2 ** 19:2 ** 19 + 8, 5:2005], "float32")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.shape == (8, 2000) and peak < 2 ** 20
    first = 2 ** 39 + 5
    assert (found[0] == 0).tolist() == (rng.words(rng.key(0, "a/0"), first, first + 2000) < np.uint64(2 ** 63)).tolist()
    by_numpy = tuple(np.array([2 ** 20, 2 ** 20], np.int64))
    assert same_bytes(dropout_scale(0, "a", 0, 0.5, by_numpy, (np.int64(2 ** 19), np.s_[5:2005]), "float32"), found[0])


def test_masks_are_the_same_on_every_machine():
    """A change here changes every model that is trained with dropout."""
    mask = dropout_scale(7, "layers.3.mlp.dropout", 12, 0.1, (9, 50), np.s_[1:, 3:47], "float32") == 0
    assert mask.shape == (8, 44)
    assert hashlib.sha256(np.packbits(mask).tobytes()).hexdigest() == \
        "f9ee032d3e2129e947ee535098b2498f7b22a0b3d5d43e9dd5c4e345690ff1bc"
