"""A config.json alone, without the weights that it describes."""
from __future__ import annotations

import os

from ..config import DecoderConfig
from .families import family_named
from .families.keys import Keys
from .json_files import read_json
from .model_folder import MOST_LAYERS

MOST_FEATURES = 1 << 24     # of any axis: there are no files whose tensors could say less


def read_config(path: str) -> DecoderConfig:
    """Return the DecoderConfig that a config.json describes. Heads are tied where it says so.

    Parameters
    ----------
    path : str
        The file, or the folder that has it.

    Raises
    ------
    InputError
        For a file that is none, an unknown family, a key that is missing, wrong or not supported.
    """
    file = os.path.join(path, "config.json") if os.path.isdir(path) else path
    keys = Keys(read_json(file), file, MOST_LAYERS, MOST_FEATURES)
    return family_named(keys.get("model_type", default=None)).config(keys)
