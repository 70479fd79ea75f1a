"""Numbers with an address: known answers, any window, the same for any number of ranks."""
import hashlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitp.sharding import rng

SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=60)


@pytest.mark.parametrize("key, counter, expected", [
    ((0, 0), 0, "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
    ((2**64 - 1,) * 2, 2**256 - 1, "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
    ((0x452821e638d01377, 0xbe5466cf34e90c6c),
     0x243f6a8885a308d3 | 0x13198a2e03707344 << 64 | 0xa4093822299f31d0 << 128 | 0x082efa98ec4e6c89 << 192,
     "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6"),
])
def test_known_answers_of_random123(key, counter, expected):
    """kat_vectors of the Random123 distribution, philox4x64 with 10 rounds."""
    words = rng.words(np.array(key, np.uint64), 4 * counter, 4 * counter + 4)
    assert " ".join(f"{int(w):016x}" for w in words) == expected


@SETTINGS
@given(st.integers(0, 300), st.integers(0, 300))
def test_any_run_is_a_slice_of_the_stream(start, length):
    key = rng.key(7, "layers.3.mlp.up.weight")
    assert rng.words(key, start, start + length).tobytes() == rng.words(key, 0, 700)[start:start + length].tobytes()
    assert rng.normals(key, start, start + length).tobytes() == rng.normals(key, 0, 700)[start:start + length].tobytes()


@SETTINGS
@given(st.data())
def test_any_window_is_a_slice_of_the_whole(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=2)))
    starts = [data.draw(st.integers(0, n)) for n in shape]
    window = tuple(slice(a, data.draw(st.integers(a, n))) for a, n in zip(starts, shape))
    whole = np.empty(shape, np.float32)
    rng.fill_normal(whole, 3, "w", shape, tuple(slice(0, n) for n in shape), 0.5)
    part = np.empty([s.stop - s.start for s in window], np.float32)
    rng.fill_normal(part, 3, "w", shape, window, 0.5)
    assert part.tobytes() == whole[window].tobytes()


def test_runs_longer_than_a_piece():
    shape = (3, rng.PIECE + 11)
    whole = np.empty(shape)
    rng.fill_normal(whole, 0, "w", shape, (slice(0, 3), slice(0, shape[1])), 1.0)
    assert whole.ravel().tobytes() == rng.normals(rng.key(0, "w"), 0, whole.size).tobytes()


def test_normals_by_definition():
    """Box-Muller of pairs of words: 53 bits of each, u1 in (0, 1] and u2 in [0, 1)."""
    key = rng.key(3, "w")
    expected = []
    for first, second in rng.words(key, 0, 40).reshape(-1, 2).tolist():
        radius = math.sqrt(-2 * math.log(((first >> 11) + 1) / 2 ** 53))
        angle = 2 * math.pi * ((second >> 11) / 2 ** 53)
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    np.testing.assert_allclose(rng.normals(key, 0, 40), expected, rtol=1e-14)


def test_they_are_normal():
    x = rng.normals(rng.key(0, "x"), 0, 200_000)
    n = len(x)
    assert abs(x.mean()) < 4 / n ** 0.5
    assert abs((x * x).mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs((x ** 3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((x ** 4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert abs((x[::2] * x[1::2]).mean()) < 4 * (2 / n) ** 0.5     # the two of a pair
    assert np.isfinite(x).all()


@pytest.mark.parametrize("word", [0, 2**64 - 1])
def test_no_word_makes_an_infinite_number(word, monkeypatch):
    """u1 is never 0, whose logarithm is not finite: one word in 2^53 would do."""
    monkeypatch.setattr(rng, "words", lambda key, start, stop: np.full(stop - start, word, np.uint64))
    x = rng.normals(None, 0, 4)
    assert np.isfinite(x).all() and np.abs(x).max() < 8.6       # sqrt(-2 ln 2^-53) = 8.57


def test_other_names_and_seeds_are_other_streams():
    streams = {rng.words(rng.key(seed, name), 0, 4).tobytes() for seed in (0, 1) for name in ("a", "b", "a.b")}
    assert len(streams) == 6


def test_words_are_the_same_on_every_machine():
    """Integers only: the same everywhere. A change here changes every model and is a change of format."""
    digest = hashlib.sha256(rng.words(rng.key(0, "up.weight"), 5, 1005).astype("<u8").tobytes()).hexdigest()
    assert digest == "abfa495dbbcd4d9eccc804fa33b430d6929916f73a70e4fce4bcc735c9a1bf62"
