"""What type checkers see of the face: every public name, from where it is."""
from .checkpoints.loading import load_model as load_model
from .checkpoints.saving import save_model as save_model
from .comm.group import TensorParallelGroup as TensorParallelGroup
from .comm.rows import Rows as Rows
from .attention_config import AttentionConfig as AttentionConfig, Rotary as Rotary
from .config import DecoderConfig as DecoderConfig
from .errors import InputError as InputError
from .grid import Grid as Grid
from .inference.generation import generate as generate
from .inference.graph import Captured as Captured
from .layers.attention import ParallelAttention as ParallelAttention
from .layers.block import ParallelBlock as ParallelBlock
from .layers.decoder import Decoder as Decoder
from .layers.embedding import PositionEmbedding as PositionEmbedding, VocabParallelEmbedding as VocabParallelEmbedding
from .layers.linear import ColumnParallelLinear as ColumnParallelLinear, RowParallelLinear as RowParallelLinear
from .layers.loss import (vocab_parallel_cross_entropy_backward as vocab_parallel_cross_entropy_backward,
                          vocab_parallel_cross_entropy_forward as vocab_parallel_cross_entropy_forward)
from .layers.mlp import ParallelMLP as ParallelMLP
from .layers.norm import Norm as Norm
from .sharding.parameters import ParameterSpec as ParameterSpec, Place as Place
from .sharding.partition import Partition as Partition
from .timeline.timeline import Timeline as Timeline

__version__: str
__all__: list[str]
