"""A checkpoint folder, checked: what its config.json says, and where each parameter lies in its files."""
from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..config import DecoderConfig
from ..errors import InputError, printable
from ..sharding.decoder_specs import decoder_specs
from ..sharding.parameters import ParameterSpec
from .families import family_named
from .families.family import Family
from .families.keys import Keys, short
from .families.layout import Layout, View
from .left_out import differ, is_computed
from .safetensors import Checkpoint
from .step_models import StepCheckpoint, open_checkpoint

FLOATS = ("F32", "F16", "BF16", "F64")
MOST_LAYERS = 1 << 12          # of a folder that claims more, the parameters' names alone would cost seconds
UNVERIFIED_SIZE = 1 << 16       # the largest size that config.json may claim beyond those of the stored tensors


class CheckpointWarning(UserWarning):
    """Something in a checkpoint folder that is left out of the model; the text names it."""


@dataclass
class ModelFolder:
    """A checkpoint folder whose headers and config.json fit: every tensor of the decoder exists, in its shape.

    checkpoint : Checkpoint, or the StepCheckpoint of a step folder
    family : Family, None of a training run that began with random weights
    config : DecoderConfig
    specs, layouts, views : {name of a parameter: ParameterSpec, Layout, View}
    own_head : whether the head is the stored one although config.json says that it is tied, because the two differ
    other_keys : keys of config.json that are neither read nor known to change nothing
    left_out : stored buffers whose values are not those that the model computes
    other_parts : stored tensors of parts of the model that are left out
    """
    checkpoint: Checkpoint
    family: Family | None
    config: DecoderConfig
    specs: dict[str, ParameterSpec]
    layouts: dict[str, Layout]
    views: dict[str, View]
    own_head: bool
    other_keys: list[str]
    left_out: list[str]
    other_parts: list[str]

    def warnings(self) -> list[str]:
        """Return a line for each kind of thing in the folder that the model leaves out or that contradicts the rest."""
        found: list[str] = []
        if self.family is None:
            return found
        if self.other_keys:
            found.append(f"found {', '.join(map(short, self.other_keys))}, expected keys that model_type "
                         f"{self.family.model_type} has: left out")
        if self.own_head:
            found.append(f"found tie_word_embeddings = True, but {self.layouts['head.weight'].name} differs from the "
                         f"embedding: the head is used as it is stored")
        if self.left_out:
            found.append(f"found {summary(self.left_out)} with values of its own, expected those that the model "
                         f"computes: left out")
        if self.other_parts:
            found.append(f"found {len(self.other_parts)} tensors of {parts_of(self.other_parts)}, expected those of "
                         f"the text model: left out")
        return found

    def warn(self) -> None:
        """Issue the warnings, as CheckpointWarning, in the name of config.json."""
        for text in self.warnings():
            path = printable(os.path.join(self.checkpoint.folder, "config.json"))
            warnings.warn_explicit(printable(text), CheckpointWarning, path, 0)


def open_folder(path: str | os.PathLike, *, strict: bool = False, own_head: bool | None = None) -> ModelFolder:
    """Check a checkpoint folder by its headers and its config.json.

    Parameters
    ----------
    path : str or path
    strict : bool, optional
        Whether a key of config.json that the family does not know is an error.
    own_head : bool, optional
        Whether a head that is stored beside tied embeddings differs from them. None: read both, and the stored buffers,
        to find out. Otherwise no weight is read.

    Raises
    ------
    InputError
        For anything that is not as it should be.
    """
    folder = examine(open_checkpoint(path), own_head)
    if strict and folder.other_keys:
        raise InputError(f"{os.path.join(folder.checkpoint.folder, 'config.json')}: {folder.warnings()[0]}")
    return folder


