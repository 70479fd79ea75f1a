"""The CuPy twins of the operations against the NumPy ones in float64, each dtype and odd sizes. Needs a GPU.

What may be wrong: the result's rounding, and sums in the dtype that products are added up in.
"""
import ctypes
import math

import numpy as np
import pytest

from mpitp.arrays import GPU_DTYPES, compute_dtype, sum_dtype
from mpitp.attention_config import Rotary
from mpitp.ops import (activation, adamw, attention, cross_entropy, dropout, embedding, greatest, keys_values, linear,
                       norm, rotary)


def has_gpu():
    try:
        import cupy
        return cupy.cuda.runtime.getDeviceCount() > 0
    except Exception:                           # no CuPy, no driver
        return False


pytestmark = pytest.mark.skipif(not has_gpu(), reason="no GPU")
dtypes = pytest.mark.parametrize("dtype", GPU_DTYPES)


class Case:
    """Numbers on the device in a dtype, and the same numbers on the host in float64."""

    def __init__(self, dtype, seed=0):
        import cupy
        self.xp, self.dtype = cupy, compute_dtype(dtype, "gpu")
        self.sum_dtype, self.numbers = sum_dtype(self.dtype), np.random.default_rng(seed)

    def draw(self, *shape, scale=1.0, dtype=None):
        rounded = (self.numbers.standard_normal(shape) * scale).astype(self.dtype if dtype is None else dtype)
        return self.xp.asarray(rounded), rounded.astype(np.float64)

    def check(self, found, expected, terms=1, what=""):
        """found, rounded once to its dtype, is a sum of `terms` in the dtype of sums: an error of a few of each."""
        expected = np.asarray(expected)
        assert found.shape == expected.shape, (what, found.shape, expected.shape)
        if not found.size:
            return
        found = found.get().astype(np.float64)
        size = np.abs(expected).max() + 1e-30
        eps = float(np.finfo(np.float32).eps if self.sum_dtype == np.float32 else np.finfo(np.float64).eps)
        rounding = {"float16": 2.0 ** -11, "bfloat16": 2.0 ** -8}.get(self.dtype.name, 0)
        worst = np.abs(found - expected).max() / size
        assert worst <= 2 * rounding + 8 * math.sqrt(max(terms, 4)) * eps, f"{what}: {worst}"


# --- products ------------------------------------------------------------------------------------------------------

@dtypes
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (7, 13, 5), (64, 96, 80), (1, 96, 80), (1, 13, 7), (1, 4096, 33),
                                     (1, 1, 20000), (3, 0, 4), (0, 3, 4), (1, 512, 16400), (1, 130, 9000), (130, 1, 3),
                                     (2, 8, 1), (3, 128, 33), (5, 4104, 70), (8, 520, 4100), (16, 1544, 8200)])
def test_product(dtype, m, k, n):
    case = Case(dtype)
    (x, x64), (w, w64) = case.draw(m, k), case.draw(n, k)
    y, _ = linear.linear_forward(x, w)
    case.check(y, x64 @ w64.T, k)
    leaf, _ = linear.linear_forward(x, w, dtype=case.sum_dtype)
    assert leaf.dtype == case.sum_dtype
    case.check(leaf, x64 @ w64.T, k)
    dy, dy64 = case.draw(m, n)
    dw = case.xp.full((n, k), 7, case.sum_dtype)
    dx, found = linear.linear_backward(dy, (x, w), dw_out=dw)
    assert found is dw
    case.check(dx, dy64 @ w64, n)
    case.check(dw, dy64.T @ x64, m)
    added = dw.copy()
    linear.product(dy.T, x, added, add=True)
    case.check(added, 2 * (dy64.T @ x64), m)
    case.check(linear.bias_backward(dy, out=case.xp.empty(n, case.sum_dtype)), dy64.sum(axis=0), m)


