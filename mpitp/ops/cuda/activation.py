"""The activations on the GPU: bias, activation and derivative in one pass over the data."""
import cupy

from .kernel import elementwise

# Of A x: A a = act(x) and A d = act'(x); the formulas are those of mpitp/ops/activation.py.
BODIES = {
    "identity": "A a = x, d = 1;",
    "relu": "A a = x > 0 ? x : (x != x ? x : (A)0), d = x > 0;",
    "silu": "A s = 1 / (1 + exp(-x)), a = x * s, d = s + a * (1 - s);",
    "gelu_tanh": """
        const A k = 0.7978845608028654, c = 0.044715;
        A square = x * x, s = 1 / (1 + exp((square * (-2 * k * c) - 2 * k) * x)), a = x * s;
        A d = (1 - s) * ((square * (6 * k * c) + 2 * k) * a) + s;""",
    "gelu": """
        A F = normcdf(x), a = x * F, d = F + x * exp((A)-0.5 * x * x) * (A)0.3989422804014327;""",
}


def activation_forward(name, h, out=None, derivative=None, bias=None):
    """As mpitp.ops.activation.activation_forward."""
    out = cupy.empty_like(h) if out is None else out
    inputs, x = ("T h", "(A)h") if bias is None else ("T h, T b", "(A)h + (A)b")
    arguments = [h] if bias is None else [h, bias]
    outputs, results = ("T a_", "a_ = (T)a;") if derivative is None else ("T a_, T d_", "a_ = (T)a; d_ = (T)d;")
    kernel = elementwise(inputs, outputs, f"A x = {x};\n{BODIES[name]}\n{results}",
                         f"mpitp_{name}_{len(arguments)}{'' if derivative is None else '_d'}")
    kernel(*arguments, out, *(() if derivative is None else (derivative,)))
    return out, derivative


def activation_backward(da, saved, out=None):
    """As mpitp.ops.activation.activation_backward."""
    return cupy.multiply(da, saved, out=out)
