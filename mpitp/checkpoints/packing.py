"""Weights that stay in bfloat16 as they are in the file, in place of float32 ones: for a forward pass on CPUs."""
from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from ..comm.agreement import same_everywhere
from ..comm.group import TensorParallelGroup
from ..errors import one_of, require
from ..layers.base import ParallelLayer, Weights
from ..layers.decoder import Decoder
from ..ops.attention_by_query import attention_by_query
from ..ops.packed import (EVERY_BATCH, FASTER_ROWS, Buffer, PackedWeight, description, pack, require_fixed_bits,
                          rows_together)
from ..plan.tensors import is_matrix
from .families.layout import View
from .model_folder import ModelFolder, summary


def require_packable(group: TensorParallelGroup, folder: ModelFolder, dtype: str, activations: str) -> None:
    """Raise InputError on every rank unless the weights can stay as they are and be multiplied so. Collective.

    The ranks must have the same NumKong, and in reproducible mode one whose bits do not depend on the batch.
    """
    one_of("activations", activations, tuple(FASTER_ROWS))
    require(group.device == "cpu", "weights 'bfloat16' on a GPU", "dtype 'bfloat16' there")
    require(dtype == "float32", f"weights 'bfloat16' with dtype {dtype!r}", "dtype 'float32'")
    others = [folder.layouts[name].name for name, spec in folder.specs.items()
              if is_matrix(name, spec) and folder.views[name].dtype != "BF16"]
    require(not others, f"{folder.checkpoint.folder}: {summary(others)} not in BF16",
            "every matrix in it, for weights 'bfloat16'; others are widened to float32 without it")
    same_everywhere(group.comm, lambda: looked_at(group), lambda found: {"NumKong": found})


def looked_at(group: TensorParallelGroup) -> str:
    """Return the description of NumKong, after what reproducible mode needs of it was tried."""
    if group.reproducible:
        require_fixed_bits()
    return description()


def read_packed(folder: ModelFolder, model: Decoder, activations: str) -> list[str]:
    """Read the matrices of this rank in the place of the model's float32 arrays; return the names of what is left."""
    faster = FASTER_ROWS[activations]
    if model.group.reproducible:                # bits that depend on no batch: not on how many tokens come at once
        faster = EVERY_BATCH
        for block in model.blocks:
            block.attention.attend = attention_by_query
    for layer, parts in layers_and_parts(model):
        for name in layer.specs:
            if is_matrix(name, layer.specs[name]) and not isinstance(model.weights[name], PackedWeight):
                axis, cuts = parts.get(name, (0, []))
                window = layer.specs[name].window(model.group.place)
                replace(model, name, packed(folder.views[name], window, axis, cuts, activations, faster))
    return [name for name, weight in model.weights.items() if not isinstance(weight, PackedWeight)]


def layers_and_parts(model: Decoder) -> Iterator[tuple[ParallelLayer, dict[str, tuple[int, list[slice]]]]]:
    """Yield the layers that have matrices, and {parameter: (axis, parts)}: what each takes of them at a time."""
    yield model.head, {model.head.weight_name: (0, [block.local for block in model.head.own_blocks])}
    yield model.embedding, {}
    for block in model.blocks:
        attention, mlp = block.attention, block.mlp
        heads = [attention.heads.block_rows(block) for block in attention.own_blocks]
        units = [attention.heads.unit_rows(unit) for unit in attention.heads.held_units]
        yield attention, named(attention, query=(0, heads), key=(0, units), value=(0, units), out=(1, heads))
        features = [block.local for block in mlp.own_blocks]
        yield mlp, named(mlp, up=(0, features), gate=(0, features), down=(1, features))


def named(layer: ParallelLayer, **parts: tuple[int, list[slice]]) -> dict[str, tuple[int, list[slice]]]:
    """Return the parts under the whole names of the layer's parameters."""
    return {f"{layer.name}.{name}.weight": part for name, part in parts.items()}


def packed(view: View, window: tuple, axis: int, cuts: list[slice], activations: str, faster: int) -> PackedWeight:
    """Read a window of a stored matrix as a PackedWeight with these parts along an axis."""
    rows, columns = (part.stop - part.start for part in window)
    whole = len(cuts) == 1 and cuts[0] == slice(0, (rows, columns)[axis])
    if axis == 0 or whole:
        ends = sorted({0, rows, *(end for part in cuts for end in (part.start, part.stop))} if axis == 0 else {0, rows})
        found = PackedWeight((rows, columns), list(buffers(view, window, ends)), activations, faster)
        for part in () if whole else cuts:
            found.add_rows(part.start, part.stop)
        return found
    found = PackedWeight((rows, columns), [], activations, faster)
    for part in cuts:
        first = window[1].start
        of_part = window[0], slice(first + part.start, first + part.stop)
        found.add_columns(part.start, part.stop, list(buffers(view, of_part, [0, rows])))
    return found


def buffers(view: View, window: tuple, ends: Iterable[int]) -> Iterator[Buffer]:
    """Read a window of a stored matrix, and yield its rows packed: none of them across one of the ends."""
    first, columns, ends = window[0].start, window[1], list(ends)
    step = rows_together(columns.stop - columns.start)
    for start, stop in zip(ends, ends[1:]):
        for row in range(start, stop, step):
            bits = np.empty((min(step, stop - row), columns.stop - columns.start), np.uint16)
            view.read((slice(first + row, first + row + len(bits)), columns), bits)
            yield pack(bits, row)


def replace(model: Decoder, name: str, weight: PackedWeight) -> None:
    """Put a weight in the place of an array, wherever layers hold it."""
    for layer in (model, model.embedding, model.head, *(part for block in model.blocks
                                                        for part in (block, block.attention, block.mlp))):
        if name in layer.weights:
            layer.weights = Weights(layer.weights | {name: weight})
            layer.set_own()
