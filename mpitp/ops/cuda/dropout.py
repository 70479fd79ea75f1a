"""Dropout on the GPU: each thread computes the Philox word of its element. The same words as NumPy's generator.

Source of Philox4x64-10: Salmon et al., SC 2011.
"""
import math
from collections.abc import Sequence
from types import ModuleType

import cupy
import numpy as np
from numpy.typing import DTypeLike

from ...arrays import DeviceArray
from ...sharding.rng import key
from ..dropout import PartOfStep, in_step

ROUND = """
__device__ unsigned long long philox_word(unsigned long long index, unsigned long long k0, unsigned long long k1) {
    unsigned long long c0 = index >> 2, c1 = 0, c2 = 0, c3 = 0;
    for (int round = 0; round < 10; round++) {
        const unsigned long long a = 0xD2E7470EE14C6C93ULL, b = 0xCA5A826395121157ULL;
        unsigned long long high0 = __umul64hi(a, c0), low0 = a * c0, high1 = __umul64hi(b, c2), low1 = b * c2;
        c0 = high1 ^ c1 ^ k0; c1 = low1; c2 = high0 ^ c3 ^ k1; c3 = low0;
        k0 += 0x9E3779B97F4A7C15ULL; k1 += 0xBB67AE8584CAA73BULL;
    }
    switch (index & 3) { case 0: return c0; case 1: return c1; case 2: return c2; default: return c3; }
}
"""
# Element i of the window lies at `first` plus its index along each of up to four axes times the axis' stride.
BODY = """
    unsigned long long rest = i, at = first;
    at += rest % n3 * s3; rest /= n3;
    at += rest % n2 * s2; rest /= n2;
    at += rest % n1 * s1; rest /= n1;
    at += rest * s0;
    y = philox_word(at, k0, k1) >= limit ? keep : (T)0;"""
AXES = 4
KERNEL = cupy.ElementwiseKernel(
    "uint64 first, uint64 n1, uint64 n2, uint64 n3, uint64 s0, uint64 s1, uint64 s2, uint64 s3, "
    "uint64 k0, uint64 k1, uint64 limit, T keep", "T y", BODY, "mpitp_dropout", preamble=ROUND)


def dropout_scale(seed: int, name: str, step: int | PartOfStep, probability: float, shape: Sequence[int],
                  window: Sequence[slice | int], dtype: DTypeLike, xp: ModuleType = cupy) -> DeviceArray:
    """Compute as mpitp.ops.dropout.dropout_scale: the same zeros, on the device."""
    step, shape, window = in_step(step, shape, window)
    ends = [(at, at + 1) if not isinstance(at, slice) else at.indices(n)[:2] for n, at in zip(shape, window)]
    lengths = [max(0, stop - start) for start, stop in ends]
    out = cupy.empty([n for n, at in zip(lengths, window) if isinstance(at, slice)], dtype)
    if not out.size:
        return out
    strides = [math.prod(shape[axis + 1:]) for axis in range(len(shape))]
    first = sum(start * stride for (start, _), stride in zip(ends, strides))
    lengths, strides = merged(lengths, strides)
    k0, k1 = key(seed, f"{name}/{step}")
    limit = math.ceil(probability * 2 ** 53) << 11          # word >> 11 < p 2^53, in one comparison
    unsigned = [np.uint64(value) for value in (first, *lengths[1:], *strides, k0, k1, limit)]
    KERNEL(*unsigned, out.dtype.type(1 / (1 - probability)), out)
    return out


def merged(lengths: list[int], strides: list[int]) -> tuple[list[int], list[int]]:
    """Describe a walk by AXES axes: leave out those of one index, and make one of neighbours without a gap."""
    axes: list[list[int]] = []
    for n, stride in zip(lengths, strides):
        if n == 1:
            continue
        if axes and axes[-1][1] == n * stride:
            axes[-1] = [axes[-1][0] * n, stride]
        else:
            axes.append([n, stride])
    assert len(axes) <= AXES, f"{len(axes)} axes with gaps"
    axes = [[1, 0]] * (AXES - len(axes)) + axes
    return [n for n, _ in axes], [stride for _, stride in axes]
