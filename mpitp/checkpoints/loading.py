"""A decoder out of a checkpoint folder, each rank reading only its slices."""
import re
from dataclasses import dataclass

import numpy as np

from ..arrays import compute_dtype
from ..comm.agreement import require_everywhere
from ..config import DecoderConfig
from ..layers.decoder import Decoder
from ..sharding.decoder_specs import decoder_specs
from ..errors import InputError
from .families import family_named
from .families.family import Family
from .families.feed_forward import FLOATS
from .families.keys import REFUSED, Keys
from .families.layout import View
from .safetensors import Checkpoint

SIZE_OF_NOTHING = 1 << 16       # an axis of this size costs nothing to look at
PIECE = 1 << 22         # elements that go to a device, or change their dtype, at a time


@dataclass
class Source:
    """A checkpoint folder that has been looked at: every tensor that the decoder needs is there, in its shape.

    config : DecoderConfig
    specs, places, views : {name of a parameter: ParameterSpec, Place, View}
    other_keys : keys of config.json that nothing here looks at
    """
    checkpoint: Checkpoint
    family: Family
    config: DecoderConfig
    specs: dict
    places: dict
    views: dict
    other_keys: list


def open_source(path):
    """Look at a checkpoint folder: headers and config only. Raises InputError for anything that is not as it should be.
    """
    checkpoint = Checkpoint(path)
    names = checkpoint.names()
    sizes = [n for file in checkpoint.files.values() for _, shape, *_ in file.tensors.values() for n in shape]
    keys = Keys(checkpoint.config, most_layers=max(1, len(names)), most_features=max(SIZE_OF_NOTHING, *sizes, 0))
    of = family_named(keys.get("model_type", default=None))
    keys.refuse(**REFUSED)
    config = of.read(keys)
    prefix = of.prefix_in(names)
    require_shape(checkpoint, prefix + of.tensors(config)["embedding"] + ".weight",
                  (config.vocab_size, config.hidden_size))
    if config.position_embedding == "learned":
        require_shape(checkpoint, prefix + of.tensors(config)["position"] + ".weight",
                      (config.max_position_embeddings, config.hidden_size))
    specs = decoder_specs(config)
    places = of.places(config, specs, prefix)
    needed = {place.name for place in places.values()}
    require_tensors(checkpoint, needed, {name for name in names if name not in needed and
                                         not of.is_no_parameter(name, config)})
    views = {}
    for name, place in places.items():
        tensor = checkpoint[place.name]
        if tensor.dtype not in FLOATS:
            raise InputError(f"{place.name}: found {tensor.dtype}, expected {', '.join(FLOATS)} (quantised weights are "
                             f"out of scope)")
        require_shape(checkpoint, place.name, place.stored_shape)
        views[name] = View(tensor, place)
    return Source(checkpoint, of, config, specs, places, views, keys.others())


def require_shape(checkpoint, name, shape):
    found = checkpoint[name].shape
    if found != shape:
        raise InputError(f"{name}: found shape {found}, expected {shape} by config.json")


def require_tensors(checkpoint, needed, unexpected):
    """Raise InputError listing the tensors that are missing and those that belong to nothing."""
    missing = needed - set(checkpoint.where)
    if missing or unexpected:
        said = [f"no {summary(missing)}"] if missing else []
        said += [f"the unexpected {summary(unexpected)}"] if unexpected else []
        raise InputError(f"{checkpoint.folder}: found {' and '.join(said)}, expected the {len(needed)} tensors that "
                         f"config.json describes")


def summary(names, most=6):
    """Names of tensors for a message, those of all layers as one: 'layers.*.mlp.up_proj.bias (24)'."""
    kinds = {}
    for name in sorted(names):
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    texts = [members[0] if len(members) == 1 else f"{kind} ({len(members)})" for kind, members in kinds.items()]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(text[:120] for text in texts[:most]) + more


def load_model(path, group, dtype=None):
    """The decoder in a checkpoint folder saved from the Hugging Face hub, each rank reading only its slices.

    Parameters
    ----------
    path : folder with config.json and model.safetensors, or shards and their index; F32, F16, BF16 or F64
    group : TensorParallelGroup
    dtype : to compute in, "float32" (None) or "float64"; on a GPU "float16" and "bfloat16" too

    Returns
    -------
    Decoder, with two attributes more:
        source : Source, whose checkpoint.config is the config.json and whose family is its table
        bytes_read : of weights, by this rank

    Notes
    -----
    Collective: root_first and one verdict, no data. Rank 0 looks at everything (headers, offsets, shapes, names) before
    any rank makes an array. A rank's memory: its slices; what is read is widened in pieces of 128 KiB on its way there.
    Raises InputError, on every rank, for a damaged folder, an unknown family, a key that changes the results and is not
    supported, and missing or unexpected tensors.
    """
    dtype = compute_dtype("float32" if dtype is None else dtype, group.device)
    source = group.root_first(lambda: open_source(path))
    model = Decoder(group, source.config, dtype=dtype, seed=None)
    require_everywhere(group.comm, "whether the checkpoint could be read", lambda: read_slices(source, model))
    model.source, model.bytes_read = source, source.checkpoint.bytes_read
    return model


def read_slices(source, model):
    group = model.group
    try:
        for name, spec in model.specs.items():
            window = spec.window(group.place)
            read_slice(source.views[name], window, model.weights[name], group.xp)
    except OSError as error:
        raise InputError(f"{source.checkpoint.folder}: found {error.strerror}, expected to read it") from None
    return "read"


def read_slice(view, window, out, xp):
    """Read a window into this rank's array: at once where it lies in host memory, else in pieces of rows."""
    if xp is np:
        return view.read(window, out)
    rows, width = window[0], max(1, out[:1].size)
    step = max(1, PIECE // width)
    for start in range(rows.start, rows.stop, step):
        part = (slice(start, min(start + step, rows.stop)), *window[1:])
        out[start - rows.start:part[0].stop - rows.start] = xp.asarray(view[part])
