"""ParameterSpec: who holds what, by arithmetic alone, and the numbers that a parameter starts from."""
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpitp
from mpitp import InputError, ParameterSpec
from mpitp.sharding.parameters import by_name, check_dense, initialise
from mpitp.sharding.parameters import Place
from decoder_cases import config
from spmd import same_bytes

SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=60)
SHAPES = st.lists(st.integers(1, 24), min_size=1, max_size=2).map(tuple)


def blocks_for(ranks, reproducible):
    return 8 if reproducible else ranks


@SETTINGS
@given(shape=SHAPES, axis=st.integers(0, 1), ranks=st.integers(1, 11), reproducible=st.booleans())
def test_the_ranks_together_hold_it_once(shape, axis, ranks, reproducible):
    spec = ParameterSpec("w", shape, min(axis, len(shape) - 1))
    blocks = blocks_for(ranks, reproducible)
    held = np.zeros(shape, int)
    for rank in range(ranks):
        window = spec.window(Place(rank, ranks, blocks))
        held[window] += 1
        assert held[window].shape == spec.local_shape(Place(rank, ranks, blocks))
        assert spec.local_bytes(Place(rank, ranks, blocks), "float32") == 4 * held[window].size
    assert (held == 1).all() and spec.owner() is None


def test_a_replicated_parameter():
    """Every rank holds it whole, and one owns it: counted once."""
    spec = ParameterSpec("b", (5, 3), None)
    assert {spec.local_shape(Place(rank, 4, 4)) for rank in range(4)} == {(5, 3)}
    assert spec.owner() == 0 and spec.local_bytes(Place(2, 4, 4), "float64") == 8 * prod(spec.shape)


@SETTINGS
@given(shape=SHAPES, axis=st.integers(0, 1), ranks=st.integers(1, 11), reproducible=st.booleans(),
       dtype=st.sampled_from(["float32", "float64"]))
def test_initial_numbers_do_not_depend_on_the_ranks(shape, axis, ranks, reproducible, dtype):
    spec = ParameterSpec("layers.0.w", shape, min(axis, len(shape) - 1), init_std=0.5)
    whole = initialise(spec, 7, dtype, Place(0, 1, 1))
    blocks = blocks_for(ranks, reproducible)
    for rank in range(ranks):
        part = initialise(spec, 7, dtype, Place(rank, ranks, blocks))
        assert part.flags.c_contiguous and same_bytes(part, whole[spec.window(Place(rank, ranks, blocks))])


def test_initial_spread():
    big = initialise(ParameterSpec("w", (200, 300), 0, init_std=0.25), 0, "float32", Place(0, 1, 1))
    assert abs(big.std() - 0.25) < 0.005 and abs(big.mean()) < 0.005
    assert not initialise(ParameterSpec("b", (9,), 0), 0, "float32", Place(1, 2, 2)).any()


def test_no_seed_is_zeros(group):
    """Of every parameter but the scales of norms, which are 1: `seed=None`, for weights that will be loaded."""
    for kind, *sizes in ((mpitp.Decoder, config("gpt2")), (mpitp.ParallelMLP, 6, 21),
                         (mpitp.ColumnParallelLinear, 6, 5), (mpitp.VocabParallelEmbedding, 7, 6)):
        layer = kind(group, *sizes, seed=None)
        for name, w in layer.weights.items():
            assert (w == ("norm.weight" in name)).all(), name


def test_names_are_unique():
    a, b = ParameterSpec("a", (1,), None), ParameterSpec("b", (1,), None)
    assert by_name([a, b]) == {"a": a, "b": b}
    with pytest.raises(InputError, match="found two parameters named 'a', expected every name once"):
        by_name([a, b, a])


class Sliceable:
    """Neither an array nor of a NumPy dtype, as a tensor in a file is."""
    shape, dtype = [2, 3], "BF16"

    def __getitem__(self, window):
        raise AssertionError("not read before every parameter is checked")


def test_what_may_be_loaded():
    import ml_dtypes
    spec = ParameterSpec("w", (2, 3), 0)
    for good in (Sliceable(), np.ones((2, 3)), np.ones((2, 3), ">f4"), np.ones((2, 3), np.float16),
                 np.ones((2, 3), ml_dtypes.bfloat16), np.ones((2, 3), np.longdouble)):
        check_dense(spec, good)


@pytest.mark.parametrize("bad, said", [
    ([[1.0] * 3] * 2, "found list, expected an array of shape"), (1.0, "found float"), (None, "found NoneType"),
    (np.ones((3, 2)), r"found shape \(3, 2\), expected \(2, 3\)"), (np.ones(6), r"found shape \(6,\)"),
    (np.ones((2, 3), int), "found dtype int64"), (np.ones((2, 3), bool), "found dtype bool"),
    (np.ones((2, 3), complex), "found dtype complex128"), (np.ones((2, 3), object), "found dtype object"),
    (np.zeros((2, 3), "U1"), "found dtype <U1"), (np.zeros((2, 3), "V4"), r"found dtype \|V4"),
    (np.zeros((2, 3), "f4,f4"), "found dtype"), (np.zeros((2, 3), "M8[s]"), "found dtype datetime64"),
])
def test_what_may_not(bad, said):
    with pytest.raises(InputError, match=f"^w: {said}.*expected|^w: {said}"):
        check_dense(ParameterSpec("w", (2, 3), 0), bad)


def test_what_the_layers_declare(group):
    """Names, shapes, split axis, spread 1/sqrt(in) and weight decay, as the docstrings say."""
    def declared(layer):
        assert layer.specs.keys() == layer.weights.keys()
        return {name: (spec.shape, spec.axis, spec.init_std, spec.decay) for name, spec in layer.specs.items()}
    assert declared(mpitp.ParallelMLP(group, 4, 9, gated=True, name="mlp")) == {
        "mlp.up.weight": ((9, 4), 0, 1 / 2, True), "mlp.up.bias": ((9,), 0, 0, False),
        "mlp.gate.weight": ((9, 4), 0, 1 / 2, True), "mlp.gate.bias": ((9,), 0, 0, False),
        "mlp.down.weight": ((4, 9), 1, 1 / 3, True), "mlp.down.bias": ((4,), None, 0, False)}
    assert declared(mpitp.ParallelMLP(group, 4, bias=False)) == {
        "up.weight": ((16, 4), 0, 1 / 2, True), "down.weight": ((4, 16), 1, 1 / 4, True)}
    assert declared(mpitp.ColumnParallelLinear(group, 4, 9)) == {
        "weight": ((9, 4), 0, 1 / 2, True), "bias": ((9,), 0, 0, False)}
    assert declared(mpitp.RowParallelLinear(group, 9, 4)) == {
        "weight": ((4, 9), 1, 1 / 3, True), "bias": ((4,), None, 0, False)}


def test_gather_gives_copies(group):
    layer = mpitp.ParallelMLP(group, 4, 9)
    before = {name: w.tobytes() for name, w in layer.weights.items()}
    for dense in (layer.gather() or {}).values():
        dense.fill(np.nan)
    assert before == {name: w.tobytes() for name, w in layer.weights.items()}
