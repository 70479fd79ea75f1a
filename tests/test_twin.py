"""The CuPy twin of an operation is found by the kind of array, imported with the first and called as the operation."""
import ast
import importlib
import inspect
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
from spmd import ROOT, job_environment

from mpitp.ops.linear import linear_forward
from mpitp.ops.twin import cuda_twin, is_cupy, twin

OPS = ROOT / "mpitp" / "ops"
CUDA = sorted(path.stem for path in (OPS / "cuda").glob("*.py")
              if (OPS / path.name).exists() and path.stem != "__init__")


def functions(path):
    """The functions of a file that are not inside others, by name, unimported."""
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def deciding_parameter(node):
    """What an operation's decorator cuda_twin names; None where it has none."""
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "cuda_twin":
            return decorator.keywords[0].value.value
    return None


# --- which side is called -------------------------------------------------------------------------------------------

class CupyArray:
    """An array of CuPy, in these tests."""


@pytest.fixture
def cupy(monkeypatch):
    module = ModuleType("cupy")
    module.ndarray = CupyArray
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


@cuda_twin(by="x")
def operation(name, x=None, *, scale=1):
    """Say which side was called."""
    return "NumPy", name, scale


@pytest.fixture
def cuda(monkeypatch):
    """A twin of `operation`."""
    module = ModuleType("twin")
    module.operation = lambda name, x=None, *, scale=1: ("CuPy", name, scale)
    monkeypatch.setattr(importlib.import_module("mpitp.ops.twin"), "twin", lambda name: {__name__: module}[name])


@pytest.mark.parametrize("x", [np.ones(3), np.ones(3).view(np.memmap), np.float32(1), [1.0], None])
def test_anything_but_cupys_is_numpys(cupy, cuda, x):
    assert operation("a", x, scale=2) == operation("a", x=x, scale=2) == ("NumPy", "a", 2)


def test_a_cupy_array_or_module_goes_to_the_twin(cupy, cuda):
    for x in (CupyArray(), cupy):
        assert operation("a", x, scale=2) == operation(name="a", x=x, scale=2) == ("CuPy", "a", 2)
    assert operation("a") == ("NumPy", "a", 1)


def test_an_array_that_is_both_is_cupys(monkeypatch, cupy, cuda):
    """The suite's stand-in for CuPy has arrays that are NumPy's as well."""
    class Both(np.ndarray):
        pass
    monkeypatch.setattr(cupy, "ndarray", Both)
    assert is_cupy(np.ones(3).view(Both)) and not is_cupy(np.ones(3))
    assert operation("a", np.ones(3).view(Both))[0] == "CuPy"


def test_without_cupy_nothing_is_its(monkeypatch):
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    assert not is_cupy(np.ones(3)) and not is_cupy(None) and "cupy" not in sys.modules


def test_a_decorated_operation_looks_as_before():
    assert linear_forward.__name__ == "linear_forward" and "y = x w^T" in linear_forward.__doc__
    assert list(inspect.signature(linear_forward).parameters) == ["x_NI", "w_OI", "out", "dtype"]


# --- every operation and its twin -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", CUDA)
def test_a_twin_takes_the_same_arguments(name):
    """The same names, order and defaults; a twin may have more, with defaults. Read from the source: no CuPy needed."""
    operations, twins = functions(OPS / f"{name}.py"), functions(OPS / "cuda" / f"{name}.py")
    decorated = [function for function, node in operations.items() if deciding_parameter(node)]
    assert decorated
    for function in decorated:
        ours, theirs = operations[function].args, twins[function].args
        names = [argument.arg for argument in ours.args]
        assert [argument.arg for argument in theirs.args][:len(names)] == names, function
        assert [argument.arg for argument in theirs.kwonlyargs] == [argument.arg for argument in ours.kwonlyargs]
        extra = len(theirs.args) - len(names)
        defaults = [ast.unparse(default).replace("cupy", "np") for default in theirs.defaults]
        assert defaults[:len(defaults) - extra] == [ast.unparse(default) for default in ours.defaults], function
        assert [d and ast.unparse(d) for d in theirs.kw_defaults] == [d and ast.unparse(d) for d in ours.kw_defaults]


def test_every_function_that_has_a_twin_is_decorated():
    """A function of the same name in ops/cuda would otherwise never be called."""
    for name in CUDA:
        operations, twins = functions(OPS / f"{name}.py"), functions(OPS / "cuda" / f"{name}.py")
        for function in set(operations) & set(twins):
            assert deciding_parameter(operations[function]), f"{name}.{function}"


def test_no_operation_asks_for_itself():
    for path in OPS.glob("*.py"):
        if path.name != "twin.py":
            text = path.read_text()
            assert "module_of" not in text and "is not np" not in text and "import cupy" not in text, path.name


# --- what it costs --------------------------------------------------------------------------------------------------

def python_calls(function, *arguments):
    """How many Python functions run in one call."""
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_a_product_is_three_python_calls(rows):
    calls = python_calls(linear_forward, np.ones((rows, 10)), np.ones((40, 10)))
    assert calls == ["dispatch", "linear_forward", "compact_product"]


IMPORTS = """
import sys
from mpitp.ops import activation, adamw, attention, cross_entropy, dropout, embedding, keys_values, linear, norm, rotary
{more}
import numpy as np
x = np.ones((5, 10), "float32")
linear.linear_forward(x, x)
activation.activation_forward("gelu_tanh", x)
norm.norm_forward(x, x[0], None, "rmsnorm", 1e-5)
dropout.dropout_scale(0, "a", 0, 0.5, (3, 4), (slice(0, 3), slice(0, 4)), np.float32)
print([name for name in sys.modules if name.startswith(("mpitp.ops.cuda", "mpitp.comm.gpu", "cupy"))])
"""
LAYERS = "from mpitp.layers import attention, block, decoder, embedding, linear as layer, loss, mlp, norm as norm_layer"
GROUP = """
import mpitp
with mpitp.TensorParallelGroup() as group:
    for name in mpitp.__all__:
        getattr(mpitp, name)
    layer = mpitp.ParallelMLP(group, 10)
    layer.forward(np.ones((5, 10), "float32"))
"""


@pytest.mark.launcher
@pytest.mark.parametrize("more", ["", LAYERS, "import numpy as np" + GROUP], ids=["ops", "layers", "group"])
def test_a_cpu_imports_no_gpu_module(more):
    done = subprocess.run([sys.executable, "-c", IMPORTS.format(more=more)], env=job_environment(), cwd=ROOT, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "[]\n", done.stdout + done.stderr


def test_a_twin_is_imported_by_name(monkeypatch):
    module = ModuleType("mpitp.ops.cuda.linear")
    monkeypatch.setitem(sys.modules, "mpitp.ops.cuda.linear", module)
    twin.cache_clear()
    assert twin("linear") is module
    twin.cache_clear()
