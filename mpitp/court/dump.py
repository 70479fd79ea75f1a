"""Read a dump: run.json and the files of each phase and rank, all of it checked before a tensor is allocated."""
from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from ..arrays import Array
from ..attention_config import Rotary
from ..checkpoints.json_files import read_json
from ..checkpoints.safetensors import SafetensorsFile
from ..config import DecoderConfig
from ..errors import InputError, is_integer, one_of, require
from .layouts import Layout, make_layout

SCHEMA = "mpitp.dump/1"
PHASES = ("reference", "weights", "forward", "backward", "previous")
KINDS = ("column_linear", "row_linear", "mlp", "attention", "norm", "embedding", "loss", "block", "decoder",
         "gradient_norm")
OPTIONS = {"label_smoothing": 0.0, "ignore_index": -100, "loss_scale": 1.0, "layer": 0, "compute_dtype": None}
# Spacing of the numbers after 1.
EPS = {"F64": 2.0 ** -52, "F32": 2.0 ** -23, "F16": 2.0 ** -10, "BF16": 2.0 ** -7}
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
ALIASES = {"dx": "x", "dy": "y"}
MOST_RANKS, MOST_LAYERS, MOST_SIZE = 4096, 4096, 2 ** 31
MOST_OF_RUN = 2 ** 24
MOST_BYTES = 2 ** 33            # of one dump, so that its float64 copies fit a machine


@dataclass(eq=False)
class Tensor:
    """A Tensor is one of a dump: what each rank holds, and how that makes up the whole.

    Parameters
    ----------
    phase, name : str
    dtype : str
        By its name in the files; the coarsest where ranks differ.
    layout : Layout
    local : list of array
        Of each rank, 16-bit floats as float32.
    """
    phase: str
    name: str
    dtype: str
    layout: Layout
    local: list[Array]

    @property
    def title(self) -> str:
        """Return its name in a report: "y", "dy", "d up.weight"."""
        return title(self.phase, self.name)

    def whole(self) -> Array:
        """Return the whole tensor; floats as float64."""
        whole = self.layout.assemble(self.local)
        return whole.astype(np.float64) if whole.dtype.kind == "f" else whole


def title(phase: str, name: str) -> str:
    """Return what a report calls a tensor."""
    if phase != "backward":
        return f"{name} of the step before" if phase == "previous" else name
    return f"d{name}" if name in ("x", "y") else f"d {name}"


@dataclass(eq=False)
class Dump:
    """All that a run wrote down.

    Parameters
    ----------
    ranks : int
    kind : str
    config : dict
        As it was given.
    options : dict
        With the defaults of what was not given.
    accumulate : str
    tensors : dict
        {(phase, name): Tensor}, in the order of the dump.
    """
    ranks: int
    kind: str
    config: dict[str, Any]
    options: dict[str, Any]
    accumulate: str
    tensors: dict[tuple[str, str], Tensor]

    def of_phase(self, phase: str) -> dict[str, Tensor]:
        """Return {name: Tensor} of one phase."""
        return {name: tensor for (of, name), tensor in self.tensors.items() if of == phase}


# --- run.json ----------------------------------------------------------------------------------------------------