@dtypes
@pytest.mark.parametrize("start, width", [(0, 16), (8, 16), (3, 16), (5, 13), (1, 1)])
def test_bits_do_not_depend_on_what_lies_beside(dtype, start, width):
    """A block of columns or rows of a larger array, wherever it lies, as a compact copy of it."""
    case = Case(dtype)
    for m in (1, 9):
        (x, _), (w, _) = case.draw(m, 40), case.draw(24, 40)
        columns = slice(start, start + width)
        apart = [case.xp.ascontiguousarray(a[:, columns]) for a in (x, w)]
        for out_dtype in {case.dtype, case.sum_dtype}:
            inside, _ = linear.linear_forward(x[:, columns], w[:, columns], dtype=out_dtype)
            outside, _ = linear.linear_forward(*apart, dtype=out_dtype)
            assert inside.get().tobytes() == outside.get().tobytes()
        into = case.xp.zeros((m, 50), case.dtype)
        linear.linear_forward(x, w[start:start + width], out=into[:, columns])
        alone, _ = linear.linear_forward(x, w[start:start + width].copy())
        rows = min(width, 24 - start)
        assert into[:, start:start + rows].get().tobytes() == alone.get().tobytes()


def test_bits_of_a_few_rows_do_not_depend_on_their_number():
    """A sequence of a batch gets the text that it gets beside any other ones, where a kernel of ours multiplies."""
    case = Case("float32")
    (x, _), (w, _) = case.draw(16, 264), case.draw(9000, 264)
    all_rows, _ = linear.linear_forward(x, w)
    for rows in (2, 3, 5, 9):
        found, _ = linear.linear_forward(x[:rows], w[:5 * rows])
        assert found.get().tobytes() == all_rows[:rows, :5 * rows].get().tobytes()


@dtypes
@pytest.mark.parametrize("out_features, in_features, start, step", [
    (40, 64, 0, 1), (5, 13, 1, 1), (1, 1, 0, 1), (4100, 72, 8, 1), (17000, 40, 0, 1), (24, 40, 0, 2)])
def test_two_products_at_once_have_the_bits_of_each(dtype, out_features, in_features, start, step):
    case = Case(dtype)
    (v, v64), (w, _) = case.draw(out_features, in_features + start), case.draw(out_features, step * in_features + start)
    v, w = v[:, start:], w[:, start::step]
    for rows in (1, 3):
        x, x64 = case.draw(rows, in_features)
        found = linear.two_linears_forward(x, v, w)
        case.check(found[0], x64 @ v64[:, start:].T, in_features)
        for y, of in zip(found, (v, w)):
            assert y.get().tobytes() == linear.linear_forward(x, of)[0].get().tobytes()
    assert [y.shape for y in linear.two_linears_forward(x[:1], v[:0], w[:0])] == [(1, 0)] * 2


@dtypes
def test_stacks(dtype):
    """Products of stacks, as attention does them: heads that lie among each other, written where they belong."""
    case = Case(dtype)
    for S, K in ((7, 8), (5, 3), (16, 24)):
        (a, a64), (b, b64) = (case.draw(S, 3, K) for _ in range(2))         # (positions, heads, features)
        a, a64, b, b64 = (x.swapaxes(0, 1) for x in (a, a64, b, b64))
        scores = linear.product(a, b.swapaxes(1, 2), dtype=case.sum_dtype)
        case.check(scores, a64 @ b64.swapaxes(1, 2), K)
        out = case.xp.full((S, 3, K), 3, case.sum_dtype)
        weights, weights64 = case.draw(3, S, S)
        linear.product(weights.swapaxes(1, 2), b, out.swapaxes(0, 1), add=True)
        case.check(out.swapaxes(0, 1), 3 + weights64.swapaxes(1, 2) @ b64, S)


# --- elementwise -----------------------------------------------------------------------------------------------------

@dtypes
@pytest.mark.parametrize("name", activation.ACTIVATIONS)
@pytest.mark.parametrize("biased", [False, True])
def test_activation(dtype, name, biased):
    case = Case(dtype)
    (h, h64), (b, b64) = case.draw(5, 37, scale=3), case.draw(37)
    h[0, :3], h64[0, :3] = case.xp.asarray([-60.0, 0.0, 60.0], case.dtype), [-60.0, 0.0, 60.0]
    slope64 = np.empty_like(h64)
    a64, _ = activation.activation_forward(name, h64.copy(), derivative=slope64, bias=b64 if biased else None)
    slope = case.xp.empty_like(h)
    a, kept = activation.activation_forward(name, h, derivative=slope, bias=b if biased else None)
    assert kept is slope
    case.check(a, a64, what="forward")
    case.check(slope, slope64, what="derivative")
    in_place, _ = activation.activation_forward(name, h, out=h, bias=b if biased else None)
    assert in_place is h and h.get().tobytes() == a.get().tobytes()


