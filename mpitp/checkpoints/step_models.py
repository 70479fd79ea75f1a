"""A step folder of a training run as a model: recognised by its own files, read by the names that its tensors have.

Where the run began with a checkpoint folder (train --model), state.json also says that folder's family and config.json,
and the files that come along with a model, such as its tokenizer, lie once in the run's folder.
"""
from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..arrays import Array
from ..attention_config import Rotary
from ..comm.group import TensorParallelGroup
from ..config import DecoderConfig
from ..errors import InputError, is_integer, require
from ..sharding.parameters import ParameterSpec
from .byte_vocabulary import BYTES
from .checksums import checksums_of
from .families import described, family_named
from .families.family import Family
from .families.keys import Keys
from .families.layout import Layout
from .folders import StoredSlice
from .safetensors import Checkpoint, SafetensorsFile, StoredTensor
from .steps import DamagedStep, checked_state, step_folder, steps

WEIGHTS = "model.safetensors"
MOST_LAYERS = 1 << 12               # of a config that is read without its weights
MODEL_FILES = "model-files"         # in the folder of a run: what came along with the model that it began with


def is_step_folder(folder: str | os.PathLike) -> bool:
    """Return whether a folder is one of a step, by its own files."""
    found = [os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "config.json")]
    return found == [True, False]


def open_checkpoint(folder: str | os.PathLike) -> Checkpoint:
    """Open a checkpoint of the hub's kind, or a step folder. Raises InputError for the folder of a whole run."""
    if is_step_folder(folder):
        return StepCheckpoint(folder)
    require_no_run(os.fspath(folder))
    return Checkpoint(folder)


def require_no_run(folder: str) -> None:
    """Raise InputError for the folder of a training run, which has several models."""
    if os.path.isdir(folder) and not os.path.isfile(os.path.join(folder, "config.json")) and steps(folder):
        raise InputError(f"{folder}: found the folder of a training run, expected one of its step folders, such as "
                         f"{step_folder(folder, steps(folder)[-1])}")


class StepCheckpoint(Checkpoint):
    """A StepCheckpoint is a step folder. Opening reads headers only, and checks the digest of its state.

    config : the config.json of the checkpoint that the run began with, {} where it began with random weights
    state : what state.json holds
    """
    document = "state.json"

    def __init__(self, folder: str | os.PathLike):      # not as Checkpoint's: there is no config.json
        self.folder = os.fspath(folder)
        self.state = checked_state(self.folder)
        file = SafetensorsFile(os.path.join(self.folder, WEIGHTS))
        self.files, self.where = {WEIGHTS: file}, dict.fromkeys(file.tensors, WEIGHTS)
        self.began_with = self.state.get("model") or {"family": None, "config": {}}
        good = isinstance(self.began_with, dict) and isinstance(self.began_with.get("config"), dict)
        require(good, f"model = {self.began_with!r:.80} in {self.folder}", "a family and a config.json")
        self.config = self.began_with["config"]

    @property
    def kind(self) -> str:
        """What the checkpoint is, for people: "step 200", or "gemma3_text step 200"."""
        return f"{self.began_with.get('family') or ''} step {self.state.get('step')}".strip()

    def family(self) -> Family | None:
        """Return the family of the checkpoint that the run began with, None for random weights."""
        name = self.began_with.get("family")
        return None if name is None else family_named(name)

    def decoder_config(self) -> DecoderConfig:
        """Return the DecoderConfig. Raises InputError where there is none, or where config.json contradicts it."""
        where = os.path.join(self.folder, self.document)
        config, family = config_of(self.state.get("config"), len(self.where), where), self.family()
        if family is not None and described(family.config(Keys(self.config))) != described(config):
            raise InputError(f"{where}: found another config than the config.json of model_type {family.model_type} "
                             f"in it, expected the same")
        return config