def read_dump(folder: str | os.PathLike) -> Dump:
    """Read the dump in a folder.

    Parameters
    ----------
    folder : path

    Returns
    -------
    Dump

    Raises
    ------
    InputError
        One line, for all that is missing, damaged, or does not fit together.
    """
    folder = os.fspath(folder)
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: found no such folder, expected a dump with its run.json")
    path = os.path.join(folder, "run.json")
    if not os.path.isfile(path) or os.path.getsize(path) > MOST_OF_RUN:
        raise InputError(f"{path}: found no such file of at most {MOST_OF_RUN} bytes, expected what Recorder writes")
    run = read_json(path)
    require(run.get("schema") == SCHEMA, f"schema {run.get('schema')!r:.60} in run.json", repr(SCHEMA))
    ranks: Any = run.get("ranks")
    require(is_integer(ranks) and 1 <= ranks <= MOST_RANKS, f"ranks {ranks!r:.60} in run.json",
            f"a number from 1 to {MOST_RANKS}")
    one_of("kind", run.get("kind", ""), KINDS)
    grid = run.get("grid", {"tensor": ranks})
    require(isinstance(grid, dict) and grid and all(is_integer(n) and 0 < n <= ranks for n in grid.values())
            and len(grid) < 9 and prod(grid.values()) == ranks, f"grid {grid!r:.60} in run.json",
            f"sizes whose product is {ranks}, the ranks")
    accumulate = run.get("accumulate", "float32")
    one_of("accumulate", accumulate, tuple(DTYPES))
    config, layouts = run.get("config", {}), run.get("tensors")      # type: Any, Any
    require(isinstance(config, dict), "a config in run.json that is not an object", "an object")
    require(isinstance(layouts, dict) and layouts and all(isinstance(of, dict) for of in layouts.values()),
            "no tensors by phases in run.json", "{phase: {name: layout}}")
    for phase in layouts:
        one_of("phase", phase, PHASES)
    tensors = read_tensors(folder, ranks, layouts)
    return Dump(ranks, run["kind"], config, checked_options(run.get("options", {})), accumulate, tensors)


def checked_options(given: Any) -> dict[str, Any]:
    """Return the options with their defaults. Raises InputError for one that is not known or has no sense."""
    require(isinstance(given, dict), "options in run.json that are not an object", "an object")
    for name in given:
        one_of("option", name, tuple(OPTIONS))
    options = {**OPTIONS, **given}
    smoothing, scale, layer = options["label_smoothing"], options["loss_scale"], options["layer"]
    require(is_number(smoothing) and 0 <= smoothing <= 1, f"label_smoothing {smoothing!r:.60}", "a number from 0 to 1")
    require(is_number(scale) and scale > 0, f"loss_scale {scale!r:.60}", "a number above 0")
    require(is_integer(options["ignore_index"]), f"ignore_index {options['ignore_index']!r:.60}", "an integer")
    require(is_integer(layer) and 0 <= layer < MOST_LAYERS, f"layer {layer!r:.60}", f"a number below {MOST_LAYERS}")
    if options["compute_dtype"] is not None:
        one_of("compute_dtype", options["compute_dtype"], tuple(DTYPES))
    return options


