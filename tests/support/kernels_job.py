"""The kernels of mpitp/ops/cuda without a GPU: run by test_kernels.py.

    python tests/support/kernels_job.py [arguments|compile]

Every function of mpitp/ops/cuda runs on a stand-in for CuPy whose kernels note what they are called with and do
nothing. `arguments` compares that with the parameters in the kernel's source; `compile` has NVRTC translate each
source, with the options that it was asked for, down to machine code, where it also reads the assembler in it.
"""
import itertools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import stand_in
from nvrtc import Compiler

from mpitp.arrays import GPU_DTYPES, compute_dtype, sum_dtype
from mpitp.attention_config import Rotary

ARCHITECTURES = ("sm_75", "sm_90")      # before and after the instructions of compute capability 8.0
CUDA = Path(__file__).parents[2] / "mpitp" / "ops" / "cuda"
KERNEL = r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?'
NUMBERS = {"int": "int32", "long long": "int64", "unsigned long long": "uint64", "float": "float32",
           "double": "float64", "bool": "bool"}


@dataclass(frozen=True)
class Kernel:
    """A kernel that was asked for: in the place of cupy.RawKernel.

    T : the dtype that its source calls T, where that is not the one of the arrays at hand
    """
    code: str
    name: str
    options: tuple = ()
    T: str = ""

    def __call__(self, grid, block, arguments):
        good = all(blocks > 0 for blocks in grid) and 0 < block[0] <= 1024 and block[0] % 32 == 0
        assert good, f"{self.name}: {grid} blocks of {block} threads"
        calls.setdefault(self, []).append(arguments)


class ElementwiseKernel:
    """In the place of cupy.ElementwiseKernel, which puts a loop round `body`: the kernel is written out."""

    def __init__(self, inputs, outputs, body, name, preamble=""):
        inputs = re.sub(r"\buint64\b", "unsigned long long", inputs)
        code = f"""{preamble}
typedef float T;
extern "C" __global__ void {name}({inputs}, {outputs.replace("T ", "T* all_")}, long long n) {{
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    {"".join(f"{output.replace('T ', 'T& ')} = all_{output.split()[1]}[i];" for output in outputs.split(", "))}
    {body}
}}"""
        self.kernel = Kernel(code, name, T="float32")

    def __call__(self, *arguments):
        self.kernel((1,), (128,), (*arguments, np.int64(arguments[-1].size)))


calls = {}              # kernel -> the arguments of each call


def parameters(kernel):
    """The types of a kernel's parameters, macros expanded."""
    listed = re.search(KERNEL + kernel.name + r"\((.*?)\) \{", re.sub(r"\s*\n\s*", " ", kernel.code)).group(1)
    for name, argument, body in re.findall(r"#define (\w+)(?:\((\w)\))? ((?:.*\\\n)*.*)\n", kernel.code):
        body = body.replace("\\\n", " ")
        if argument:
            listed = re.sub(rf"\b{name}\((\w)\)", lambda call: body.replace(f"{argument}##", call.group(1)), listed)
        else:
            listed = re.sub(rf"\b{name}\b", lambda use: body, listed)
    return [re.sub(r"\bconst ", "", parameter).strip().rsplit(" ", 1)[0] for parameter in listed.split(",")]


def check_arguments(kernel, arguments, dtype):
    """Whether each argument is what the kernel's parameter takes: CuPy hands over whatever it is given."""
    types, defined = parameters(kernel), dict(option[2:].split("=") for option in kernel.options)
    assert len(types) == len(arguments), f"{kernel.name}: {len(types)} parameters, {len(arguments)} arguments"
    dtype = compute_dtype(kernel.T or dtype, "gpu")
    known = {**{name: np.dtype(number) for name, number in NUMBERS.items()}, "T": dtype, "A": sum_dtype(dtype)}
    known["Y"] = known.get(defined.get("Y"))
    for place, (kind, argument) in enumerate(zip(types, arguments)):
        expected, found = known[kind.rstrip("*")], getattr(argument, "dtype", type(argument))
        null = kind.endswith("*") and isinstance(argument, np.uint64) and argument == 0
        right_kind = isinstance(argument, stand_in.ndarray if kind.endswith("*") else np.generic)
        good = null or right_kind and found == expected
        assert good, f"{kernel.name}, argument {place}: {kind} {expected}, but {type(argument).__name__} {found}"


# --- every function, in every way that asks for another kernel --------------------------------------------------------

class Arrays:
    """Arrays of the device, of one dtype."""

    def __init__(self, dtype):
        self.dtype, self.sums = dtype, sum_dtype(dtype)

    def __call__(self, *shape, dtype=None):
        return stand_in.device(np.ones(shape, self.dtype if dtype is None else dtype))

    def integers(self, *values):
        return stand_in.device(np.array(values, np.int64))


def activations(array):
    from mpitp.ops import activation
    for name, columns in itertools.product(activation.ACTIVATIONS, (37, 64)):
        h, bias = array(5, columns), array(columns)
        for derivative, b in itertools.product((None, array(5, columns)), (None, bias)):
            activation.activation_forward(name, h, derivative=derivative, bias=b)
        for saved in (False, True):
            activation.gated_forward(name, h, array(5, columns), bias, bias, saved)
        activation.gated_backward(h, activation.gated_forward(name, array(5, columns), array(5, columns))[1])
        activation.activation_backward(h, array(5, columns))
        activation.add_to(h, array(5, columns))