@dtypes
@pytest.mark.parametrize("shape", [(5, 37), (3, 64), (0, 8)])
@pytest.mark.parametrize("biased", [False, True])
def test_gate(dtype, shape, biased):
    case = Case(dtype)
    results = []
    (h, h64), (up, up64), (b, b64), (c, c64), (da, da64) = (
        case.draw(*s, scale=2) for s in (shape, shape, shape[1:], shape[1:], shape))
    for h_, up_, b_, c_, da_ in ((h, up, b, c, da), (h64, up64, b64, c64, da64)):
        biases = (b_, c_) if biased else (None, None)
        a, _ = activation.gated_forward("silu", h_.copy(), up_.copy(), *biases, saved=False)
        again, saved = activation.gated_forward("silu", h_.copy(), up_.copy(), *biases)
        assert a.tobytes() == again.tobytes()
        results.append((a, *activation.gated_backward(da_.copy(), saved)))
    for found, expected, what in zip(*results, ("a", "dh", "dup")):
        case.check(found, expected, what=what)
    y = h.copy()
    activation.add_to(y, up)
    case.check(y, h64 + up64)


@dtypes
def test_rotary_from_any_position(dtype):
    case = Case(dtype)
    x, x64 = case.draw(3, 4, 2, 10)
    starts = np.array([0, 5, 3])
    cos, sin = rotary.rotary_tables(Rotary(), 10, range(9), case.sum_dtype, case.xp)
    tables64 = rotary.rotary_tables(Rotary(), 10, range(9), np.float64)
    case.check(rotary.rotary_forward(x, cos, sin, False, case.xp.asarray(starts)),
               rotary.rotary_forward(x64, *tables64, False, starts))


@dtypes
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [None, 6])
def test_rotary(dtype, interleaved, dim):
    case = Case(dtype)
    kind = Rotary(dim=dim, interleaved=interleaved)
    x, x64 = case.draw(2, 7, 3, 10)
    tables = [rotary.rotary_tables(kind, 10, range(7), d, xp) for d, xp in
              ((case.sum_dtype, case.xp), (np.float64, np))]
    case.check(rotary.rotary_forward(x, *tables[0], interleaved), rotary.rotary_forward(x64, *tables[1], interleaved))
    case.check(rotary.rotary_backward(x, *tables[0], interleaved), rotary.rotary_backward(x64, *tables[1], interleaved))
    turned = x.swapaxes(1, 2)[:, :7].swapaxes(1, 2)                    # strides of any kind
    case.check(rotary.rotary_forward(turned, *tables[0], interleaved),
               rotary.rotary_forward(np.ascontiguousarray(turned.get()).astype(np.float64), *tables[1], interleaved))


@dtypes
@pytest.mark.parametrize("decay, scale", [(1.0, 1.0), (0.99, 0.3)])
def test_adamw(dtype, decay, scale):
    case = Case(dtype)
    numbers = dict(beta1=0.9, beta2=0.95, rate=1e-2, root=1.7, eps=1e-8, decay=decay, scale=scale)
    (w, w64), (g, g64), (m, m64), (v, v64) = (case.draw(1001, dtype=case.sum_dtype) for _ in range(4))
    v, v64 = abs(v), abs(v64)
    adamw.adamw_step(w, g, m, v, **numbers)
    adamw.adamw_step(w64, g64, m64, v64, **numbers)
    for found, expected in ((w, w64), (m, m64), (v, v64)):
        case.check(found, expected)
    rounded = case.xp.zeros(1001, case.dtype)
    adamw.adamw_step(w, g, m, v, **numbers, rounded=rounded)
    assert rounded.tobytes() == w.astype(case.dtype).tobytes()


@pytest.mark.parametrize("window", [
    (slice(0, 3), slice(0, 5), slice(0, 7)), (slice(1, 3), slice(2, 5), slice(0, 7)),
    (slice(0, 3), slice(1, 4), slice(2, 5)),
    (1, slice(2, 4), slice(0, 7)), (slice(0, 0), slice(0, 5), slice(0, 7)), (2, slice(1, 5), slice(3, 7))])
