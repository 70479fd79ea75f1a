"""A decoder out of a checkpoint folder, each rank reading only its slices."""
from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from ..arrays import Array, compute_dtype
from ..comm.agreement import require_everywhere
from ..comm.group import TensorParallelGroup
from ..config import DecoderConfig
from ..errors import InputError, require
from ..layers.decoder import Decoder
from ..layers.decoder_parameters import decoder_parameters
from ..sharding.parameters import ParameterSpec
from .families import family_named
from .families.family import Family
from .families.keys import REFUSED, Keys
from .families.layout import Layout, View
from .safetensors import Checkpoint

FLOATS = ("F32", "F16", "BF16", "F64")
UNVERIFIED_SIZE = 1 << 16       # the largest size that config.json may claim beyond those of the stored tensors
PIECE = 1 << 22         # elements that go to a device, or change their dtype, at a time


@dataclass
class ModelFolder:
    """A checkpoint folder whose headers and config.json fit: every tensor of the decoder exists, in its shape.

    checkpoint : Checkpoint
    family : Family
    config : DecoderConfig
    specs, layouts, views : {name of a parameter: ParameterSpec, Layout, View}
    other_keys : keys of config.json that the family does not read
    """
    checkpoint: Checkpoint
    family: Family
    config: DecoderConfig
    specs: dict[str, ParameterSpec]
    layouts: dict[str, Layout]
    views: dict[str, View]
    other_keys: list[str]


def open_folder(path: str | os.PathLike) -> ModelFolder:
    """Check a checkpoint folder by its headers and its config.json; no weight is read.

    Raises
    ------
    InputError
        For anything that is not as it should be.
    """
    return examine(Checkpoint(path))


def examine(checkpoint: Checkpoint) -> ModelFolder:
    """Check an opened checkpoint against its config.json. Raises InputError where they do not fit."""
    names = checkpoint.names()
    sizes = [n for file in checkpoint.files.values() for _, shape, *_ in file.tensors.values() for n in shape]
    keys = Keys(checkpoint.config, most_layers=max(1, len(names)), most_features=max(UNVERIFIED_SIZE, *sizes, 0))
    family = family_named(keys.get("model_type", default=None))
    keys.refuse(**REFUSED)
    config = family.read(keys)
    prefix = family.prefix_in(names)
    # The two sizes that memory is made of when the parameters are listed: first compared with what is stored.
    require_shape(checkpoint, prefix + family.tensors(config)["embedding"] + ".weight",
                  (config.vocab_size, config.hidden_size))
    if config.position_embedding == "learned":
        require_shape(checkpoint, prefix + family.tensors(config)["position"] + ".weight",
                      (config.max_position_embeddings, config.hidden_size))
    specs = decoder_parameters(config)
    layouts = family.layouts(config, specs, prefix)
    needed = {layout.name for layout in layouts.values()}
    require_tensors(checkpoint, needed, {name for name in names if name not in needed and
                                         not family.is_no_parameter(name, config)})
    views = {}
    for name, layout in layouts.items():
        tensor = checkpoint[layout.name]
        if tensor.dtype not in FLOATS:
            raise InputError(f"{layout.name}: found {tensor.dtype}, expected {', '.join(FLOATS)} (quantised weights are "
                             f"out of scope)")
        require_shape(checkpoint, layout.name, layout.stored_shape)
        views[name] = View(tensor, layout)
    return ModelFolder(checkpoint, family, config, specs, layouts, views, keys.others())


def require_shape(checkpoint: Checkpoint, name: str, shape: tuple) -> None:
    """Raise InputError unless the stored tensor has this shape."""
    found = checkpoint[name].shape
    if found != shape:
        raise InputError(f"{name}: found shape {found}, expected {shape} by config.json")


def require_tensors(checkpoint: Checkpoint, needed: set[str], unexpected: set[str]) -> None:
    """Raise InputError listing the tensors that are missing and those that belong to nothing."""
    missing = needed - set(checkpoint.where)
    if missing or unexpected:
        faults = [f"no {summary(missing)}"] if missing else []
        faults += [f"the unexpected {summary(unexpected)}"] if unexpected else []
        raise InputError(f"{checkpoint.folder}: found {' and '.join(faults)}, expected the {len(needed)} tensors that "
                         f"config.json describes")


