"""A decoder into a checkpoint folder as the Hugging Face hub has them, written in place by all ranks."""
from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping

from ..errors import require
from ..layers.decoder import Decoder
from .families import MODULES, config_json, family_named
from .families.family import Family
from .folders import StoredSlice, is_empty, write_folder
from .loading import LoadedDecoder
from .model_folder import ModelFolder
from .step_models import model_files

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
        The folder to make. Its parent exists; it does not, or is empty.
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
    known = loaded.family if loaded else None
    require(family or known, "a model that load_model did not make", f"family, one of {', '.join(MODULES)}")
    target = known if known and family is None else family_named(family)
    if loaded and target is known:
        target, keys = saved_form(loaded)
        companions = companions_of(loaded.checkpoint.folder)
    else:
        target = saved_as(target)
        keys, companions = config_json(model.config, target), []
    write_model(model, path, target, keys, dtype, companions=companions)


def saved_as(family: Family) -> Family:
    """Return the family that a model is saved as: of one that sees images, too, that of its text model."""
    return family_named(family.saved_as) if family.saved_as else family


def saved_form(folder: ModelFolder) -> tuple[Family, dict]:
    """Return the family and the config.json that the model of a folder is saved with: its own, as far as they fit."""
    assert folder.family is not None, "a run that began with random weights has none"
    target, keys = saved_as(folder.family), dict(folder.checkpoint.config)
    if target is not folder.family:
        keys = config_json(folder.config, target)
    elif folder.own_head:
        keys["tie_word_embeddings"] = False
    return target, keys


def write_model(model: Decoder, path: str | os.PathLike, family: Family, keys: dict, dtype: str | None = None, *,
                companions: Iterable[str] = (), documents: Mapping[str, str] | None = None) -> None:
    """Write a checkpoint folder, as save_model does, with this config.json.

    Parameters
    ----------
    model, path, dtype
        As save_model's.
    family : Family
        Whose names and layout the tensors get.
    keys : dict
        Of config.json, all but the dtype.
    companions : paths, optional
        Files that are copied into the folder.
    documents : {file name: text}, optional
        More files of it.
    """
    name = dtype or model.dtype.name
    require(name in STORED_AS, f"dtype {dtype!r}", f"one of {', '.join(STORED_AS)}, or None")
    keys = {**keys, "torch_dtype" if "torch_dtype" in keys else "dtype": name}
    path = os.path.abspath(os.fspath(path))
    model.group.on_root(lambda: require_new(path))
    layouts = family.layouts(model.config, model.specs, family.prefix)
    slices = [StoredSlice(model.specs[ours], model.weights[ours], layout, STORED_AS[name])
              for ours, layout in sorted(layouts.items(), key=lambda item: item[1].name)]
    documents = {"config.json": json.dumps(keys, indent=2) + "\n", **(documents or {})}
    write_folder(model.group, path, {FILE: slices}, documents, metadata={"format": "pt"}, companions=companions)


def require_new(path: str) -> None:
    """Raise InputError unless a folder can be made there: nothing is, or an empty folder."""
    require(not os.path.lexists(path) or is_empty(path), path, "a path where nothing is")
    parent = os.path.dirname(path)
    require(os.path.isdir(parent) and os.access(parent, os.W_OK), f"no folder {parent} that can be written to", "one")


def companions_of(folder: str) -> list[str]:
    """Return the paths of a checkpoint folder's other files that belong to the model."""
    paths = [os.path.join(model_files(folder), name) for name in COMPANIONS]
    return [path for path in paths if os.path.isfile(path)]
