"""The work of one layer by itself, as `bench` and the benchmarks time it."""
from __future__ import annotations

from ..arrays import compute_dtype
from ..comm.ledger import wire_bytes
from ..config import DecoderConfig
from ..sharding.decoder_specs import block_specs
from ..sharding.parameters import Place
from .job import Job, Layout
from .tensors import local_elements
from .transient import Sizes, peaks, sizes
from .work import Item, block_backward, block_forward, mlp_backward, mlp_forward


def mlp_work(tokens: int, hidden: int, ffn: int, ranks: int, backward: bool, dtype: str = "float32") -> list[Item]:
    """Return the work of rank 0 in a ParallelMLP without bias, of tanh-GELU: forward, or forward and backward."""
    s = Sizes(hidden, 0, 0, 0, 0, max(Place(0, ranks, ranks).partition(ffn).lengths), 0)
    found = mlp_forward("gelu_tanh", False, False, s, tokens, backward)
    if backward:
        found += mlp_backward(False, False, s, tokens)
    found.append(Item("python", "mlp step" if backward else "mlp forward", ()))
    return found + [sum_of(tokens * hidden, ranks, dtype, 2 if backward else 1)]


def block_work(config: DecoderConfig, tokens: int, ranks: int, backward: bool, dtype: str = "float32") -> list[Item]:
    """Return the work of a rank in one ParallelBlock of one sequence: forward, or forward and backward."""
    s = max(sizes(config, Layout(ranks)), key=lambda s: (s.F, s.Q))
    found = block_forward(config, s, tokens, tokens, "step" if backward else "window")
    if backward:
        found += block_backward(config, s, tokens, tokens)
    return found + [sum_of(tokens * config.hidden_size, ranks, dtype, 4 if backward else 2)]


def mlp_bytes(tokens: int, hidden: int, ffn: int, ranks: int, backward: bool, itemsize: int = 4) -> int:
    """Return the bytes that a rank works on in mlp_work: weights, gradients, activations."""
    own = max(Place(0, ranks, ranks).partition(ffn).lengths)
    return itemsize * (2 * hidden * own * (2 if backward else 1) +
                       tokens * ((4 * hidden + 3 * own) if backward else (2 * hidden + own)))


def block_bytes(config: DecoderConfig, tokens: int, ranks: int, backward: bool, itemsize: int = 4) -> int:
    """Return the bytes that a rank works on in block_work: weights, gradients, activations."""
    layout, job = Layout(ranks), Job(config, "train" if backward else "score", 1, tokens)
    weights = sum(max(local_elements(spec, layout)) for spec in block_specs(config, 0, "")) * itemsize
    return weights * (2 if backward else 1) + max(peaks(job, layout)) * itemsize // 4


def sum_of(elements: int, ranks: int, dtype: str, count: int) -> Item:
    """Return so many all-reduces."""
    return Item("message", "all_reduce", (wire_bytes("all_reduce", elements, compute_dtype(dtype, "gpu").itemsize,
                                                     ranks), ranks, 1), count)
