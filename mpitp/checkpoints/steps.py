"""Step folders of a training run: written by all ranks (folders.py), resumed on any number of ranks.

    OUT/step-00000200/model.safetensors       the weights
                      optimizer.safetensors   exp_avg.NAME and exp_avg_sq.NAME of each
                      state.json              step, model, settings
"""
from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping

from ..arrays import Array
from ..comm.group import TensorParallelGroup
from ..errors import require
from ..sharding.parameters import ParameterSpec
from .families.layout import Layout
from .folders import StoredSlice, write_folder
from .safetensors import SafetensorsFile, read_json

STORED = {"float32": "F32", "float64": "F64"}
STEP = re.compile(r"step-(\d{8})$")
PARTIAL = re.compile(r"\.?step-\d{8}\.(partial|old)$")

# {file name: {tensor name: (its spec, this rank's slice)}}
Files = Mapping[str, Mapping[str, tuple[ParameterSpec, Array]]]


def step_folder(folder: str, step: int) -> str:
    """Return the path of a step's folder in the folder of a run."""
    return os.path.join(folder, f"step-{step:08d}")


def save(group: TensorParallelGroup, folder: str, step: int, files: Files, state: dict, keep: int = 0) -> str:
    """Write a step folder.

    Parameters
    ----------
    group : TensorParallelGroup
    folder : str
        Of the run; it exists.
    step : int
    files : {file name: {tensor name: (ParameterSpec, array)}}
        The tensors, each with this rank's slice.
    state : dict
        What state.json holds.
    keep : int, optional
        How many of the newest step folders stay, 0 for all.

    Returns
    -------
    str
        The step folder's path.

    Raises
    ------
    InputError
        On every rank, when any rank cannot write.

    Notes
    -----
    Collective, no data; see folders.write_folder.
    """
    path = step_folder(os.path.abspath(folder), step)
    slices = {file: [StoredSlice(spec, array, Layout(name, spec.shape), STORED[array.dtype.name])
                     for name, (spec, array) in tensors.items()] for file, tensors in files.items()}
    write_folder(group, path, slices, {"state.json": json.dumps(state, indent=1, sort_keys=True) + "\n"}, replace=True)
    group.on_root(lambda: remove_old(folder, keep))
    return step_folder(folder, step)


def remove_old(folder: str, keep: int) -> None:
    """Remove all but the newest `keep` step folders (0: none of them); each loses its name before its files."""
    for step in steps(folder)[:-keep] if keep else []:
        old = step_folder(folder, step)
        os.rename(old, f"{old}.old")
        shutil.rmtree(f"{old}.old", ignore_errors=True)


def steps(folder: str) -> list[int]:
    """Return the steps of the complete folders, in order."""
    return sorted(int(match.group(1)) for match in map(STEP.match, os.listdir(folder)) if match)


def clean(folder: str) -> list[str]:
    """Remove what a run that was killed left half-written or half-removed. Returns the names."""
    left = sorted(name for name in os.listdir(folder) if PARTIAL.match(name))
    for name in left:
        shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
    return left


def read_state(folder: str, step: int) -> dict:
    """Return what state.json of a step folder holds."""
    return read_json(os.path.join(step_folder(folder, step), "state.json"))


def load(group: TensorParallelGroup, folder: str, step: int, files: Files) -> None:
    """Fill the slices that a rank holds from a step folder, whatever number of ranks wrote it.

    Parameters
    ----------
    group : TensorParallelGroup
    folder : str
    step : int
    files : {file name: {tensor name: (ParameterSpec, array)}}
        As save's. The arrays are written to.

    Raises
    ------
    InputError
        On every rank and before anything is changed, unless the names, shapes and dtypes fit.
    """
    opened = group.root_first(lambda: {file: open_file(os.path.join(step_folder(folder, step), file), tensors)
                                       for file, tensors in files.items()})
    for file, stored in opened.items():
        for name, (spec, array) in files[file].items():
            window = spec.window(group.place)
            array[...] = group.xp.asarray(stored[name][window])


def open_file(path: str, tensors: Mapping[str, tuple[ParameterSpec, Array]]) -> SafetensorsFile:
    """Open a file of a step folder. Raises InputError unless it holds these tensors and no others."""
    stored, file = SafetensorsFile(path), os.path.basename(path)
    found = {name: (dtype, shape) for name, (dtype, shape, *_) in stored.tensors.items()}
    for name, (spec, array) in tensors.items():
        expected = STORED[array.dtype.name], tuple(spec.shape)
        require(found.get(name) == expected, f"{file}: {name} {found.get(name, 'missing')}",
                f"{expected}: the same model and dtype")
    extra = found.keys() - tensors.keys()
    require(not extra, f"{file}: {len(extra)} unexpected tensors, {min(extra, default='')} first", "none")
    return stored
