"""A decoder into a checkpoint folder as the Hugging Face hub has them, written in place by all ranks."""
from __future__ import annotations

import json
import os

from ..errors import require
from ..layers.decoder import Decoder
from .families import MODULES, config_json, family_named
from .folders import StoredSlice, write_folder
from .loading import LoadedDecoder

STORED_AS = {"float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16"}
FILE = "model.safetensors"
# What a model needs beside its weights, copied from the folder that it was loaded from.
COMPANIONS = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja")


def save_model(model: Decoder, path: str | os.PathLike, dtype: str | None = None, family: str | None = None) -> None:
    """Write a decoder as a checkpoint folder, in a family's names and layout.

    Parameters
    ----------
    model : Decoder
        What to write, with this rank's slices of its weights.
    path : str or path
        The folder to make. Its parent exists, it does not.
    dtype : str, optional
        To store: "float32", "float64", "float16" or "bfloat16". None: the one that the model computes in.
    family : str, optional
        A model_type, such as "llama". None: the one that load_model found.

    Raises
    ------
    InputError
        On every rank, for a path that exists or that cannot be written, for a model that load_model did not make where
        no family is given, and for a choice of the model's config that the family does not have.

    Notes
    -----
    Collective, no data; see folders.write_folder. The bytes do not depend on the number of ranks.
    """
    loaded = model.folder if isinstance(model, LoadedDecoder) else None
    name = dtype or model.dtype.name
    require(name in STORED_AS, f"dtype {dtype!r}", f"one of {', '.join(STORED_AS)}, or None")
    require(family or loaded, "a model that load_model did not make", f"family, one of {', '.join(MODULES)}")
    target = loaded.family if loaded and family is None else family_named(family)
    if target.saved_as:                     # the text model alone, of a model that sees images, too
        target = family_named(target.saved_as)
    if loaded is None or target is not loaded.family:
        keys, companions = config_json(model.config, target), []
        if loaded and family is None:
            companions = companions_of(loaded.checkpoint.folder)
    else:
        keys, companions = dict(loaded.checkpoint.config), companions_of(loaded.checkpoint.folder)
        if loaded.own_head:
            keys["tie_word_embeddings"] = False
    keys["torch_dtype" if "torch_dtype" in keys else "dtype"] = name
    path = os.path.abspath(os.fspath(path))
    model.group.on_root(lambda: require_new(path))
    layouts = target.layouts(model.config, model.specs, target.prefix)
    slices = [StoredSlice(model.specs[ours], model.weights[ours], layout, STORED_AS[name])
              for ours, layout in sorted(layouts.items(), key=lambda item: item[1].name)]
    write_folder(model.group, path, {FILE: slices}, {"config.json": json.dumps(keys, indent=2) + "\n"},
                 metadata={"format": "pt"}, companions=companions)


def require_new(path: str) -> None:
    """Raise InputError unless a folder can be made there."""
    require(not os.path.lexists(path), path, "a path where nothing is")
    parent = os.path.dirname(path)
    require(os.path.isdir(parent) and os.access(parent, os.W_OK), f"no folder {parent} that can be written to", "one")


def companions_of(folder: str) -> list[str]:
    """Return the paths of a checkpoint folder's other files that belong to the model."""
    paths = [os.path.join(folder, name) for name in COMPANIONS]
    return [path for path in paths if os.path.isfile(path)]