def test_dropout_drops_what_numpy_drops(window):
    case = Case("float32")
    for shape in ((3, 5, 7), (3, 5, 7, 11)):
        part = window if len(shape) == 3 else (*window, slice(2, 9))
        arguments = 3, "layers.0.dropout", 17, 0.3, shape, part, np.float32
        found = dropout.dropout_scale(*arguments, case.xp)
        assert found.get().tobytes() == dropout.dropout_scale(*arguments).tobytes()


# --- sums over rows ---------------------------------------------------------------------------------------------------

@dtypes
@pytest.mark.parametrize("kind", norm.KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 2, 64), (700, 129), (0, 4), (2, 3000), (2, 5000)])
@pytest.mark.parametrize("zero_centered, biased", [(False, True), (True, False)])
def test_norm(dtype, kind, shape, zero_centered, biased):
    case = Case(dtype)
    (x, x64), (w, w64), (b, b64), (dy, dy64) = (case.draw(*shape), case.draw(shape[-1]), case.draw(shape[-1]),
                                                case.draw(*shape))
    results = []
    for arrays in ((x, w, b, dy), (x64, w64, b64, dy64)):
        y, saved = norm.norm_forward(arrays[0], arrays[1], arrays[2] if biased else None, kind, 1e-5, zero_centered)
        results.append((y, *norm.norm_backward(arrays[3], saved)))
    for found, expected, what in zip(*results, ("y", "dx", "dw", "db")):
        if expected is None:
            assert found is None
        elif shape[-1] > 1 or what != "dx":     # of one feature dx is 0 but for rounding
            case.check(found, expected, max(shape), what)


@pytest.mark.parametrize("kind", norm.KINDS)
@pytest.mark.parametrize("K", [4, 5000])
def test_a_norm_that_overflows_is_not_a_number(kind, K):
    """0 would go unseen for ever; to ask for it at each norm would be a wait."""
    case = Case("float32")
    x = np.ones((3, K), "f")
    x[1, :2] = 1e30, -1e30
    y, _ = norm.norm_forward(case.xp.asarray(x), case.xp.ones(K, "f"), None, kind, 1e-5)
    assert np.isnan(y.get()[1]).all() and np.isfinite(y.get()[::2]).all()


@dtypes
@pytest.mark.parametrize("N, V", [(1, 1), (5, 13), (4, 5000), (3, 0)])
@pytest.mark.parametrize("smooth", [False, True])
def test_cross_entropy(dtype, N, V, smooth):
    case = Case(dtype)
    z, z64 = case.draw(N, V + 3, scale=4)
    z, z64 = z[:, :V], z64[:, :V]
    targets = case.numbers.integers(-2, V + 2, N)
    device_targets = case.xp.asarray(targets)
    top, top64 = cross_entropy.row_maximum(z), cross_entropy.row_maximum(z64)
    assert np.array_equal(top.get().astype(np.float64), top64)
    if not V:
        return
    sums, sums64 = (cross_entropy.row_sums(*arguments, smooth)
                    for arguments in ((z, top, device_targets), (z64, top64, targets)))
    for found, expected in zip(sums, sums64):
        case.check(found, expected, V)
    factor64, own64, every64 = (abs(case.draw(N, dtype=np.float32)[1]) for _ in range(3))
    factor64[0] = own64[0] = every64[0] = 0     # a row that does not count, whatever it holds
    z[0], z64[0] = math.nan, math.nan
    numbers = [case.xp.asarray(n.astype(case.sum_dtype)) for n in (factor64, own64, every64)]
    out = case.xp.empty((N, V + 2), case.dtype)[:, :V]
    cross_entropy.row_gradient(z, top, device_targets, numbers[0], numbers[1], numbers[2] if smooth else None, out)
    expected = np.empty((N, V))
    cross_entropy.row_gradient(z64, top64, targets, factor64, own64, every64 if smooth else None, expected)
    case.check(out, expected)


