"""What mpitp/ops/cuda/linear.py tells cuBLAS of its operands, done by NumPy: run by test_device.py, needs no GPU."""
import ctypes
import itertools

import numpy as np
import stand_in

TYPES = {0: np.dtype("float32"), 1: np.dtype("float64"), 2: np.dtype("float16")}
calls = []


def by_columns(pointer, kind, rows, columns, pitch):
    """A matrix column by column, `pitch` numbers from one to the next, as cuBLAS reads it; a view."""
    dtype = TYPES[kind]
    assert pitch >= max(1, rows), f"pitch {pitch} of columns of {rows}"
    size = (pitch * (columns - 1) + rows) * dtype.itemsize
    flat = np.frombuffer((ctypes.c_char * size).from_address(pointer), dtype)
    return np.lib.stride_tricks.as_strided(flat, (rows, columns), (dtype.itemsize, pitch * dtype.itemsize))


def gemm(_, a_op, b_op, m, n, k, one, a, a_type, a_pitch, b, b_type, b_pitch, before, c, c_type, c_pitch, *rest):
    """c = op(a) op(b) + before c, of m x k and k x n matrices."""
    calls.append(1)
    a = by_columns(a, a_type, *((k, m) if a_op else (m, k)), a_pitch)
    b = by_columns(b, b_type, *((n, k) if b_op else (k, n)), b_pitch)
    c = by_columns(c, c_type, m, n, c_pitch)
    scalar = ctypes.c_double if a_type == 1 else ctypes.c_float
    assert scalar.from_address(one).value == 1
    factor = scalar.from_address(before).value
    found = (a.T if a_op else a).astype(float) @ (b.T if b_op else b).astype(float)
    c[...] = found + (c * factor if factor else 0)


def batched(handle, a_op, b_op, m, n, k, one, a, a_type, a_pitch, a_apart, b, b_type, b_pitch, b_apart, before, c,
            c_type, c_pitch, c_apart, count, *rest):
    for g in range(count):
        at = (x + g * apart * TYPES[t].itemsize for x, apart, t in ((a, a_apart, a_type), (b, b_apart, b_type),
                                                                    (c, c_apart, c_type)))
        gemm(handle, a_op, b_op, m, n, k, one, next(at), a_type, a_pitch, next(at), b_type, b_pitch, before, next(at),
             c_type, c_pitch)


def layouts(numbers, *shape):
    """Arrays of a shape that lie in memory in many ways, among others where hardware may not read them as they lie."""
    *stack, rows, columns = shape
    yield numbers(shape)
    yield numbers((*stack, columns, rows)).swapaxes(-1, -2)
    yield numbers((*stack, rows, columns + 8))[..., 8:]
    yield numbers((*stack, rows, columns + 5))[..., 3:3 + columns]
    yield numbers((*stack, columns + 3, rows)).swapaxes(-1, -2)[..., 1:1 + columns]
    yield numbers((*stack, rows, columns, 2))[..., 0]
    if stack:
        yield numbers((rows, *stack, columns)).swapaxes(0, 1)
        yield numbers((rows, *stack, columns + 4)).swapaxes(0, 1)[..., 4:]


def main():
    stand_in.install()
    stand_in.cublas.gemmEx, stand_in.cublas.gemmStridedBatchedEx = gemm, batched
    from mpitp.ops.cuda import linear
    draw = np.random.default_rng(0)
    tried = 0
    for dtype, (m, k, n), stack in itertools.product(("float32", "float64", "float16"), (
            (3, 8, 4), (16, 16, 8), (5, 7, 3), (1, 8, 16), (8, 1, 8), (8, 16, 1), (2, 2, 2), (4, 0, 3)), ((), (3,))):
        def numbers(shape):
            return stand_in.device(draw.integers(-4, 5, shape).astype(dtype))
        for a, b in itertools.product(layouts(numbers, *stack, m, k), layouts(numbers, *stack, k, n)):
            expected = stand_in.host(a).astype(float) @ stand_in.host(b).astype(float)
            assert np.array_equal(stand_in.host(linear.product(a, b)), expected), (dtype, a.strides, b.strides)
            tried += 1
        for out in layouts(numbers, *stack, m, n):
            a, b, before = numbers((*stack, m, k)), numbers((*stack, k, n)), stand_in.host(out).astype(float)
            expected = stand_in.host(a).astype(float) @ stand_in.host(b).astype(float)
            linear.product(a, b, out, add=True)
            assert np.array_equal(stand_in.host(out), before + expected), (dtype, out.strides)
            linear.product(a, b, out)
            assert np.array_equal(stand_in.host(out), expected), (dtype, out.strides)
            tried += 2
    print(f"{tried} products, {len(calls)} matrices")


if __name__ == "__main__":
    main()
