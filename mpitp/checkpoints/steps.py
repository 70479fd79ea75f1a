"""Step folders of a training run: written by all ranks (folders.py), resumed on any number of ranks.

    OUT/step-00000200/model.safetensors       the weights
                      optimizer.safetensors   exp_avg.NAME and exp_avg_sq.NAME of each
                      state.json              step, model, settings, a checksum of every tensor
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping

import numpy as np

from ..arrays import Array, module_of
from ..comm.agreement import require_everywhere
from ..comm.group import TensorParallelGroup
from ..errors import InputError, require
from ..sharding.parameters import ParameterSpec
from .checksums import Checksums, checksums_of
from .families.layout import Layout
from .folders import StoredSlice, write_folder
from .json_files import read_json
from .safetensors import SafetensorsFile

STORED = {"float32": "F32", "float64": "F64"}
SCHEMA, WITHOUT_CHECKSUMS = "mpitp.checkpoint/2", "mpitp.checkpoint/1"      # of 0.2.0 and before
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
        What state.json holds beside the step, the checksums and the digest.
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
    Collective, no data; see folders.write_folder and checksums.checksums_of.
    """
    path = step_folder(os.path.abspath(folder), step)
    slices = stored_slices(files)
    state = sealed({**state, "schema": SCHEMA, "step": step, "checksums": checksums_of(group, slices)})
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


def set_aside(folder: str, step: int) -> list[str]:
    """Rename the folders of later steps, so that a run can go on from this one. Returns the new names."""
    names = []
    for later in steps(folder):
        if later > step:
            path, number = step_folder(folder, later), 1
            while os.path.lexists(f"{path}.set-aside-{number}"):
                number += 1
            os.rename(path, f"{path}.set-aside-{number}")
            names.append(os.path.basename(f"{path}.set-aside-{number}"))
    return names


# --- what can be trusted --------------------------------------------------------------------------------------------

class DamagedStep(InputError):
    """A step folder that does not hold what was saved; raised on every rank."""


def sealed(state: dict) -> dict:
    """Return a state with its own digest: SHA-256 of it as JSON, keys in order."""
    text = json.dumps(state, sort_keys=True)
    return {**state, "digest": hashlib.sha256(text.encode()).hexdigest()}


def read_state(group: TensorParallelGroup, folder: str, step: int) -> dict:
    """Return what state.json of a step folder holds. Collective.

    Raises DamagedStep where its schema, its step and the folder's name, or its digest do not agree.
    """
    try:
        return group.comm.bcast(group.on_root(lambda: checked_state(step_folder(folder, step), step)))
    except InputError as error:
        raise DamagedStep(str(error)) from None


def checked_state(folder: str, step: int | None = None) -> dict:
    """Read and check the state.json of a step folder, on one rank; step None: whatever its folder is named."""
    path = os.path.join(folder, "state.json")
    state = read_json(path)
    schema, digest = state.get("schema"), state.pop("digest", None)
    if schema not in (SCHEMA, WITHOUT_CHECKSUMS):
        raise InputError(f"{path}: found schema {str(schema)[:80]!r}, expected {SCHEMA!r} or {WITHOUT_CHECKSUMS!r}")
    if step is not None and state.get("step") != step:
        raise InputError(f"{path}: found step {str(state.get('step'))[:80]}, expected {step}, as the folder is named")
    if (schema == SCHEMA) != (digest is not None) or digest is not None and sealed(state)["digest"] != digest:
        raise InputError(f"{path}: found contents that do not fit their digest, expected what was saved")
    return state


def load(group: TensorParallelGroup, folder: str, step: int, files: Files, checksums: Checksums | None,
         world: TensorParallelGroup | None = None) -> None:
    """Fill the slices that a rank holds from a step folder, whatever number of ranks wrote it, and verify them.

    Parameters
    ----------
    group : TensorParallelGroup
    folder : str
    step : int
    files : {file name: {tensor name: (ParameterSpec, array)}}
        As save's. The arrays are written to, also where an error is raised.
    checksums : {file name: {tensor name: text}} or None
        What read_state returned under this key; None: the folder has none.
    world : TensorParallelGroup, optional
        All ranks that load, where several groups do, each a copy. None: the group.

    Raises
    ------
    DamagedStep
        On every rank, naming the first tensor that is not as it was saved: another name, shape or dtype, another
        checksum, a NaN or an infinity, a negative average of squares.

    Notes
    -----
    Collective: on_root, a verdict, and an allgather of 8 bytes a tensor; no data. Every number is read once, by each
    rank that holds it.
    """
    world = world or group
    try:
        opened = world.root_first(lambda: {file: open_file(os.path.join(step_folder(folder, step), file), tensors)
                                           for file, tensors in files.items()})
        require_everywhere(world.comm, f"whether {step_folder(folder, step)} could be read",
                           lambda: fill(group, opened, files))
        found = checksums_of(group, stored_slices(files)) if checksums is not None else None
        require_everywhere(world.comm, f"whether {step_folder(folder, step)} is whole",
                           lambda: verify(step_folder(folder, step), files, found, checksums))
    except InputError as error:
        raise DamagedStep(str(error)) from None


def fill(group: TensorParallelGroup, opened: Mapping[str, SafetensorsFile], files: Files) -> str:
    """Read this rank's slices into the arrays."""
    for file, stored in opened.items():
        for name, (spec, array) in files[file].items():
            array[...] = group.xp.asarray(stored[name][spec.window(group.place)])
    return "read"


def verify(path: str, files: Files, found: Checksums | None, expected: Checksums | None) -> str:
    """Raise InputError for the first tensor of a step folder that is not what an optimizer can have written."""
    for file, tensors in files.items():
        for name, (_, array) in tensors.items():
            where = f"{os.path.join(path, file)}: {name}"
            if found is not None and expected is not None:
                wanted = expected.get(file, {}).get(name)
                if found[file][name] != wanted:
                    raise InputError(f"{where}: found checksum {found[file][name]}, expected {wanted}")
            xp = module_of(array) or np
            if not bool(xp.isfinite(array).all()):
                raise InputError(f"{where}: found a NaN or an infinity, expected finite numbers")
            if name.startswith("exp_avg_sq.") and array.size and bool(array.min() < 0):
                raise InputError(f"{where}: found {float(array.min())}, expected averages of squares, from 0")
    return "whole"


def stored_slices(files: Files) -> dict[str, list[StoredSlice]]:
    """Return what write_folder and checksums_of take: each tensor stored as it is, under its own name."""
    return {file: [StoredSlice(spec, array, Layout(name, spec.shape), STORED[array.dtype.name])
                   for name, (spec, array) in tensors.items()] for file, tensors in files.items()}


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