def config_of(values: Any, most_layers: int, where: str) -> DecoderConfig:
    """Return the DecoderConfig that JSON has as an object. Raises InputError in the name of the file where it is none.

    most_layers : more than the weights can belong to, so that a hostile number costs nothing
    """
    expected = f"{where}: found no config of a decoder, expected one"
    if not isinstance(values, dict):
        raise InputError(expected)
    layers: Any = values.get("num_layers")
    if not is_integer(layers) or not 0 < layers <= most_layers:
        raise InputError(f"{where}: found num_layers = {layers!r:.80}, expected 1 to {most_layers}")
    for field in fields(DecoderConfig):
        if isinstance(field.default, bool) and not isinstance(values.get(field.name, False), bool):
            raise InputError(f"{where}: found {field.name} = {values[field.name]!r:.80}, expected true or false")
    rotary, window = values.get("rotary"), values.get("sliding_window")
    try:
        return DecoderConfig(**{
            **values, "sliding_window": tuple(window) if isinstance(window, list) else window,
            "rotary": tuple(map(rotary_of, rotary)) if isinstance(rotary, list) else rotary_of(rotary)})
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except (AttributeError, TypeError, ValueError):     # a key that is no field, a text in place of a number
        raise InputError(expected) from None


def rotary_of(values: dict[str, Any] | None) -> Rotary | None:
    """Return the Rotary that JSON has as an object, None for null."""
    if values is None:
        return None
    said: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Rotary(**said)


def byte_vocabulary(folder: str) -> int | None:
    """Return the size of the vocabulary of a step folder's model whose tokens are bytes; None for any other folder.

    Folders of mpitp 0.2.0 and before do not say it: of a vocabulary of 256 tokens they are.
    """
    if not is_step_folder(folder):
        require_no_run(folder)
        return None
    state = checked_state(folder)
    size = config_of(state.get("config"), MOST_LAYERS, os.path.join(folder, "state.json")).vocab_size
    assumed = "bytes" if size == BYTES and not state.get("model") else "ids"
    return size if state.get("vocabulary", assumed) == "bytes" else None


def model_files(folder: str) -> str:
    """Return the folder where the files that come along with a model are: the model's own, or of the step's run."""
    return os.path.join(os.path.dirname(os.path.abspath(folder)), MODEL_FILES) if is_step_folder(folder) else folder


# --- is it whole? ---------------------------------------------------------------------------------------------------

class OnDisk:
    """A rank's slice of a stored tensor, read when it is indexed."""

    def __init__(self, tensor: StoredTensor, window: tuple):
        self.tensor, self.window = tensor, window

    def __getitem__(self, part: Any) -> Array:
        return self.tensor[self.window][part]


def require_whole(group: TensorParallelGroup, checkpoint: StepCheckpoint, specs: Mapping[str, ParameterSpec]) -> None:
    """Raise DamagedStep on every rank unless the weights are those that were saved, by their checksums.

    Collective: an allgather of 8 bytes a tensor; each number is read once more, by the rank that owns it. Folders of
    0.2.0 and before have no checksums: a note on standard error.
    """
    path, expected = os.path.join(checkpoint.folder, WEIGHTS), checkpoint.state.get("checksums")
    if expected is None:
        if group.rank == 0:
            print(f"mpitp: note: {checkpoint.folder}: found no checksums, as mpitp 0.2.0 and older wrote it, expected "
                  f"them: not verified", file=sys.stderr, flush=True)
        return
    stored = SafetensorsFile(path)              # another one, so that what loading reads is counted alone
    slices: Any = [StoredSlice(spec, OnDisk(stored[name], spec.window(group.place)),    # type: ignore[arg-type]
                               Layout(name, spec.shape), stored[name].dtype) for name, spec in specs.items()]
    wanted: Any = expected.get(WEIGHTS) if isinstance(expected, dict) else None
    require(isinstance(wanted, dict), f"no checksums of {WEIGHTS} in {checkpoint.folder}", "one for each tensor")
    found = checksums_of(group, {WEIGHTS: slices})[WEIGHTS]
    for name in specs:
        if found[name] != wanted.get(name):
            raise DamagedStep(f"{path}: {name}: found checksum {found[name]}, expected {wanted.get(name)}")
