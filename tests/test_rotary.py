"""Rotary positions: known frequencies, the rotation itself, and that only differences of positions matter."""
import numpy as np
import pytest

from mpitp import InputError
from mpitp.attention_config import Rotary
from mpitp.ops.rotary import frequencies, rotary_backward, rotary_forward, rotary_tables
from spmd import draw, same_bytes

# Computed with transformers 5.23.0 (modeling_rope_utils.ROPE_INIT_FUNCTIONS, float32, 7 digits) on torch 2.13.0.
KNOWN = [
    (Rotary(scaling="linear", factor=4.0), 16, 1.0,
     [0.25, 0.07905694, 0.025, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-05]),
    (Rotary(base=500000.0, scaling="llama3", factor=8.0, original_max_positions=8192), 32, 1.0,
     [1.0, 0.4403666, 0.1939228, 0.0853971, 0.03760603, 0.01656044, 0.007292665, 0.003211446, 0.000524846, 7.784655e-05,
      3.428102e-05, 1.509622e-05, 6.64787e-06, 2.9275e-06, 1.289173e-06, 5.677088e-07]),
    (Rotary(scaling="llama3", factor=32.0, low_freq_factor=2.0, high_freq_factor=8.0, original_max_positions=128), 16,
     1.0, [1.0, 0.2366871, 0.003725355, 0.0009882118, 0.0003125, 9.882118e-05, 3.125e-05, 9.882118e-06]),
    (Rotary(scaling="yarn", factor=4.0, original_max_positions=2048), 32, 1.138629436111989,
     [1.0, 0.5623413, 0.3162278, 0.1778279, 0.1, 0.05020904, 0.02484647, 0.0120669, 0.005714286, 0.00261087,
      0.001129385, 0.0004445699, 0.00025, 0.0001405853, 7.905695e-05, 4.445699e-05]),
    (Rotary(base=150000.0, scaling="yarn", factor=32.0, original_max_positions=4096, truncate=False), 16,
     1.3465735902799727,
     [1.0, 0.225418, 0.05081327, 0.006794959, 0.0004564839, 1.818834e-05, 4.099978e-06, 9.24209e-07]),
    (Rotary(base=100.0, scaling="yarn", factor=40.0, original_max_positions=16, attention_factor=0.75, beta_fast=2.0),
     16, 0.75, [1.0, 0.2881999, 0.007905695, 0.004445699, 0.0025, 0.001405853, 0.0007905695, 0.0004445699]),
    (Rotary(base=10.0, scaling="yarn", factor=4.0, original_max_positions=20000, beta_fast=1000.0), 8,
     1.138629436111989, [1.0, 0.5623413, 0.3162278, 0.1511537]),
    (Rotary(scaling="yarn", factor=0.5, original_max_positions=6), 8, 1.0, [1.0, 0.2, 0.02, 0.002]),
]
interleavings = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
partial = pytest.mark.parametrize("dim", [None, 4, 2])


@pytest.mark.parametrize("rotary, dim, factor, known", KNOWN, ids=[f"{r.scaling}-{r.factor:g}" for r, *_ in KNOWN])
def test_known_frequencies(rotary, dim, factor, known):
    found, attention_factor = frequencies(rotary, dim)
    assert np.allclose(found, known, 6e-7, 0) and abs(attention_factor - factor) < 1e-12
    cos, sin = rotary_tables(rotary, dim, range(3), "float64")
    assert np.allclose(cos[2], np.cos(2 * found) * factor) and np.allclose(sin[2], np.sin(2 * found) * factor)
    assert found.dtype == cos.dtype == np.float64


def test_a_base_of_1_with_yarn_is_refused():
    """The ramp is over powers of the base; without a ramp, a base of 1 is a choice, if a strange one."""
    with pytest.raises(InputError, match="found rotary base = 1, expected another one for yarn"):
        Rotary(base=1.0, scaling="yarn", factor=4.0, original_max_positions=2048)
    assert frequencies(Rotary(base=1.0), 8)[0].tolist() == [1.0] * 4


def test_frequencies_without_scaling():
    found, factor = frequencies(Rotary(base=100.0), 4)
    assert factor == 1 and np.allclose(found, [1, 0.1], 1e-15)