def is_number(value: Any) -> bool:
    """Return whether value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


# --- the files ---------------------------------------------------------------------------------------------------

def read_tensors(folder: str, ranks: int, layouts: dict[str, dict[str, Any]]) -> dict[tuple[str, str], Tensor]:
    """Open the files of all phases and ranks, check names, dtypes and sizes, then read."""
    files: dict[str, list[SafetensorsFile]] = {}
    for phase, of_phase in layouts.items():
        for name in of_phase:
            require(name.isprintable() and len(name) <= 200, f"a tensor named {name!r:.60}", "printable names")
        count = 1 if phase == "reference" else ranks
        files[phase] = []
        for rank in range(count if of_phase else 0):
            path = os.path.join(folder, f"{phase}-{rank}.safetensors")
            if not os.path.isfile(path):
                raise InputError(f"{folder}: found no {phase}-{rank}.safetensors, expected one of each of {count} "
                                 f"rank{'s' if count > 1 else ''}")
            files[phase].append(SafetensorsFile(path))
            require_names(path, files[phase][-1], of_phase)
    total = sum(os.path.getsize(file.path) for of_phase in files.values() for file in of_phase)
    require(total <= MOST_BYTES, f"a dump of {total} bytes", f"at most {MOST_BYTES}: a smaller layer shows the same")
    tensors = {}
    for phase, of_phase in layouts.items():
        for name, entry in of_phase.items():
            known = ALIASES.get(name, name) if phase == "backward" else name
            require((phase, known) not in tensors, f"{known} twice in the {phase} phase", "every name once")
            tensors[phase, known] = read_tensor(phase, name, entry, files[phase])
            tensors[phase, known].name = known
    return tensors


def require_names(path: str, file: SafetensorsFile, of_phase: dict[str, Any]) -> None:
    """Raise InputError unless a file has the tensors of run.json and no other."""
    for name in of_phase.keys() - file.tensors.keys():
        raise InputError(f"{path}: found no tensor {name!r}, expected it, as run.json has it")
    for name in file.tensors.keys() - of_phase.keys():
        raise InputError(f"{path}: found a tensor {name!r:.100} that run.json does not have, expected its layout there")


def read_tensor(phase: str, name: str, entry: Any, files: list[SafetensorsFile]) -> Tensor:
    """Check a tensor's layout against its shapes, and read what each rank has of it."""
    where = f"{phase} {name}"
    dtypes = [file.tensors[name][0] for file in files]
    for rank, dtype in enumerate(dtypes):
        if dtype != dtypes[0]:
            raise InputError(f"{where}: found dtype {dtype} on rank {rank}, expected {dtypes[0]} as on rank 0")
    shapes = [tuple(file.tensors[name][1]) for file in files]
    if phase == "forward" and name in ("loss", "norm") and set(shapes) == {(1,)}:
        shapes = [()] * len(shapes)                             # one number
    layout = make_layout(where, entry, shapes)
    integer = dtypes[0] not in EPS
    wanted = name in ("ids", "targets", "mask")
    if integer != wanted:
        raise InputError(f"{where}: found dtype {dtypes[0]}, expected "
                         f"{'integers' if wanted else 'one of ' + ', '.join(EPS)}")
    return Tensor(phase, name, dtypes[0], layout, [file[name][()].reshape(shape) for file, shape in zip(files, shapes)])


# --- the configuration -------------------------------------------------------------------------------------------

def decoder_config(given: dict[str, Any], **derived: Any) -> DecoderConfig:
    """Make a DecoderConfig of what a dump says, and of what its tensors say where it does not.

    Parameters
    ----------
    given : dict
        Out of run.json.
    **derived
        Sizes that the shapes of the tensors have.

    Raises
    ------
    InputError
        A key that DecoderConfig does not have, and a choice that it does not know.
    """
    known = {field.name for field in dataclasses.fields(DecoderConfig)}
    for name, value in given.items():
        require(name in known, f"config key {name!r:.60}", "one of mpitp.DecoderConfig, which the dense side knows")
        require(not is_integer(value) or abs(value) < MOST_SIZE, f"config {name} = {value!r:.60}", f"below {MOST_SIZE}")
    settings = {**derived, **given}
    layers: Any = settings.get("num_layers")
    require(is_integer(layers) and 0 < layers <= MOST_LAYERS, f"num_layers {layers!r:.60}", f"1 to {MOST_LAYERS}")
    rotary = settings.get("rotary")
    if isinstance(rotary, dict):
        settings["rotary"] = make_rotary(rotary)
    elif isinstance(rotary, list):
        settings["rotary"] = tuple(make_rotary(one) for one in rotary)
    for name in ("sliding_window",):
        if isinstance(settings.get(name), list):
            settings[name] = tuple(settings[name])
    try:
        return DecoderConfig(**settings)
    except (TypeError, ArithmeticError) as error:
        raise InputError(f"found a config that is none ({error}), expected that of mpitp.DecoderConfig") from None


def make_rotary(given: Any) -> Rotary:
    """Make a Rotary of an object in run.json."""
    known = {field.name for field in dataclasses.fields(Rotary)}
    require(isinstance(given, dict) and given.keys() <= known, f"rotary {given!r:.80}",
            f"an object with some of {', '.join(sorted(known))}")
    try:
        return Rotary(**given)
    except TypeError as error:
        raise InputError(f"found rotary {given!r:.80} ({error}), expected that of mpitp.Rotary") from None
