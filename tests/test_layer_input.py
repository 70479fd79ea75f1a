"""Bad input to the layers: ValueError on every rank, with a line that names what was found and what was expected."""
import numpy as np
import pytest

import mpitp
from groups import group_fixture
from mpitp import InputError, ParameterSpec
from mpitp.sharding.parameters import by_name

pytestmark = pytest.mark.host       # NumPy arrays, as wrong as they can be


group = group_fixture("ordinary", scope="module")


@pytest.fixture(scope="module")
def mlp(group):
    return mpitp.ParallelMLP(group, 6, 13)


@pytest.mark.parametrize("arguments, said", [
    (dict(hidden_size=0), "hidden_size = 0"), (dict(hidden_size=-3), "hidden_size = -3"),
    (dict(hidden_size=2.5), "hidden_size = 2.5"), (dict(hidden_size=True), "hidden_size = True"),
    (dict(hidden_size="8"), "hidden_size = '8'"), (dict(hidden_size=4, ffn_hidden_size=0), "ffn_hidden_size = 0"),
    (dict(hidden_size=4, activation="swish"), "activation 'swish'"), (dict(hidden_size=4, dtype="float16"), "float16"),
    (dict(hidden_size=4, dtype="floaty"), "'floaty'"), (dict(hidden_size=4, dtype="int32"), "int32"),
    (dict(hidden_size=4, seed="x"), "seed 'x'"), (dict(hidden_size=4, seed=1.5), "seed 1.5"),
    (dict(hidden_size=np.array([4, 4])), "hidden_size = array"), (dict(hidden_size=np.True_), "hidden_size = "),
    (dict(hidden_size=None), "hidden_size = None"), (dict(hidden_size=4, dtype=None), "dtype None"),
    (dict(hidden_size=4, dtype=">f4"), "dtype '>f4'"), (dict(hidden_size=4, dtype="f4,f4"), "dtype 'f4,f4'"),
    (dict(hidden_size=4, dtype=complex), "complex"), (dict(hidden_size=4, activation=["relu"]), "activation ['relu']"),
    (dict(hidden_size=4, activation=None), "activation None"),
])
def test_constructor(group, arguments, said):
    with pytest.raises(InputError, match="expected") as caught:
        mpitp.ParallelMLP(group, **arguments)
    assert isinstance(caught.value, ValueError) and said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [mpitp.ColumnParallelLinear, mpitp.RowParallelLinear])
@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (4, -1), (4.0, 4)])
def test_linear_sizes(group, kind, sizes):
    with pytest.raises(InputError, match="features = .*expected a positive integer"):
        kind(group, *sizes)


def test_sizes_of_numpy(group):
    """They would overflow: 4 * np.int8(100) is -112."""
    layer = mpitp.ParallelMLP(group, np.int8(100), seed=None)
    assert (layer.hidden_size, layer.ffn_hidden_size) == (100, 400)
    layer = mpitp.RowParallelLinear(group, np.int8(100), np.int8(100), seed=np.int64(3))
    assert layer.specs["weight"].shape == (100, 100) and type(layer.in_features) is int


@pytest.mark.parametrize("x, said", [
    ([[1.0] * 6], "list"), (np.ones((2, 6)), "float64"), (np.ones((2, 7), "f"), r"\(2, 7\)"),
    (np.float32(1), "float32"), (np.ones((), "f"), r"\(\)"), (np.ones((2, 6), "i4"), "int32"), (None, "NoneType"),
    (np.ones((2, 6), ">f4"), ">f4"), (np.ones((2, 6), np.float16), "float16"), (np.ones((6, 0), "f"), r"\(6, 0\)"),
])
def test_forward(mlp, x, said):
    with pytest.raises(InputError, match=f"found.*{said}.*expected|{said}.*expected"):
        mlp.forward(x)


def test_backward(mlp):
    x = np.ones((2, 3, 6), "f")
    _, saved = mlp.forward(x)
    with pytest.raises(InputError, match="saved"):
        mlp.backward(x, None)
    with pytest.raises(InputError, match=r"dy.*\(2, 3, 5\)"):
        mlp.backward(np.ones((2, 3, 5), "f"), saved)
    with pytest.raises(InputError, match="7 rows.*6"):
        mlp.backward(np.ones((7, 6), "f"), saved)
    with pytest.raises(InputError, match="out"):
        mlp.backward(x, saved, out={})
    _, gradients = mlp.backward(x, saved)
    with pytest.raises(InputError, match="up.weight"):
        mlp.backward(x, saved, out={**gradients, "up.weight": np.ones((1, 1), "f")})
    before = {name: g.tobytes() for name, g in gradients.items()}
    for wrong in (gradients["down.weight"].astype(float), gradients["down.weight"].tolist(), None,
                  np.repeat(gradients["down.weight"], 2, axis=1)[:, ::2]):              # with gaps
        with pytest.raises(InputError, match=r"out\['down.weight'\]: found .*expected C-contiguous float32"):
            mlp.backward(x, saved, out={**gradients, "down.weight": wrong})
    with pytest.raises(InputError, match="out: found list, expected a dict"):
        mlp.backward(x, saved, out=list(gradients.values()))
    weights = {name: w.tobytes() for name, w in mlp.weights.items()}
    for wrong in (mlp.weights["down.weight"], mlp.weights["down.weight"][...]):         # another view of it, too
        if wrong.size:
            with pytest.raises(InputError, match=r"out: found out\['down.weight'\] and weights\['down.weight'\] in"):
                mlp.backward(x, saved, out={**gradients, "down.weight": wrong})
    assert before == {name: g.tobytes() for name, g in gradients.items()}
    assert weights == {name: w.tobytes() for name, w in mlp.weights.items()}
    for layer in (mpitp.ColumnParallelLinear(mlp.group, 6, 6, gather_output=True),
                  mpitp.RowParallelLinear(mlp.group, 6, 6, input_is_parallel=False)):
        _, saved = layer.forward(x)
        with pytest.raises(InputError, match="7 rows.*6"):
            layer.backward(np.ones((7, 6), "f"), saved)


