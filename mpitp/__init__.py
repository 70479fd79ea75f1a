"""Tensor parallelism for transformers in plain NumPy (or CuPy) and MPI.

    with mpitp.TensorParallelGroup() as group:
        mlp = mpitp.ParallelMLP(group, hidden_size=4096)
        y, saved = mlp.forward(x)
        dx, gradients = mlp.backward(dy, saved)
"""
from typing import TYPE_CHECKING

__version__ = "0.2.0"

# Type checkers read this, and not __getattr__, with which they would take any misspelt name for good.
if TYPE_CHECKING:
    from .checkpoints.loading import load_model as load_model
    from .checkpoints.saving import save_model as save_model
    from .comm.group import TensorParallelGroup as TensorParallelGroup
    from .config import DecoderConfig as DecoderConfig
    from .config import Rotary as Rotary
    from .errors import InputError as InputError
    from .inference.generation import generate as generate
    from .inference.graph import Captured as Captured
    from .layers.attention import ParallelAttention as ParallelAttention
    from .layers.block import ParallelBlock as ParallelBlock
    from .layers.decoder import Decoder as Decoder
    from .layers.embedding import PositionEmbedding as PositionEmbedding
    from .layers.embedding import VocabParallelEmbedding as VocabParallelEmbedding
    from .layers.linear import ColumnParallelLinear as ColumnParallelLinear
    from .layers.linear import RowParallelLinear as RowParallelLinear
    from .layers.loss import vocab_parallel_cross_entropy_backward as vocab_parallel_cross_entropy_backward
    from .layers.loss import vocab_parallel_cross_entropy_forward as vocab_parallel_cross_entropy_forward
    from .layers.mlp import ParallelMLP as ParallelMLP
    from .layers.norm import Norm as Norm
    from .sharding.parameters import ParameterSpec as ParameterSpec
    from .sharding.partition import Partition as Partition

_HOMES = {
    "TensorParallelGroup": "comm.group",
    "Partition": "sharding.partition",
    "Place": "sharding.partition",
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
    "AttentionConfig": "config",
    "DecoderConfig": "config",
    "Rotary": "config",
    "load_model": "checkpoints.loading",
    "save_model": "checkpoints.saving",
    "Captured": "inference.graph",
}
__all__ = sorted(_HOMES)

if not TYPE_CHECKING:
    def __getattr__(name):
        # Late, because `python -m mpitp` must set the number of BLAS threads before NumPy is imported.
        if name not in _HOMES:
            raise AttributeError(f"module 'mpitp' has no attribute {name!r}")
        from importlib import import_module
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__():
    return sorted(set(globals()) | set(__all__))