def summary(names: Iterable[str], most: int = 6) -> str:
    """Names of tensors for a message, those of all layers as one: 'layers.*.mlp.up_proj.bias (24)'."""
    kinds = {}
    for name in sorted(names):
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    texts = [members[0] if len(members) == 1 else f"{kind} ({len(members)})" for kind, members in kinds.items()]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(text[:120] for text in texts[:most]) + more


# --- a decoder ---------------------------------------------------------------------------------------------------

class LoadedDecoder(Decoder):
    """A Decoder with the weights of a checkpoint folder; save_model writes it in that folder's layout again.

    Parameters
    ----------
    group : TensorParallelGroup
    folder : ModelFolder
    dtype : str

    Attributes
    ----------
    folder : ModelFolder
        Its checkpoint.config is the config.json, its family the table of names.
    bytes_read : int
        Of weights, by this rank.
    """

    def __init__(self, group: TensorParallelGroup, folder: ModelFolder, dtype: str):
        super().__init__(group, folder.config, dtype=dtype, seed=None)
        self.folder = folder
        require_everywhere(group.comm, "whether the checkpoint could be read", lambda: read_slices(folder, self))

    @property
    def bytes_read(self) -> int:
        return self.folder.checkpoint.bytes_read


def load_model(path: str | os.PathLike, group: TensorParallelGroup, dtype: str | None = None) -> LoadedDecoder:
    """Load the decoder in a checkpoint folder saved from the Hugging Face hub, each rank reading only its slices.

    Parameters
    ----------
    path : str or path
        A folder with config.json and model.safetensors, or shards and their index; F32, F16, BF16 or F64.
    group : TensorParallelGroup
    dtype : str, optional
        To compute in, "float32" (None) or "float64"; on a GPU "float16" and "bfloat16" too.

    Returns
    -------
    LoadedDecoder
        A Decoder that knows its folder and the bytes that this rank read.

    Raises
    ------
    InputError
        On every rank, for a damaged folder, an unknown family, a key that changes the results and is not supported,
        and missing or unexpected tensors.

    Notes
    -----
    Collective: root_first and one verdict, no data. Rank 0 checks everything (headers, offsets, shapes, names) before
    any rank makes an array. A rank's memory: its slices; what is read is widened in pieces of 128 KiB on its way there.
    """
    dtype = compute_dtype("float32" if dtype is None else dtype, group.device)
    return LoadedDecoder(group, group.root_first(lambda: open_folder(path)), dtype)


def read_slices(folder: ModelFolder, model: Decoder) -> str:
    """Read this rank's slices of all parameters into the model's arrays."""
    group = model.group
    try:
        for name, spec in model.specs.items():
            window = spec.window(group.rank, group.size, group.blocks)
            read_slice(folder.views[name], window, model.weights[name], group.xp)
    except OSError as error:
        raise InputError(f"{folder.checkpoint.folder}: found {error.strerror}, expected to read it") from None
    return "read"


def read_slice(view: View, window: tuple, out: Array, xp: ModuleType) -> None:
    """Read a window into this rank's array: directly where it lies in host memory, else in pieces of rows."""
    if xp is np:
        return view.read(window, out)
    rows, width = window[0], max(1, out[:1].size)
    step = max(1, PIECE // width)
    for start in range(rows.start, rows.stop, step):
        part = (slice(start, min(start + step, rows.stop)), *window[1:])
        out[start - rows.start:part[0].stop - rows.start] = xp.asarray(view[part])


# --- one feed-forward block ----------------------------------------------------------------------------------------

@dataclass
class FeedForward:
    """The feed-forward block of one layer of a checkpoint, under the names of ParallelMLP.

    weights : {"up.weight", "gate.weight", "down.weight" and their biases: View}, [out, in], read when sliced
    """
    hidden_size: int
    ffn_hidden_size: int
    activation: str
    gated: bool
    bias: bool
    weights: dict[str, View]


def feed_forward(checkpoint: Checkpoint, layer: int) -> FeedForward:
    """The feed-forward block of one layer of a checkpoint. Reads nothing but headers.

    Raises InputError for a layer that does not exist, and for whatever load_model refuses.
    """
    folder = examine(checkpoint)
    config, prefix = folder.config, f"layers.{layer}.mlp."
    require(0 <= layer < config.num_layers, f"layer {layer}", f"0 to {config.num_layers - 1}, the layers of "
                                                              f"{checkpoint.folder}")
    weights = {name.removeprefix(prefix): view for name, view in folder.views.items() if name.startswith(prefix)}
    return FeedForward(config.hidden_size, config.ffn_size, config.activation, config.gated, config.mlp_bias, weights)