def test_load_dense_changes_nothing_when_it_refuses(mlp):
    good = {name: np.full(spec.shape, 7.0) for name, spec in mlp.specs.items()}
    before = {name: w.copy() for name, w in mlp.weights.items()}
    for weights, said in [
        ({**good, "down.weight": np.ones((13, 6))}, r"down.weight: found shape \(13, 6\), expected \(6, 13\)"),
        ({**good, "extra": np.ones(3)}, "extra"),
        ({name: w for name, w in good.items() if name != "up.bias"}, "up.bias"),
        ({**good, "down.weight": [[1.0]]}, "down.weight: found list"),
        ({**good, "down.bias": np.ones(6, int)}, "down.bias: found dtype int64"),
        ({**good, "down.bias": np.ones(6, complex)}, "down.bias: found dtype complex128"),
        (list(good.values()), "weights: found list, expected a dict of up.weight"), (None, "weights: found NoneType"),
        ({}, r"weights: found names \(none\), expected up.weight"),
        ({**good, 3: np.ones(3)}, "found names .*3, expected"),
    ]:
        with pytest.raises(InputError, match=said):
            mlp.load_dense(weights)
        assert all(np.array_equal(before[name], mlp.weights[name]) for name in before)


def test_another_array_in_the_place_of_a_weight(mlp):
    """The layer would go on with the first one."""
    other = {"up.bias": mlp.weights["up.bias"] + 1}
    for replace in (lambda w: w.update(other), lambda w: w.__setitem__("up.bias", other["up.bias"])):
        with pytest.raises(InputError, match=r"found another array for weights\['up.bias'\]"):
            replace(mlp.weights)
    for replace in (lambda w: w.__ior__(other), lambda w: w.pop("up.bias"), lambda w: w.__delitem__("up.bias"),
                    lambda w: w.popitem(), lambda w: w.clear(), lambda w: w.setdefault("up.bias", other["up.bias"])):
        with pytest.raises(InputError, match="found weights to take away or to put in, expected to write into"):
            replace(mlp.weights)
    with pytest.raises(InputError, match="found another array for weights"):
        mlp.weights["up.bais"] = other["up.bias"]
    with pytest.raises(InputError, match="found another dict for weights, expected load_dense of it"):
        mlp.weights = dict(mlp.weights)
    mlp.weights.update(mlp.weights)                 # the same arrays
    assert mlp.weights.keys() == mlp.specs.keys()


def test_one_array_for_two_gradients(group):
    layer = mpitp.ParallelAttention(group, mpitp.AttentionConfig(20, 5))
    x = np.ones((1, 2, 20), "f")
    _, saved = layer.forward(x)
    _, gradients = layer.backward(x, saved)
    many, most = np.zeros(2 * 400, "f"), np.zeros((40, 20), "f")
    shape = gradients["query.weight"].shape
    one, other = (many[start:start + 400].reshape(20, 20)[:shape[0]] for start in (0, 1))
    overlapping = {"query.weight": one, "key.weight": other}
    apart = {"query.weight": most[:shape[0]], "key.weight": most[20:20 + shape[0]]}
    cases = [{"key.weight": gradients["query.weight"]}, {"key.weight": layer.weights["query.weight"]},
             {"key.weight": layer.weights["query.weight"][:]}, overlapping]
    for wrong in cases if gradients["query.weight"].size else []:
        with pytest.raises(InputError, match=r"^out: found .* in the same memory, expected an array for each gradient"):
            layer.backward(x, saved, out={**gradients, **wrong})
    layer.backward(x, saved, out={**gradients, **apart})            # neighbours in one array are apart


def test_a_name_used_twice():
    spec = ParameterSpec("w", (3,), None)
    with pytest.raises(InputError, match="two parameters named 'w'"):
        by_name([spec, spec])


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_any_memory_order_and_array_type(mlp):
    """np.matrix and np.memmap are arrays, too: what comes back is a plain one, and the bits are the same."""
    x = np.random.default_rng(0).standard_normal((4, 6)).astype("f")
    plain, saved = mlp.forward(x)
    dx, gradients = mlp.backward(x, saved)
    for other in (np.asfortranarray(x), np.matrix(x), np.repeat(x, 2, axis=1)[:, ::2]):
        y, saved = mlp.forward(other)
        assert type(y) is np.ndarray and y.tobytes() == plain.tobytes()
        dx2, gradients2 = mlp.backward(other, saved)
        assert dx2.tobytes() == dx.tobytes()
        assert all(gradients2[name].tobytes() == g.tobytes() for name, g in gradients.items())
