"""A decoder out of a checkpoint folder, each rank reading only its slices."""
from __future__ import annotations

import os
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from ..arrays import Array, compute_dtype
from ..comm.agreement import require_everywhere, same_everywhere
from ..comm.group import TensorParallelGroup
from ..comm.launch import is_first_rank
from ..comm.patience import sleep_until_all
from ..errors import InputError, one_of, require
from ..layers.decoder import Decoder
from ..plan.job import Job
from .families.layout import View
from .fingerprint import fingerprint
from .model_folder import ModelFolder, examine, open_folder
from .room import require_room
from .safetensors import Checkpoint
from .step_models import StepCheckpoint, require_whole

WEIGHTS = ("float32", "bfloat16")
PIECE = 1 << 22         # elements that go to a device, or change their dtype, at a time


class LoadedDecoder(Decoder):
    """A LoadedDecoder has the weights of a checkpoint folder; save_model writes it in that folder's layout again.

    Parameters
    ----------
    group : TensorParallelGroup
    folder : ModelFolder
    dtype : str
    weights, activations : str
        As load_model's.

    Attributes
    ----------
    folder : ModelFolder
        Its checkpoint.config is the config.json, its family the table of names.
    bytes_read : int
        Of weights, by this rank.
    """

    def __init__(self, group: TensorParallelGroup, folder: ModelFolder, dtype: str, weights: str = "float32",
                 activations: str = "float32"):
        one_of("weights", weights, WEIGHTS)
        require(weights != "float32" or activations == "float32", f"activations {activations!r} with weights 'float32'",
                "weights 'bfloat16' with them")
        if weights == "bfloat16":
            from .packing import require_packable           # where it is asked for
            require_packable(group, folder, dtype, activations)
        require_room(group, folder.checkpoint.folder, Job(folder.config, "load", batch=1, tokens=1, dtype=dtype,
                                                          weights=weights, device=group.device))
        if isinstance(folder.checkpoint, StepCheckpoint):
            require_whole(group, folder.checkpoint, folder.specs)
        super().__init__(group, folder.config, dtype=dtype, seed=None)
        self.folder = folder
        require_everywhere(group.comm, "whether the checkpoint could be read",
                           lambda: read_slices(folder, self, weights, activations))

    @property
    def bytes_read(self) -> int:
        return self.folder.checkpoint.bytes_read


def load_model(path: str | os.PathLike, group: TensorParallelGroup, dtype: str | None = None, *,
               strict: bool = False, verify_weights: bool = False, weights: str = "float32",
               activations: str = "float32") -> LoadedDecoder:
    """Load the decoder in a checkpoint folder saved from the Hugging Face hub, each rank reading only its slices.

    Parameters
    ----------
    path : str or path
        A folder with config.json and model.safetensors, or shards and their index; F32, F16, BF16 or F64. Or a step
        folder of a training run, which is verified by its checksums.
    group : TensorParallelGroup
        The ranks.
    dtype : str, optional
        To compute in, "float32" (None) or "float64"; on a GPU "float16" and "bfloat16" too.
    strict : bool, optional
        Whether a key of config.json that the family does not know is an error instead of a warning.
    verify_weights : bool, optional
        Whether the ranks compare all bytes of their files before they load, instead of headers and samples.
    weights : str, optional
        "float32": widened to dtype as they are read. "bfloat16": matrices stay as they are in a BF16 file, in half the
        memory, and are multiplied by NumKong (pip install 'mpitp[numkong]'); forward only, float32, on CPUs.
    activations : str, optional
        What weights of "bfloat16" are multiplied with: "float32" as it is, or rounded to "bfloat16", which is faster.

    Returns
    -------
    LoadedDecoder
        A Decoder that knows its folder and the bytes that this rank read.

    Raises
    ------
    InputError
        On every rank, for a damaged folder, an unknown family, a key that changes the results and is not supported,
        missing or unexpected tensors, and folders that are not the same on all ranks; for weights "bfloat16" where a
        matrix is not BF16, NumKong is missing, or not the same on all ranks.

    Warns
    -----
    CheckpointWarning
        On rank 0, for keys of config.json that the family does not know, and for what else is left out.

    Notes
    -----
    Collective: on_root and two verdicts, no data. Rank 0 checks everything (headers, offsets, shapes, names) before
    any rank makes an array. A head that is stored beside tied embeddings is compared with them, as transformers does:
    where the two differ, the head is not tied. A rank's memory: its slices; what is read is widened in pieces of
    128 KiB on its way there, and goes to a GPU in pieces of 4 Mi elements.
    """
    computed = compute_dtype("float32" if dtype is None else dtype, group.device)
    return LoadedDecoder(group, open_on_all(group, path, strict, verify_weights), computed.name, weights, activations)


def open_on_all(group: TensorParallelGroup, path: str | os.PathLike, strict: bool = False,
                every_byte: bool = False) -> ModelFolder:
    """Check a folder on rank 0, then open it on the others, which trust its verdict on the head. Collective.

    Raises InputError on every rank unless all have opened the same contents.
    """
    checked = group.on_root(lambda: open_folder(path, strict=strict))
    own_head = group.comm.bcast(checked and checked.own_head)
    folder = same_everywhere(group.comm, lambda: checked or open_folder(path, own_head=own_head),
                             lambda folder: fingerprint(folder.checkpoint, every_byte))
    if checked:
        folder.warn()
    return folder


def read_slices(folder: ModelFolder, model: Decoder, weights: str = "float32", activations: str = "float32") -> str:
    """Read this rank's slices of all parameters into the model's arrays, or matrices as they are in the file."""
    group, left = model.group, list(model.specs)
    try:
        if weights == "bfloat16":
            from .packing import read_packed
            left = read_packed(folder, model, activations)
        for name in left:
            read_slice(folder.views[name], model.specs[name].window(group.place), model.weights[name], group.xp)
    except OSError as error:
        raise InputError(f"{folder.checkpoint.folder}: found {error.strerror}, expected to read it") from None
    finally:
        sleep_until_all(group, "load_model")            # a tokenizer may load on the cores meanwhile
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
    """Return the feed-forward block of one layer of a checkpoint. Reads nothing but headers.

    Raises InputError for a layer that does not exist, and for whatever load_model refuses.
    """
    folder = examine(checkpoint, own_head=False)        # no matter: the head is no part of the block
    if is_first_rank():
        folder.warn()
    config, prefix = folder.config, f"layers.{layer}.mlp."
    require(0 <= layer < config.num_layers, f"layer {layer}", f"0 to {config.num_layers - 1}, the layers of "
                                                              f"{checkpoint.folder}")
    weights = {name.removeprefix(prefix): view for name, view in folder.views.items() if name.startswith(prefix)}
    return FeedForward(config.hidden_size, config.ffn_size, config.activation, config.gated, config.mlp_bias, weights)
