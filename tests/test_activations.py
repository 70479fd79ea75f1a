"""The activations and their derivatives against plain formulas; erf against the C library's."""
import math

import numpy as np
import pytest

from mpitp.oracle import activation as dense
from mpitp.errors import InputError
from mpitp.ops import activation
from mpitp.ops.activation import ACTIVATIONS, activation_backward, activation_forward
from mpitp.ops.erf import erf

H = np.concatenate([np.linspace(-12, 12, 40_001), [0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4]])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_derivatives(name, dtype):
    h = H.astype(dtype)
    a, slope = activation_forward(name, h, derivative=np.empty_like(h))
    (expected_a, expected_slope), bend = dense.forward(h.astype(float), name), dense.BEND[name]
    eps = np.finfo(dtype).eps
    assert a.dtype == slope.dtype == h.dtype
    assert (np.abs(a - expected_a) <= 6 * eps * np.abs(h)).all()
    # where the derivative is steep in h, the rounding of h itself shows: bend * |h|
    assert (np.abs(slope - expected_slope) <= 8 * eps * (1 + bend * np.abs(h) + np.abs(h) * (np.abs(h) < 9))).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["gelu_tanh", "silu"])
def test_no_cancellation_for_negative_input(name, dtype):
    """Relative accuracy where 1 + tanh would have cancelled."""
    h = np.linspace(-4, -0.1, 1000).astype(dtype)
    a, _ = activation_forward(name, h)
    expected, _ = dense.forward(h.astype(np.longdouble), name)
    assert (np.abs(a - expected) <= 60 * np.finfo(dtype).eps * np.abs(expected)).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_in_place_is_the_same_bytes(name):
    h = np.random.default_rng(0).standard_normal((7, activation.PIECE // 3)).astype("f")     # several pieces
    new, slope = activation_forward(name, h, derivative=np.empty_like(h))
    over = h.copy()
    assert activation_forward(name, over, out=over)[0] is over and over.tobytes() == new.tobytes()
    over = h.copy()
    a, d = activation_forward(name, over, derivative=over)
    assert d is over and a.tobytes() == new.tobytes() and d.tobytes() == slope.tobytes()
    da = np.random.default_rng(1).standard_normal(h.shape).astype("f")
    assert activation_backward(da, slope).tobytes() == (da * slope).tobytes()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_extremes(name):
    h = np.array([np.inf, 1e4, -1e4, np.nan, 0.0], "f")
    with np.errstate(all="raise", under="ignore", over="ignore", invalid="ignore"):
        a, _ = activation_forward(name, h)
    assert a[0] == np.inf and a[1] == np.float32(1e8 if name == "relu2" else 1e4) and np.isnan(a[3]) and a[4] == 0
    assert a[2] == (-1e4 if name == "identity" else 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_at_extremes(name, dtype):
    h = np.array([1e4, 30, -30, -1e4, 0.0, -0.0, np.nan], dtype)
    a, slope = activation_forward(name, h, derivative=np.empty_like(h))
    flat, steep = (1 if name == "identity" else 0), ([2e4, 60] if name == "relu2" else [1, 1])
    at_zero = {"identity": 1, "relu": 0, "relu2": 0}.get(name, 0.5)
    assert np.allclose(slope[:6], [*steep, flat, flat, at_zero, at_zero], atol=1e-11)
    assert a[4] == a[5] == 0 and (np.isnan(slope[6]) or name in ("relu", "identity"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_erf(dtype):
    """To 4 ULP; the worst places are those where one formula takes over from another."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-6.5, 6.5, 20_000), rng.uniform(-1, 1, 20_000), 10 ** rng.uniform(-30, 1, 2000),
                        rng.uniform(0.45, 0.6, 40_000), [0.5, -0.5, 4.0, -4.0, 6.0, 30.0]]).astype(dtype)
    expected = np.array([math.erf(v) for v in x.tolist()])
    spacing = np.spacing(np.abs(expected).astype(dtype)).astype(float)
    assert (np.abs(erf(x) - expected) <= 4 * spacing).all()
    special = erf(np.array([np.nan, np.inf, -np.inf, 0.0, -0.0], dtype))
    assert np.isnan(special[0]) and list(special[1:]) == [1, -1, 0, 0] and np.signbit(special[4])


def test_an_unknown_name():
    with pytest.raises(InputError, match="found activation 'swish', expected one of gelu_tanh"):
        activation_forward("swish", np.ones(3))


def test_the_config_names_the_same_activations():
    from mpitp import config
    assert tuple(ACTIVATIONS) == config.ACTIVATIONS