def products(array):
    from mpitp.ops import linear
    for rows, outputs, columns in itertools.product((1, 2, 3, 5, 16, 70), (3, 2050, 8200, 16400), (4, 5)):
        for dtype in (array.dtype, array.sums):
            linear.linear_forward(array(rows, columns), array(outputs, columns), dtype=dtype)
        for out in (array(rows, outputs), array(rows, outputs + 3)[:, 3:], array(outputs, rows).T):
            linear.linear_forward(array(rows, columns), array(outputs, columns), out)
    linear.add_bias(array(5, 8), array(8))
    linear.bias_backward(array(1100, 40))
    linear.bias_backward(array(5, 40), out=array(40, dtype=array.sums))


def norms(array):
    from mpitp.ops import norm
    for kind, zero_centered, b in itertools.product(norm.KINDS, (False, True), (None, array(37))):
        _, saved = norm.norm_forward(array(2, 5, 37), array(37), b, kind, 1e-5, zero_centered)
        norm.norm_backward(array(2, 5, 37), saved)


def attentions(array):
    from mpitp.ops import attention, keys_values
    slopes = array(2, 3, dtype=array.sums)
    for window, biased, mask, dropped in itertools.product((None, 4), (None, slopes), (None, 1, 2), (False, True)):
        options = dict(window=window, slopes=biased, causal=mask is None,
                       mask=mask and stand_in.device(np.ones((7, 9)[-mask:], bool)),
                       keep=(lambda first, stop: array(2, 3, stop - first, 9, dtype=array.sums)) if dropped else None)
        q, out, dq, k, v = array(2, 3, 7, 8), array(2, 3, 7, 8), array(2, 3, 7, 8), array(2, 9, 8), array(2, 9, 8)
        lse = attention.attention_forward(q, k, v, 0.3, out=out, **options)
        attention.attention_backward(out, lse, q, k, v, out, 0.3, dq=dq, **options)
        for K in (8, 64):
            held = array(2, 9, 2, K)
            keys_values.append((held, held), (array(2, 1, 2, K), array(2, 1, 2, K)), array.integers(3, 0))
            keys_values.last_query_forward(array(2, 6, K), held, held, array.integers(3, 0), 0.3, out=array(2, 6, K),
                                           window=window, slopes=biased)


def others(array):
    from mpitp.ops import adamw, cross_entropy, dropout, embedding, greatest, rotary
    w = array(100, dtype=array.sums)
    for rounded in (None, array(100)):
        adamw.adamw_step(w, w, w, w, beta1=0.9, beta2=0.95, rate=1e-2, root=1.7, eps=1e-8, decay=1, scale=1,
                         rounded=rounded)
    logits, targets = array(4, 50), array.integers(0, 3, 5, 49)
    top = cross_entropy.row_maximum(logits)
    for smooth in (False, True):
        _, factor, *_ = *cross_entropy.row_sums(logits, top, targets, smooth), None
        cross_entropy.row_gradient(logits, top, targets, factor, factor, factor if smooth else None, array(4, 50))
    greatest.greatest_of_ranks(greatest.greatest_of_rank(logits, 3)[None])
    embedding.embedding_forward(array(50, 8), targets)
    embedding.embedding_backward(array(4, 8), targets, 50)
    dropout.dropout_scale(0, "a", 1, 0.2, (3, 5, 8), (slice(0, 3), slice(1, 3), 4), np.float32, stand_in.cupy)
    for interleaved in (False, True):
        cos, sin = rotary.rotary_tables(Rotary(interleaved=interleaved), 10, range(9), array.sums, stand_in.cupy)
        rotary.rotary_forward(array(2, 7, 3, 10), cos, sin, interleaved, array.integers(0, 2))
        rotary.rotary_backward(array(7, 3, 10), cos, sin, interleaved)


def called_kernels(dtype):
    """Run everything on arrays of this dtype; returns {kernel: the arguments of each call}."""
    calls.clear()
    for function in (activations, products, norms, attentions, others):
        function(Arrays(dtype))
    return dict(calls)


def main(what):
    vars(stand_in.cupy).update(RawKernel=Kernel, ElementwiseKernel=ElementwiseKernel)
    stand_in.cublas.gemmEx = stand_in.cublas.gemmStridedBatchedEx = lambda *_: None
    stand_in.install()
    every = {}                                  # kernel -> how often it was called
    for dtype in GPU_DTYPES:
        for kernel, calls_of_it in called_kernels(compute_dtype(dtype, "gpu")).items():
            every[kernel] = every.get(kernel, 0) + len(calls_of_it)
            for arguments in calls_of_it:
                check_arguments(kernel, arguments, dtype)
    written = set().union(*(re.findall(KERNEL.replace(" ", r"\s+") + r"\s*(\w+)\(", path.read_text())
                            for path in CUDA.glob("*.py")))
    missing = written - {kernel.name for kernel in every}
    assert not missing, f"never called: {', '.join(missing)}"
    if what == "compile":
        compiler = Compiler()
        sources = {(kernel.code, kernel.options) for kernel in every}
        for code, options in sorted(sources):
            for architecture in ARCHITECTURES if "__CUDA_ARCH__" in code else ARCHITECTURES[1:]:
                compiler.compile(code, (*options, f"--gpu-architecture={architecture}"))
        print(f"{len(sources)} sources compiled")
    else:
        print(f"{sum(every.values())} calls of {len(every)} kernels")


if __name__ == "__main__":
    main(sys.argv[1])