@dtypes
@pytest.mark.parametrize("N, rows, H", [(1, 1, 1), (50, 7, 33), (9, 40, 5), (0, 3, 4), (6, 0, 4)])
def test_embedding(dtype, N, rows, H):
    case = Case(dtype)
    (w, w64), (d, d64) = case.draw(rows, H), case.draw(N, H)
    ids = case.numbers.integers(-2, rows + 2, N)
    device_ids = case.xp.asarray(ids)
    y = embedding.embedding_forward(w, device_ids)
    assert y.get().astype(np.float64).tobytes() == embedding.embedding_forward(w64, ids).tobytes()
    out = case.xp.full((rows, H), 5, case.sum_dtype)
    assert embedding.embedding_backward(d, device_ids, rows, out=out) is out
    case.check(out, embedding.embedding_backward(d64, ids, rows), N)


@dtypes
@pytest.mark.parametrize("B, V", [(1, 1), (3, 50), (2, 5000), (2, 0)])
def test_greatest(dtype, B, V):
    """Of equal logits the lowest id; a NaN before all; -1 where the largest is not finite."""
    case = Case(dtype)
    (z, z64) = case.draw(B, V + 3)
    for value, places in ((None, []), (9, [(0, 0), (-1, -1)]), (np.inf, [(-1, V // 2)]), (np.nan, [(0, -1), (0, 0)])):
        for b, v in places if V else []:
            z[b, :V][v] = z64[b, :V][v] = value
        found = greatest.greatest_of_rank(z[:, :V], 7)
        expected = greatest.greatest_of_rank(z64[:, :V], 7)
        assert found.get().tobytes() == expected.tobytes() or np.isnan(expected).any() and \
            np.array_equal(found.get(), expected, equal_nan=True)
        for more in ([], [[-1.0, 99]] * B, [[9.0, 99]] * B, [[np.nan, 99]] * B):
            ranks = [expected] + ([np.array(more)] if more else [])
            ids = greatest.greatest_of_ranks(case.xp.asarray(np.stack(ranks)))
            assert np.array_equal(ids.get(), greatest.greatest_of_ranks(np.stack(ranks)))


# --- attention --------------------------------------------------------------------------------------------------------

CHOICES = {"causal": {}, "all": dict(causal=False), "window": dict(window=5), "short": dict(window=1),
           "slopes": dict(slopes=True), "mask": dict(mask=1), "mask of each": dict(mask=2, causal=False),
           "dropped": dict(keep=True), "everything": dict(window=9, slopes=True, mask=2, keep=True)}


@dtypes
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("G, H, Q, S, K", [(2, 3, 7, 7, 6), (1, 1, 1, 9, 8), (1, 4, 5, 12, 16), (2, 2, 700, 700, 10),
                                           (3, 1, 1100, 1100, 8)])
def test_attention(dtype, choice, G, H, Q, S, K):
    case, options, options64 = Case(dtype), dict(CHOICES[choice]), dict(CHOICES[choice])
    if "slopes" in options:
        options["slopes"], options64["slopes"] = case.draw(G, H, scale=0.1, dtype=case.sum_dtype)
    if "mask" in options:
        mask = case.numbers.random((S,) if options["mask"] == 1 else (Q, S)) < 0.7
        options["mask"], options64["mask"] = case.xp.asarray(mask), mask
    if "keep" in options:
        scales = ((case.numbers.random((G, H, Q, S)) < 0.8) / 0.75).astype(case.sum_dtype)
        options["keep"] = lambda first, stop: case.xp.asarray(scales[:, :, first:stop])
        options64["keep"] = lambda first, stop: scales[:, :, first:stop].astype(np.float64)
    (q, q64), (dout, dout64) = (case.draw(Q, G, H, K) for _ in range(2))         # heads apart, as in a layer
    (k, k64), (v, v64) = (case.draw(S, G, K) for _ in range(2))
    results = []
    for q_, k_, v_, d_, more in ((q, k, v, dout, options), (q64, k64, v64, dout64, options64)):
        q_, d_ = (x.transpose(1, 2, 0, 3) for x in (q_, d_))
        k_, v_ = (x.swapaxes(0, 1) for x in (k_, v_))
        xp = case.xp if q_.dtype == case.dtype and q is not q64 and hasattr(q_, "get") else np
        out, dq = (xp.empty((Q, G, H, K), q_.dtype).transpose(1, 2, 0, 3) for _ in range(2))
        lse = attention.attention_forward(q_, k_, v_, 0.3, out=out, **more)
        dk, dv = (x.swapaxes(0, 1) for x in xp.full((2, S, G, K), 9, np.float64 if xp is np else case.sum_dtype))
        attention.attention_backward(d_, lse, q_, k_, v_, out, 0.3, dq=dq, dk=dk, dv=dv, **more)
        results.append((out, lse, dq, dk, dv))
    for found, expected, what in zip(*results, ("out", "lse", "dq", "dk", "dv")):
        if choice == "short" and what in ("dq", "dk"):      # of one key alone they are 0 but for rounding
            continue
        # 16-bit: p and ds are rounded once on the way, out before delta
        case.check(found, expected, 16 * S, what) if case.dtype.itemsize > 2 else loosely(found, expected, case, what)


def loosely(found, expected, case, what):
    worst = np.abs(found.get().astype(np.float64) - expected).max() / np.abs(expected).max()
    assert worst < 8 * {"float16": 2.0 ** -11, "bfloat16": 2.0 ** -8}[case.dtype.name], f"{what}: {worst}"


@dtypes
@pytest.mark.parametrize("window, biased", [(None, False), (70, True), (1, False), (300, False)])
@pytest.mark.parametrize("B, G, H, K, C", [(1, 2, 6, 10, 700), (3, 1, 1, 64, 257), (2, 3, 3, 130, 40),
                                           (2, 1, 4, 128, 300), (1, 1, 2, 256, 900)])
def test_last_query(dtype, window, biased, B, G, H, K, C):
    case, starts = Case(dtype), np.array([C - 2, 0, 17])[:B]
    (q, q64), (keys, keys64), (values, values64) = case.draw(B, H + 1, K), case.draw(B, C, G, K), case.draw(B, C, G, K)
    (new_k, new_k64), (new_v, new_v64) = (case.draw(B, 1, G, K) for _ in range(2))
    slopes = case.draw(G, H // G, scale=0.1, dtype=case.sum_dtype) if biased else (None, None)
    results = []
    for q_, k_, v_, nk, nv, slope, xp in ((q, keys, values, new_k, new_v, slopes[0], case.xp),
                                          (q64, keys64, values64, new_k64, new_v64, slopes[1], np)):
        at = xp.asarray(starts)
        keys_values.append((k_, v_), (nk, nv), at)
        out = xp.empty((B, H + 1, K), q_.dtype)[:, :H]
        keys_values.last_query_forward(q_[:, :H], k_, v_, at, 0.3, out=out, window=window, slopes=slope)
        results.append(out)
    assert keys.get().astype(np.float64).tobytes() == keys64.tobytes()
    case.check(*results, C)


@pytest.mark.parametrize("dtype, batch", [("float32", 1), ("float32", 3), ("bfloat16", 1), ("float64", 1)])
def test_a_recorded_token_is_the_called_one(dtype, batch):
    """Bit by bit, at every position, of each kind of decoder whose products are read in vectors."""
    import mpitp
    from decoder_cases import KINDS, config
    from mpitp.inference.graph import CapturedToken, can_record
    from mpitp.inference.kv import KeyValues
    for kind in KINDS:
        with mpitp.TensorParallelGroup(mpitp_comm_self(), device="gpu") as group:
            even = dict(hidden_size=32, kv_channels=8, ffn_hidden_size=48) if batch > 1 else {}
            model = mpitp.Decoder(group, config(kind, **even), dtype=dtype)
            assert can_record(model, batch)
            ids = np.arange(2 * batch).reshape(batch, 2) % 20
            called, recorded = (KeyValues(model, batch, 9) for _ in range(2))
            for kv in (called, recorded):
                model.extend(ids, kv, np.arange(batch) % 2 + 1)
            replay = CapturedToken(model, recorded)
            for token in range(5):
                expected, found = model.extend(ids[:, :1] + token, called), replay(ids[:, :1] + token)
                assert found.tobytes() == expected.tobytes(), (kind, token)
                assert np.array_equal(called.lengths, recorded.lengths)


@pytest.mark.parametrize("dtype, batch", [("float32", 3), ("bfloat16", 1)])
def test_a_recorded_choice_is_the_called_one(dtype, batch):
    """The same tokens as when each step asks the host, of each kind of decoder."""
    import mpitp
    from decoder_cases import KINDS, config
    from mpitp.inference import generation
    for kind in KINDS:
        with mpitp.TensorParallelGroup(mpitp_comm_self(), device="gpu") as group:
            even = dict(hidden_size=32, kv_channels=8, ffn_hidden_size=48) if batch > 1 else {}
            model = mpitp.Decoder(group, config(kind, **even), dtype=dtype)
            ids, told = np.arange(2 * batch).reshape(batch, 2) % 20, dict(max_new_tokens=7, lengths=[1, 2, 1][:batch])
            called = list(mpitp.generate(model, ids, **told))
            assert generation.RECORD_FROM > 7
            try:
                generation.RECORD_FROM, before = 0, generation.RECORD_FROM
                recorded = list(mpitp.generate(model, ids, **told))
            finally:
                generation.RECORD_FROM = before
            assert np.array_equal(called, recorded), kind


# --- what crosses the bus ---------------------------------------------------------------------------------------------

def test_the_counter_counts():
    with copies() as counted:
        x = np.ones(3)
        import cupy
        float(cupy.asarray(x).sum())
    assert counted["to host"] == 1 and counted["to device"] == 1


class copies:
    """Counts copies between host and device while it is entered: CUPTI's callbacks of the driver's functions."""
    DRIVER = 1      # CUPTI_CB_DOMAIN_DRIVER_API

    def __enter__(self):
        self.counts = {"to host": 0, "to device": 0}
        self.library = cupti()
        signature = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.POINTER(ctypes.c_int))
        self.callback, self.subscriber = signature(self.called), ctypes.c_void_p()
        if self.library.cuptiSubscribe(ctypes.byref(self.subscriber), self.callback, None):
            pytest.skip("another profiler is at work")
        assert not self.library.cuptiEnableDomain(1, self.subscriber, self.DRIVER)
        return self.counts

    def called(self, user, domain, number, data):
        if data[0] != 0:                                    # CUPTI_API_ENTER
            return
        name = ctypes.c_char_p()
        self.library.cuptiGetCallbackName(domain, number, ctypes.byref(name))
        for said, counted in ((b"DtoH", "to host"), (b"HtoD", "to device")):
            self.counts[counted] += said in name.value

    def __exit__(self, *_):
        self.library.cuptiUnsubscribe(self.subscriber)


def cupti():
    import glob
    import sys
    found = [path for pattern in (f"{sys.prefix}/lib/python3*/site-packages/nvidia/*/lib/libcupti.so*",
                                  "/usr/local/cuda*/targets/*/lib/libcupti.so.*",
                                   "/usr/local/cuda*/extras/CUPTI/lib64/libcupti.so.*")
             for path in sorted(glob.glob(pattern))]
    if not found:
        pytest.skip("no CUPTI, which counts the copies")
    return ctypes.CDLL(found[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_silent_copies_in_a_step(dtype):
    """Forward and backward: ids and targets go up; of a loss the number comes down, of a step the gradients' norm."""
    import cupy

    import mpitp
    from mpitp.training.optimizer import AdamW, gradient_norm
    with mpitp.TensorParallelGroup(mpitp_comm_self(), device="gpu") as group:
        config = mpitp.DecoderConfig(vocab_size=97, hidden_size=64, num_layers=2, num_attention_heads=4,
                                     max_position_embeddings=64, hidden_dropout=0.1, attention_dropout=0.1)
        model = mpitp.Decoder(group, config, dtype=dtype)
        optimizer = AdamW(model)
        ids = np.arange(2 * 33).reshape(2, 33) % 97

        def step(t, gradients=None):
            logits, saved = model.forward(ids[:, :-1], step=t)
            loss, saved_loss = model.loss(logits, ids[:, 1:])
            gradients = model.backward(model.loss_backward(saved_loss), saved, out=gradients)
            norm_ = gradient_norm(model, gradients)
            optimizer.step(gradients, 1e-3, t, min(1.0, 1 / norm_))
            return gradients
        gradients = step(1)                                 # compiles kernels, makes tables
        cupy.cuda.Device().synchronize()
        with copies() as counted:
            step(2, gradients)
        assert counted["to host"] == 2, counted             # loss, norm
        assert counted["to device"] <= 4, counted           # ids, targets, which of them count


def mpitp_comm_self():
    from mpi4py import MPI
    return MPI.COMM_SELF
