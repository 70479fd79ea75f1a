"""Tensor parallelism for transformers in plain NumPy (or CuPy) and MPI.

    with mpitp.TensorParallelGroup() as group:
        mlp = mpitp.ParallelMLP(group, hidden_size=4096)
        y, saved = mlp.forward(x)
        dx, gradients = mlp.backward(dy, saved)
"""
import os
import sys
from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_HOMES = {
    "TensorParallelGroup": "comm.group",
    "Grid": "grid",
    "Partition": "sharding.partition",
    "Rows": "comm.rows",
    "Place": "sharding.parameters",
    "ParameterSpec": "sharding.parameters",
    "InputError": "errors",
    "ColumnParallelLinear": "layers.linear",
    "RowParallelLinear": "layers.linear",
    "ParallelMLP": "layers.mlp",
    "ParallelAttention": "layers.attention",
    "ParallelBlock": "layers.block",
    "Norm": "layers.norm",
    "VocabParallelEmbedding": "layers.embedding",
    "PositionEmbedding": "layers.embedding",
    "vocab_parallel_cross_entropy_forward": "layers.loss",
    "vocab_parallel_cross_entropy_backward": "layers.loss",
    "Decoder": "layers.decoder",
    "generate": "inference.generation",
    "AttentionConfig": "attention_config",
    "DecoderConfig": "config",
    "Rotary": "attention_config",
    "load_model": "checkpoints.loading",
    "save_model": "checkpoints.saving",
    "Captured": "inference.graph",
    "Timeline": "timeline.timeline",
}
__all__ = sorted(_HOMES)

def __getattr__(name: str) -> object:
    # Late: `python -m mpitp` sets the number of BLAS threads before NumPy is imported. Type checkers read __init__.pyi.
    if name not in _HOMES:
        raise AttributeError(f"module 'mpitp' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def _uncaught(*failure: Any, show: Any = sys.excepthook, process: int = os.getpid()) -> None:
    """End the job for an exception that nothing catches, once there is MPI: other ranks may wait for this one."""
    if "mpi4py.MPI" in sys.modules:
        return import_module(".comm.guard", __name__).uncaught(show, process, *failure)
    show(*failure)


sys.excepthook = _uncaught


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
