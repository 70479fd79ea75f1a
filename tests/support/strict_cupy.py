"""A CuPy that is NumPy underneath, and strict: it refuses what CuPy refuses, above all arrays of the host.

For `pytest --device stand-in`: the GPU's code paths without a GPU. The kernels are the NumPy operations, which compute
in float32 for 16-bit arrays.
"""
import importlib
import inspect
import sys
from types import SimpleNamespace

import fake_cupy
import numpy as np

from mpitp.arrays import HALF_DTYPES


class ndarray(np.ndarray):
    """An array of the device. It meets nothing but its like and scalars."""

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        refuse_host([*inputs, *(out or ())], ufunc.__name__)
        if "order" in options:
            raise TypeError("Wrong arguments {'order'}")                    # as CuPy's ufuncs say
        if out:
            options["out"] = tuple(host(x) for x in out)
        return device(getattr(ufunc, method)(*map(host, inputs), **options))

    def __array_function__(self, function, types, arguments, options):
        raise TypeError(f"{function.__name__} of NumPy, given an array of the device")

    def __setitem__(self, key, value):
        refuse_host([value], "assignment")
        np.ndarray.__setitem__(self.view(np.ndarray), host(key), host(value))

    def __getitem__(self, key):
        found = np.ndarray.__getitem__(self.view(np.ndarray), host(key))
        return device(np.asarray(found))                                    # a number of the device has no axes

    def get(self, out=None, **_):
        if out is None:
            return self.view(np.ndarray).copy()
        out[...] = self.view(np.ndarray)
        return out

    def set(self, array, **_):
        assert type(array) is np.ndarray
        np.copyto(self.view(np.ndarray), array)

    def __float__(self):
        return float(self.view(np.ndarray))

    def __int__(self):
        return int(self.view(np.ndarray))

    def __bool__(self):
        return bool(self.view(np.ndarray))

    __hash__ = None
    data = property(lambda self: SimpleNamespace(ptr=self.view(np.ndarray).ctypes.data))


def wrapped(name):
    """A method of ndarray that NumPy would dispatch through what is refused above."""
    def method(self, *arguments, **options):
        refuse_host(arguments, name)
        return device(getattr(self.view(np.ndarray), name)(*map(host, arguments),
                                                           **{k: host(v) for k, v in options.items()}))
    return method


for _name in ("sum", "max", "min", "mean", "any", "all", "argmax", "astype", "copy", "reshape", "ravel", "nonzero"):
    setattr(ndarray, _name, wrapped(_name))


def host(x):
    """x without the device: the same memory."""
    if isinstance(x, ndarray):
        return x.view(np.ndarray)
    if isinstance(x, (tuple, list)):
        return type(x)(map(host, x)) if not hasattr(x, "_fields") else x
    return x


def device(x):
    """x on the device: the same memory."""
    if isinstance(x, (tuple, list)) and not hasattr(x, "_fields"):
        return type(x)(map(device, x))
    if isinstance(x, np.generic):
        x = np.asarray(x)
    return x.view(ndarray) if isinstance(x, np.ndarray) else x


def refuse_host(values, what):
    for x in values:
        if isinstance(x, (tuple, list)):
            refuse_host(x, what)
        elif isinstance(x, np.ndarray) and not isinstance(x, ndarray) and x.ndim:
            raise TypeError(f"{what}: Unsupported type <class 'numpy.ndarray'>")


def asarray(x, dtype=None, order=None):
    return device(np.array(host(x), dtype, order=order or "K", copy=not isinstance(x, ndarray) or None))


def array(x, dtype=None, order="K"):
    return device(np.array(host(x), dtype, order=order))


def __getattr__(name):
    """Anything else of NumPy: of arrays of the device alone."""
    if name.startswith("__"):
        raise AttributeError(name)
    found = getattr(np, name)
    if isinstance(found, (np.ufunc, type)) or not callable(found):
        return found

    def function(*arguments, **options):
        refuse_host([*arguments, *options.values()], name)
        return device(found(*map(host, arguments), **{k: host(v) for k, v in options.items()}))
    return function


class Twin:
    """mpitp.ops.<name> in the place of its CUDA twin."""

    def __init__(self, name):
        self.module = importlib.import_module(f"mpitp.ops.{name}")

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        function = getattr(self.module, name)
        if not callable(function):
            return function
        function = getattr(function, "__wrapped__", function)               # on NumPy arrays, without cuda_twin

        def call(*arguments, **options):
            refuse_host([*arguments, *options.values()], name)
            arguments, options = [unwrap(x) for x in arguments], {k: unwrap(v) for k, v in options.items()}
            return rewrap(in_float32(function, name, arguments, options))
        return call


ROUNDED = {"norm_forward": (0, (1, 0)), "norm_backward": (0,)}      # of new results that are tuples; else all, but of
SUMS = {"attention_forward", "attention_backward", "bias_backward", "row_maximum", "row_sums", "embedding_backward"}


def in_float32(function, name, arguments, options):
    """function(*arguments, **options) as the kernels do it for 16-bit arrays: computed in float32, results rounded."""
    wide, half = {}, None

    def widened(x):
        nonlocal half
        if isinstance(x, (tuple, list)):
            return type(x)(map(widened, x))
        if not isinstance(x, np.ndarray) or x.dtype.name not in HALF_DTYPES:
            return x
        half = x.dtype
        return wide.setdefault((x.ctypes.data, x.shape, x.strides), (x, x.astype(np.float32)))[1]
    found = function(*widened(arguments), **{k: widened(v) for k, v in options.items()})
    if half is None:
        return found
    given = inspect.signature(function).bind(*arguments, **options).arguments.get("dtype")
    for x, copy in wide.values():                           # what was written to
        x[...] = copy
    originals = {id(copy): x for x, copy in wide.values()}

    def rounded(x, at=()):
        if isinstance(x, tuple):
            return tuple(rounded(y, (*at, i)) for i, y in enumerate(x))
        if id(x) in originals:
            return originals[id(x)]
        places = ROUNDED.get(name)
        stays = name in SUMS or places and (at if len(at) > 1 else at[0]) not in places
        return x if stays or not isinstance(x, np.ndarray) or x.dtype != np.float32 else x.astype(given or half)
    return rounded(found)


def unwrap(x):
    if callable(x) and not isinstance(x, type):             # the function that gives dropout's scales
        return lambda *arguments: host(x(*arguments))
    return host(x)


def rewrap(x):
    return tuple(map(rewrap, x)) if isinstance(x, tuple) else device(x)


class Called:
    """In the place of mpitp.Captured: the function itself, called with arrays of its own."""

    def __init__(self, group, function, *arrays):
        self.function, self.inputs = function, [x.copy() for x in arrays]
        self.function(*self.inputs)             # as a recording does first

    def __call__(self, *arrays):
        for held, x in zip(self.inputs, arrays):
            held[...] = x
        return self.function(*self.inputs)


cuda = fake_cupy.cuda
TWINS = ("activation", "adamw", "attention", "cross_entropy", "dropout", "embedding", "keys_values", "linear",
         "norm", "rotary")


def install():
    """Be `cupy`, and the twins: before anything asks for either."""
    sys.modules["cupy"], sys.modules["cupy.cuda"] = sys.modules[__name__], cuda
    sys.modules["cupyx"] = SimpleNamespace(empty_pinned=np.empty)
    for name in TWINS:
        sys.modules[f"mpitp.ops.cuda.{name}"] = Twin(name)
    importlib.import_module("mpitp.inference.graph").Captured = Called