def test_tables():
    """Part of the head, any positions; computed in float64 and rounded once."""
    rotary = Rotary(dim=6, base=500.0)
    single, double = (rotary_tables(rotary, 10, [0, 5, 100_003], dtype) for dtype in ("float32", "float64"))
    for a, b in zip(single, double):
        assert a.shape == (3, 3) and same_bytes(a, b.astype("float32"))
    assert (double[0][0] == 1).all() and (double[1][0] == 0).all()
    assert abs(double[0][2, 1] - np.cos(100_003 * 500 ** (-1 / 3))) < 1e-9


def turned(x, cos, sin, interleaved):
    """The same in complex numbers: u + i v times cos + i sin."""
    dim, out = 2 * cos.shape[1], x.copy()
    first, second = (slice(0, dim, 2), slice(1, dim, 2)) if interleaved else (slice(dim // 2), slice(dim // 2, dim))
    z = (x[..., first] + 1j * x[..., second]) * (cos + 1j * sin)[:, None]
    out[..., first], out[..., second] = z.real, z.imag
    return out


@interleavings
@partial
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(2, 7, 3, 6), (7, 1, 6), (3, 2, 7, 2, 6), (0, 7, 2, 6), (2, 7, 0, 6)], ids=str)
def test_rotation(dim, interleaved, dtype, shape):
    rotary = Rotary(dim=dim, interleaved=interleaved)
    x, (cos, sin) = draw(1, *shape, dtype=dtype), rotary_tables(rotary, 6, range(7), dtype)
    before = [a.tobytes() for a in (x, cos, sin)]
    y = rotary_forward(x, cos, sin, interleaved)
    exact = turned(x.astype(float), cos.astype(float), sin.astype(float), interleaved)
    assert y.dtype == x.dtype and y.shape == x.shape and not np.shares_memory(x, y)
    assert np.abs(y - exact).max(initial=0) <= 4 * np.finfo(dtype).eps * np.abs(x).max(initial=0)
    turning = 6 if dim is None else dim
    assert same_bytes(y[..., turning:], x[..., turning:])
    assert before == [a.tobytes() for a in (x, cos, sin)]
    spread = np.zeros((*shape[:-1], 15), dtype)[..., 2:14:2]           # with gaps: the same bits
    spread[...] = x
    assert same_bytes(rotary_forward(spread, cos, sin, interleaved), y)
    assert all(same_bytes(rotary_forward(x[..., h:h + 1, :], cos, sin, interleaved), y[..., h:h + 1, :])
               for h in range(shape[-2]))                              # of a head, whichever others are there


@interleavings
@partial
@pytest.mark.parametrize("scaling", [None, "yarn"])
def test_adjoint_identity(dim, interleaved, scaling):
    """<dy, R v> = <R^T dy, v>; without an attention factor R^T is R's inverse too."""
    rotary = Rotary(dim=dim, interleaved=interleaved, scaling=scaling, factor=4.0, original_max_positions=16)
    v, dy, (cos, sin) = draw(1, 2, 7, 3, 6), draw(2, 2, 7, 3, 6), rotary_tables(rotary, 6, range(7), "float64")
    y, dv = rotary_forward(v, cos, sin, interleaved), rotary_backward(dy, cos, sin, interleaved)
    assert abs((dy * y).sum() - (dv * v).sum()) <= 1e-13 * np.abs(dy).sum()
    d, h = draw(3, 2, 7, 3, 6), 1e-5
    moved = [rotary_forward(v + step * d, cos, sin, interleaved) for step in (h, -h)]
    assert abs((dy * (moved[0] - moved[1])).sum() / (2 * h) - (dv * d).sum()) <= 1e-8 * np.abs(dv * d).sum()
    back = rotary_backward(y, cos, sin, interleaved)
    assert np.allclose(back, v, 1e-14, 1e-14) == (scaling is None)


@interleavings
def test_only_differences_of_positions_matter(interleaved):
    """<R_m q, R_n k> is a function of m - n."""
    q, k = draw(1, 1, 1, 8), draw(2, 1, 1, 8)

    def score(m, n):
        at_m, at_n = (rotary_tables(Rotary(), 8, [position], "float64") for position in (m, n))
        return (rotary_forward(q, *at_m, interleaved) * rotary_forward(k, *at_n, interleaved)).sum()
    assert abs(score(5, 2) - score(105, 102)) < 1e-12 and abs(score(5, 2) - score(5, 3)) > 1e-3
