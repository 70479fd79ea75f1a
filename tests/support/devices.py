"""The suite on a GPU: `pytest tests --device gpu [--transport peer|nccl|mpi|staged]`, or `--device stand-in` without.

Tests draw, compare and plant mistakes in NumPy. This adapter wraps the functions and methods that tests call: arrays
that a test gives go to the device, and what comes back comes to the host. The library's own calls are left alone, so
everything between a layer's entrance and its exit is on the device, and so is what forward keeps for backward.

gpu is CuPy's, stand-in is stand_in.py in its place.
"""
import functools
import importlib
import os

import numpy as np

LAYERS = {"layers.linear": ("ColumnParallelLinear", "RowParallelLinear"), "layers.mlp": ("ParallelMLP",),
          "layers.attention": ("ParallelAttention",), "layers.norm": ("Norm",), "layers.block": ("ParallelBlock",),
          "layers.embedding": ("VocabParallelEmbedding", "PositionEmbedding"), "layers.decoder": ("Decoder",)}
METHODS = ("forward", "backward", "loss", "loss_backward", "gather_logits", "extend", "gather")
OTHERS = {"comm.group": {"TensorParallelGroup": ("all_reduce", "all_gather", "gather", "reduce_scatter", "broadcast",
                                                 "begin_all_reduce")},
          "comm.sums": {"Sum": ("add", "all_reduce", "local_sum")},
          "comm.tree": {"TreeSum": ("add", "all_reduce", "local_sum")},
          "comm.gpu.peer": {"PeerSum": ("all_reduce",), "PeerTreeSum": ("all_reduce",)},
          "comm.pending": {"PendingReduction": ("wait",)},
          "comm.rows": {"Rows": ("split", "all_gather", "reduce_scatter")},
          "training.loop": {"Trainer": ("train_step", "run", "validate", "save", "sum_gradients")},
          "training.resume": {None: ("resume",)},
          "training.optimizer": {"AdamW": ("step",), None: ("gradient_norm", "non_finite")},
          "layers.loss": {None: ("vocab_parallel_cross_entropy_forward", "vocab_parallel_cross_entropy_backward")},
          "layers.products": {None: ("copy_to_ranks_backward", "reduce_from_ranks_forward")},
          "layers.gather": {None: ("gather_from_ranks_forward", "gather_from_ranks_backward",
                                   "scatter_to_ranks_forward", "scatter_to_ranks_backward")},
          "inference.generation": {"Choice": ("__call__",)},
          "inference.graph": {"CapturedToken": ("__init__", "__call__"), "CapturedChoice": ("__init__", "__call__")},
          "checkpoints.saving": {None: ("save_model",)}, "checkpoints.loading": {None: ("load_model",)}}
depth = 0               # of the library's calls of itself: 0 in a test


def install(device, transport):
    """Make the device every group's default, and wrap what tests call. Call before tests import the library."""
    if device == "stand-in":
        import stand_in
        stand_in.install(kernels=True)
        os.environ["MPITP_CUDA_AWARE"] = "1"
    cupy = importlib.import_module("cupy")
    group = importlib.import_module("mpitp.comm.group").TensorParallelGroup
    group.__init__.__kwdefaults__.update(device="gpu", transport=transport, share_gpu=True)
    for module, names in LAYERS.items():
        for name in names:
            wrap(getattr(importlib.import_module(f"mpitp.{module}"), name), METHODS, cupy)
    for module, owners in OTHERS.items():
        home = importlib.import_module(f"mpitp.{module}")
        for owner, names in owners.items():
            missing = [name for name in names if not hasattr(getattr(home, owner) if owner else home, name)]
            assert not missing, f"mpitp.{module} no longer has {missing}"
            wrap(getattr(home, owner) if owner else home, names, cupy)
    generation = importlib.import_module("mpitp.inference.generation")
    generation.steps = step_by_step(generation.steps)


def wrap(owner, names, cupy):
    for name in names:
        if hasattr(owner, name):
            # Integers go where they are added up; elsewhere they are token ids, which may come from either side.
            kinds = "fVbiu" if owner.__name__ == "TensorParallelGroup" else "fVb"
            setattr(owner, name, from_outside(getattr(owner, name), cupy, kinds))


def from_outside(function, cupy, kinds):
    """The function, for callers whose arrays are on the host: those of these kinds go to the device."""
    @functools.wraps(function)
    def call(*arguments, **options):
        global depth
        if depth:
            return function(*arguments, **options)
        moved = {}                                          # id of an array or dict of the host: that, and its copy
        arguments, options = (to_device(given, cupy, moved, kinds) for given in (arguments, options))
        depth += 1
        try:
            found = function(*arguments, **options)
        finally:
            depth -= 1
        if hasattr(found, "wait"):                          # a sum under way: later
            found.moved = moved
            return found
        moved.update(getattr(arguments[0], "moved", {}) if arguments else {})
        for host, device in moved.values():                 # results are written where the caller wants them
            if isinstance(host, np.ndarray) and host.flags.writeable:
                host[...] = device.get()
        result = to_host(found, {id(device): host for host, device in moved.values()}, cupy)
        if arguments and hasattr(arguments[0], "moved"):    # to wait again gives the same array
            arguments[0].moved[id(result)] = result, found
        return result
    return call


def step_by_step(steps):
    """The generator `steps` of generation, each of whose steps is a call of the library."""
    def generator(*arguments, **options):
        global depth
        inner = steps(*arguments, **options)
        while True:
            depth += 1
            try:
                found = next(inner)
            except StopIteration:
                return
            finally:
                depth -= 1
            yield found
    return generator


def to_device(x, cupy, moved, kinds):
    """x with its arrays of these kinds of dtype on the device."""
    if isinstance(x, cupy.ndarray):
        return x
    if isinstance(x, np.ndarray) and x.dtype.kind in kinds:
        if id(x) not in moved:
            moved[id(x)] = x, cupy.asarray(np.asarray(x))
        return moved[id(x)][1]
    if type(x) is dict:
        moved[id(x)] = x, {key: to_device(value, cupy, moved, kinds) for key, value in x.items()}
        return moved[id(x)][1]
    if type(x) in (tuple, list):
        return type(x)(to_device(value, cupy, moved, kinds) for value in x)
    if getattr(x, "__module__", None) in TESTS and callable(x) and not isinstance(x, type):
        return lambda *arguments: to_device(x(*arguments), cupy, {}, kinds)        # a test's summands
    return x


class Tests:
    """Names of modules that hold tests or what they share."""
    def __contains__(self, name):
        return isinstance(name, str) and name.startswith(("test_", "check_", "spmd"))


TESTS = Tests()


def to_host(x, known, cupy):
    """x with the device's arrays on the host: those that came from there themselves."""
    if id(x) in known:
        return known[id(x)]
    if isinstance(x, cupy.ndarray):
        return x.get()
    if type(x) is dict:
        return {key: to_host(value, known, cupy) for key, value in x.items()}
    if type(x) is tuple and len(x) == 2 and not (isinstance(x[1], dict) and x[1] and all(map(is_parameter, x[1]))):
        return to_host(x[0], known, cupy), x[1]             # (y, saved): what backward needs stays where it is
    if type(x) is tuple:
        return tuple(to_host(value, known, cupy) for value in x)
    return x


def is_parameter(key):
    return isinstance(key, str) and key.rsplit(".", 1)[-1] in ("weight", "bias")
