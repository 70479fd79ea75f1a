"""Rotary positions on the GPU: one thread an element, u and v of its pair read by both.

Dimension key: S positions, K features of a head.
"""
import cupy

from .kernel import elementwise

BODY = """
    int k = i % K;
    long long position = i / K / heads % S;
    if (k >= 2 * half) { y = x[i]; }
    else {
        int pair = interleaved ? k / 2 : k % half;
        bool second = interleaved ? k % 2 : k >= half;
        long long other = interleaved ? (second ? i - 1 : i + 1) : (second ? i - half : i + half);
        A turn = sine[position * half + pair];
        y = (T)((A)x[i] * cosine[position * half + pair] + (A)x[other] * (second ? turn : -turn));
    }"""


def rotary_forward(x, cos, sin, interleaved):
    """As mpitp.ops.rotary.rotary_forward; cos and sin in float32 for 16-bit x."""
    half, (S, heads, K) = cos.shape[-1], x.shape[-3:]
    x, y = cupy.ascontiguousarray(x), cupy.empty(x.shape, x.dtype)
    inputs = "raw T x, raw U cosine, raw U sine, int64 S, int64 heads, int32 K, int32 half, bool interleaved"
    kernel = elementwise(inputs, "T y", BODY, "mpitp_rotary")
    if x.size:
        kernel(x, cupy.ascontiguousarray(cos), cupy.ascontiguousarray(sin), S, heads, K, half, interleaved, y)
    return y
