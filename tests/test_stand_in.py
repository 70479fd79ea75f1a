"""The stand-in for CuPy, which other tests run on, is as strict as it promises."""
import numpy as np
import pytest
import stand_in

from mpitp.arrays import HALF_DTYPES, compute_dtype

cupy = stand_in.cupy


@pytest.fixture(autouse=True)
def stand_in_for_cupy(monkeypatch):
    stand_in.install(monkeypatch)


def device_array(*values):
    return cupy.array(np.array(values, np.float32))


@pytest.mark.parametrize("name", ["errstate", "float128", "nditer", "default_stream", "host"])
def test_it_has_cupys_names_alone(name):
    with pytest.raises(AttributeError, match=f"module 'cupy' has no attribute '{name}'"):
        getattr(cupy, name)
    assert cupy.float32 is np.float32 and cupy.inf == np.inf and callable(cupy.where)


@pytest.mark.parametrize("operation", [
    lambda x, host: x + host, lambda x, host: host + x, lambda x, host: cupy.add(x, host), lambda x, host: x.dot(host),
    lambda x, host: cupy.where(x > 0, x, host), lambda x, host: cupy.stack([x, host]), lambda x, host: np.asarray(x),
    lambda x, host: np.stack([x, x]), lambda x, host: np.add.reduce(x), lambda x, host: x.__setitem__(0, host[0:1]),
    lambda x, host: x.__iadd__(host), lambda x, host: host.__iadd__(x)])
def test_host_and_device_do_not_mix(operation):
    with pytest.raises(TypeError):
        operation(device_array(1, 2), np.ones(2, np.float32))


def test_what_cupy_takes():
    x = device_array(1, 2)
    for found, expected in ((np.float32(2) * x, [2, 4]), (x + 1, [2, 3]), (np.exp(x), np.exp([1, 2])), (-x, [-1, -2]),
                            (x[np.array([1])], [2]), (x.sum(), 3), (x[0], 1), (cupy.maximum(x, 1.5), [1.5, 2])):
        assert type(found) is cupy.ndarray and np.allclose(found.get(), expected)
    assert not isinstance(x, np.ndarray) and float(x[1]) == 2 and (x > 1).any() and len(x) == 2
    with pytest.raises(TypeError, match="Wrong arguments {'order'}"):
        cupy.add(x, x, order="C")
    with pytest.raises(AttributeError):
        x.base                                      # noqa: B018


def test_memory_is_shared_where_cupy_shares_it():
    x = kept = device_array(1, 2, 3, 4)
    x += 1
    x.reshape(2, 2)[1] = 0
    assert kept is x and x.get().tolist() == [2, 3, 0, 0] and cupy.asarray(x) is x
    assert cupy.add(x, 1, out=x) is x and x.get().tolist() == [3, 4, 1, 1]


def test_streams_keep_their_order():
    """A kernel sees the copy that its stream was told before; MPI must wait for either."""
    stream, x, host = stand_in.default_stream, device_array(1, 2), np.array([3, 4], np.float32)
    stream.synchronize()
    x.set(host)
    assert stream.copies and x.memory.tolist() == [1, 2]
    assert (x + 1).get().tolist() == [4, 5]
    assert not stream.mistakes and x.__cuda_array_interface__ and not stream.mistakes
    x += 1
    assert x.__cuda_array_interface__ and len(stream.mistakes) == 1


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_kernels_round_where_a_gpu_does(dtype):
    """Products to 16 bits, sums of gradients in float32; what is written in place stays the array that it is."""
    dtype = compute_dtype(dtype, "gpu")
    linear, activation = stand_in.Kernels("linear"), stand_in.Kernels("activation")
    x = cupy.array(np.full((2, 3), 1 / 3).astype(dtype))
    assert linear.product(x, x.T).dtype == dtype and linear.product(x, x.T, dtype=np.float32).dtype == np.float32
    assert linear.bias_backward(x).dtype == np.float32
    y = cupy.array(x)
    a, _ = activation.activation_forward("relu", y, out=y)
    assert a.data.ptr == y.data.ptr and a.dtype == dtype
    with pytest.raises(TypeError):
        linear.product(x, np.ones((3, 2), dtype))
