"""Every array that stays for the whole run, by name, to the byte: what the layers, the optimizer and generation make.

Shapes are those of the ParameterSpecs that the layers make their own arrays from. Keys and values are split as the rows
of their projections are, so a ParameterSpec says which of them a rank holds, too.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import numpy as np

from ..arrays import compute_dtype, sum_dtype
from ..config import DecoderConfig
from ..sharding.decoder_specs import decoder_specs
from ..sharding.parameters import ParameterSpec, Place
from .job import Job, Layout, pieces

ALIGNED = 64        # elements that each gradient of the one array of all takes a multiple of: training/gradients.py


@dataclass(frozen=True)
class Tensor:
    """A Tensor is an array of one rank that stays.

    Attributes
    ----------
    kind : str
        "weights", "gradients", "more gradients" (of a step's later forwards), "master weights" (of a 16-bit model),
        "exp_avg", "exp_avg_sq", "keys", "values", "cos", "sin", "slopes".
    name : str
        Of the parameter, or of the layer that has the array.
    shape : tuple of int
        Of this rank's part.
    dtype : str
    nbytes : int
    """
    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class Stored:
    """One array that a job keeps, split as `spec` says."""
    kind: str
    spec: ParameterSpec
    dtype: np.dtype
    leading: tuple[int, ...] = ()           # axes in front of those of the spec, which are not split
    aligned: int = 1                        # elements that it takes a multiple of
    number: int = 0                         # of several of one kind


def stored(job: Job, layout: Layout) -> Iterator[Stored]:
    """Yield what a job keeps, in the order in which it is made."""
    dtype = compute_dtype(job.dtype, job.device)
    specs = specs_of(job.config)
    for name, spec in specs.items():
        yield Stored("weights", spec, np.dtype(kept_in(name, spec, dtype.name, job.weights))
                     if job.weights == "bfloat16" else dtype)
    if job.kind == "train":
        kinds = ["exp_avg", "exp_avg_sq"] + (["master weights"] if sum_dtype(dtype) != dtype else [])
        for kind in kinds:
            for spec in specs.values():
                yield Stored(kind, spec, sum_dtype(dtype))
        for number in range(gradient_arrays(len(pieces(job, layout)), layout.blocks is not None)):
            for spec in specs.values():
                yield Stored("more gradients" if number else "gradients", spec, sum_dtype(dtype), (), ALIGNED, number)
    if job.kind != "load":
        yield from of_attention(job, dtype)


def gradient_arrays(count: int, reproducible: bool) -> int:
    """Return how many arrays the gradients of so many pieces of a step take: two, or those alive in a fixed tree."""
    return 1 + max(piece.bit_count() for piece in range(count)) if reproducible else min(2, count)


def padded(elements: int, multiple: int) -> int:
    """Return the elements that an array takes."""
    return -(-elements // multiple) * multiple


def kept_in(name: str, spec: ParameterSpec, dtype: str, weights: str) -> str:
    """Return the dtype of a parameter in memory, "float16" for any of 16 bits: matrices alone stay in bfloat16."""
    return "float16" if weights == "bfloat16" and is_matrix(name, spec) else dtype


def is_matrix(name: str, spec: ParameterSpec) -> bool:
    """Return whether a parameter is a matrix that layers multiply with, or look rows up in by vocabulary."""
    return len(spec.shape) == 2 and not name.startswith("position.") and not name.endswith("_norm.weight")


@lru_cache(maxsize=8)
def specs_of(config: DecoderConfig) -> dict[str, ParameterSpec]:
    """Return decoder_specs(config), which takes seconds for thousands of layers."""
    return decoder_specs(config)


def of_attention(job: Job, dtype: np.dtype) -> Iterator[Stored]:
    """Yield what each attention keeps beside its weights: keys and values, rotary's tables, ALiBi's slopes."""
    config, sums = job.config, sum_dtype(dtype)
    H, G, K = config.num_attention_heads, config.query_groups, config.head_dim
    for layer in range(config.num_layers):
        name, rotary = f"layers.{layer}.attention", config.rotary_of(layer)
        if job.kind == "decode":
            for kind in ("keys", "values"):
                held = ParameterSpec(name, (G * K,), 0, multiple=K, share=H // G)
                yield Stored(kind, held, dtype, (job.batch, job.positions))
        if rotary:
            pairs = (K if rotary.dim is None else rotary.dim) // 2
            for kind in ("cos", "sin"):
                yield Stored(kind, ParameterSpec(name, (job.positions, pairs), None), sums)
        if config.position_embedding == "alibi":
            yield Stored("slopes", ParameterSpec(name, (H,), None), sums)


def persistent(job: Job, layout: Layout, rank: int) -> list[Tensor]:
    """Return every array that stays on one rank of a tensor group."""
    found = []
    for array in stored(job, layout):
        shape = list(array.spec.shape)
        if array.spec.axis is not None:
            shape[array.spec.axis] = held_lengths(array.spec, layout)[rank]
        whole = array.leading + tuple(shape)
        nbytes = padded(prod(whole), array.aligned) * array.dtype.itemsize
        kind = f"{array.kind} {array.number}" if array.number > 1 else array.kind
        found.append(Tensor(kind, array.spec.name, whole, array.dtype.name, nbytes))
    return found


def bytes_of_ranks(job: Job, layout: Layout) -> dict[str, list[int]]:
    """Return {kind: bytes on each rank of a tensor group}. Parameters of one shape are asked for once."""
    counts: dict[Stored, int] = {}
    for array in stored(job, layout):
        unnamed = replace(array, spec=replace(array.spec, name=""))
        counts[unnamed] = counts.get(unnamed, 0) + 1
    found: dict[str, list[int]] = {}
    for array, count in counts.items():
        of_kind = found.setdefault(array.kind, [0] * layout.tensor)
        for rank, elements in enumerate(local_elements(array.spec, layout)):
            of_kind[rank] += count * padded(elements * prod(array.leading), array.aligned) * array.dtype.itemsize
    return found


def local_elements(spec: ParameterSpec, layout: Layout) -> list[int]:
    """Return how many elements of a parameter each rank of a tensor group holds."""
    if spec.axis is None:
        return [prod(spec.shape)] * layout.tensor
    others = prod(spec.shape) // spec.shape[spec.axis]
    return [others * length for length in held_lengths(spec, layout)]


def held_lengths(spec: ParameterSpec, layout: Layout) -> tuple[int, ...]:
    """Return the length of the split axis on each rank of a tensor group."""
    assert spec.axis is not None, f"{spec.name} is replicated"
    return lengths_of(spec.shape[spec.axis], spec.multiple, spec.share, layout.tensor, layout.blocks or layout.tensor)


@lru_cache(maxsize=1024)
def lengths_of(size: int, multiple: int, share: int, ranks: int, blocks: int) -> tuple[int, ...]:
    """Return how much of a dimension each rank holds. A model has few dimensions, on many parameters and ranks."""
    partition = Place(0, ranks, blocks).partition(size, multiple, share)
    held = [partition.held(rank) for rank in range(ranks)]
    return tuple(part.stop - part.start for part in held)