def examine(checkpoint: Checkpoint, own_head: bool | None = None) -> ModelFolder:
    """Check an opened checkpoint against its config.json. Raises InputError where they do not fit.

    own_head : as open_folder's
    """
    if isinstance(checkpoint, StepCheckpoint):
        return examine_step(checkpoint)
    names = checkpoint.names()
    sizes = [n for file in checkpoint.files.values() for _, shape, begin, end in file.tensors.values()
             if begin < end for n in shape]             # those of an empty tensor claim what no file holds
    keys = Keys(checkpoint.config, most_layers=min(max(1, len(names)), MOST_LAYERS),
                most_features=max(UNVERIFIED_SIZE, *sizes, 0))
    family = family_named(keys.get("model_type", default=None))
    config = family.config(keys)
    prefix = family.prefix_in(names, config)
    embedding, head = family.embedding(config, prefix), family.head(config, names)
    if config.tie_word_embeddings and embedding not in checkpoint.where and head in checkpoint.where:
        embedding = head                        # tied, and stored under the other name
    # First of all shapes, as a wrong size in config.json is plainest here.
    require_shape(checkpoint, embedding, (config.vocab_size, config.hidden_size))
    if config.position_embedding == "learned":
        require_shape(checkpoint, prefix + family.names(config)["position"] + ".weight",
                      (config.position_offset + (config.max_position_embeddings or 0), config.hidden_size))
    look = own_head is None
    if config.tie_word_embeddings and head in checkpoint.where and head != embedding:
        require_shape(checkpoint, head, (config.vocab_size, config.hidden_size))
        own_head = differ(checkpoint[head], checkpoint[embedding]) if look else own_head
        config = replace(config, tie_word_embeddings=not own_head)
    else:
        own_head = False
    specs = decoder_specs(config)
    layouts = family.layouts(config, specs, prefix)
    layouts["embedding.weight"] = replace(layouts["embedding.weight"], name=embedding)
    if "head.weight" in layouts:
        layouts["head.weight"] = replace(layouts["head.weight"], name=head)
    needed = {name for layout in layouts.values() for name in layout.names}
    beside = {name for name in names if name not in needed and not (name == head and config.tie_word_embeddings)}
    other_parts = {name for name in beside if family.is_of_other_part(name)}
    buffers = {name for name in beside if family.is_buffer(name)}
    require_tensors(checkpoint, needed, beside - buffers - other_parts)
    left_out = sorted(name for name in buffers if look and not is_computed(checkpoint[name], config))
    return ModelFolder(checkpoint, family, config, specs, layouts, views_of(checkpoint, layouts), bool(own_head),
                       keys.unknown(), left_out, sorted(other_parts))


def examine_step(checkpoint: StepCheckpoint) -> ModelFolder:
    """Check a step folder against its state.json: its tensors are the parameters, under their own names."""
    config = checkpoint.decoder_config()
    specs = decoder_specs(config)
    require_tensors(checkpoint, set(specs), set(checkpoint.names()) - set(specs))
    layouts = {name: Layout(name, spec.shape) for name, spec in specs.items()}
    return ModelFolder(checkpoint, checkpoint.family(), config, specs, layouts, views_of(checkpoint, layouts), False,
                       [], [], [])


def views_of(checkpoint: Checkpoint, layouts: dict[str, Layout]) -> dict[str, View]:
    """Return the View of each parameter. Raises InputError for a tensor of another shape, or of no float dtype."""
    views = {}
    for name, layout in layouts.items():
        tensors = {stored: checkpoint[stored] for stored in layout.names}
        for stored, tensor in tensors.items():
            if tensor.dtype not in FLOATS:
                raise InputError(f"{stored}: found {tensor.dtype}, expected {', '.join(FLOATS)} (quantised weights "
                                 f"are out of scope)")
            require_shape(checkpoint, stored, layout.stored_shape)
        views[name] = View(tensors, layout)
    return views


def require_shape(checkpoint: Checkpoint, name: str, shape: tuple) -> None:
    """Raise InputError unless the stored tensor has this shape."""
    found = checkpoint[name].shape
    if found != shape:
        raise InputError(f"{name}: found shape {found}, expected {shape} by {checkpoint.document}")


def require_tensors(checkpoint: Checkpoint, needed: set[str], unexpected: set[str]) -> None:
    """Raise InputError listing the tensors that are missing and those that belong to nothing."""
    missing = needed - set(checkpoint.where)
    if missing or unexpected:
        faults = [f"no {summary(missing)}"] if missing else []
        faults += [f"the unexpected {summary(unexpected)}"] if unexpected else []
        raise InputError(f"{checkpoint.folder}: found {' and '.join(faults)}, expected the {len(needed)} tensors that "
                         f"{checkpoint.document} describes")


def parts_of(names: Iterable[str]) -> str:
    """Return the modules that tensors belong to, for a message: the first name of each that is not "model"."""
    return ", ".join(sorted({name.removeprefix("model.").split(".")[0] for name in names}))


def summary(names: Iterable[str], most: int = 6) -> str:
    """Return names of tensors for a message, those of all layers as one: 'layers.*.mlp.up_proj.bias (24)'."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(names):
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    texts = [members[0] if len(members) == 1 else f"{kind} ({len(members)})" for kind, members in kinds.items()]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(text[:120] for text in texts[:most]) + more
