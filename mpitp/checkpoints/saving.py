"""A decoder into a checkpoint folder as the Hugging Face hub has them, written in place by all ranks."""
import json
import os
import shutil

from ..comm.agreement import require_everywhere
from ..arrays import on_host
from ..errors import InputError, require
from .families import MODULES, config_json, family_named
from .steps import sync_folder
from .safetensors import SafetensorsFile
from .tensor_writer import TensorWriter, create

STORED_AS = {"float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16"}
FILE = "model.safetensors"
# What a model needs beside its weights, taken along from where it was loaded.
COMPANIONS = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja")


def save_model(model, path, dtype=None, family=None):
    """Write a decoder as a checkpoint folder, in a family's names and layout.

    Parameters
    ----------
    model : Decoder
    path : folder to make; its parent is there, it is not
    dtype : to store, "float32", "float64", "float16" or "bfloat16" (None: the one that the model computes in)
    family : model_type, such as "llama"; None: the one that load_model found

    Notes
    -----
    Collective, no data. Rank 0 makes a folder under another name, with config.json and a file of the right size; every
    rank writes what it owns where it belongs (rank 0 what is replicated); when all of it is on disk the folder gets its
    name. The bytes do not depend on the number of ranks.
    Raises InputError, on every rank, for a path that exists or that cannot be written, a model that load_model did not
    make and no family, and a choice of the model's config that the family does not have.
    """
    group, source = model.group, getattr(model, "source", None)
    stored = STORED_AS.get(dtype or model.dtype.name)
    require(stored is not None, f"dtype {dtype!r}", f"one of {', '.join(STORED_AS)}, or None")
    require(family or source, "a model that load_model did not make", f"family, one of {', '.join(MODULES)}")
    of = source.family if family is None else family_named(family)
    if source is None or of is not source.family:
        keys, companions_from = config_json(model.config, of), None
    else:
        keys, companions_from = dict(source.checkpoint.config), source.checkpoint.folder
    keys["torch_dtype" if "torch_dtype" in keys else "dtype"] = dtype or model.dtype.name
    path = os.path.abspath(os.fspath(path))
    places = of.places(model.config, model.specs, of.prefix)
    partial = group.root_first(lambda: prepare(group, path, keys, companions_from, places, stored))
    failed = None
    try:
        require_everywhere(group.comm, "whether the model could be written",
                           lambda: write_slices(model, os.path.join(partial, FILE), places))
        group.root_first(lambda: finish(partial, path) if group.rank == 0 else None)
    except InputError as error:
        failed = error
    if failed is not None:
        if group.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise failed


def prepare(group, path, keys, companions_from, places, stored):
    """Rank 0: make the folder under its first name. All: that name."""
    partial = f"{path}.partial"
    if group.rank != 0:
        return partial
    require(not os.path.lexists(path), path, "a path where nothing is")
    parent = os.path.dirname(path)
    require(os.path.isdir(parent) and os.access(parent, os.W_OK), f"no folder {parent} that can be written to", "one")
    try:
        os.mkdir(partial)
    except OSError as error:
        raise InputError(f"{partial}: found {error.strerror}, expected to make it (what a save that ended early left "
                         f"there may be removed)") from None
    try:
        create(os.path.join(partial, FILE),
               {place.name: (stored, place.stored_shape) for place in sorted(places.values(), key=lambda p: p.name)},
               {"format": "pt"})
        with open(os.path.join(partial, "config.json"), "w") as file:
            json.dump(keys, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        for name in COMPANIONS:
            if companions_from and os.path.isfile(os.path.join(companions_from, name)):
                shutil.copyfile(os.path.join(companions_from, name), os.path.join(partial, name))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return partial


def write_slices(model, file, places):
    """Write what this rank owns into the file; when it returns that is on disk."""
    group = model.group
    place_of_rank = group.place
    try:
        writer = TensorWriter(file, SafetensorsFile(file).tensors)
        for name, spec in model.specs.items():
            if spec.axis is None and group.rank != spec.owner():
                continue
            window = [slice(0, n) for n in spec.shape]
            if spec.axis is not None:
                window[spec.axis] = spec.partition(place_of_rank).range(group.rank)
            mine, place = model.weights[name][spec.owned(place_of_rank)], places[name]
            for part, theirs in place.pieces(window):
                values = on_host(mine[part])
                writer.write(place.name, theirs, values.T if place.transposed else values)
        writer.close()
    except OSError as error:
        raise InputError(f"{file}: found {error.strerror}, expected to write it") from None
    return "written"


def finish(partial, path):
    """Give the folder its name, after its entries are on disk."""
    sync_folder(partial)
    require(not os.path.lexists(path), path, "a path where nothing is")
    os.rename(partial, path)
    sync_folder(os.path.dirname(path))
