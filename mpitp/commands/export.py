"""Write a trained run as a checkpoint folder that transformers loads, in the names and the layout of a family.

RUN/step-N is one step folder; RUN alone takes the newest one that is whole. Its checksums are verified first. A run
that began with a checkpoint (train --model) knows its family; any other one becomes what --family says, if that family
can have such a model. Each rank reads and writes its slices only; the number of ranks does not change the bytes.
"""
from __future__ import annotations

import argparse
import os
import sys
from math import prod

from .. import tables
from ..checkpoints.byte_vocabulary import documents
from ..checkpoints.families import MODULES, config_json, family_named
from ..checkpoints.families.family import Family
from ..checkpoints.loading import LoadedDecoder, open_on_all
from ..checkpoints.saving import STORED_AS, companions_of, require_new, saved_as, saved_form, write_model
from ..checkpoints.step_models import StepCheckpoint, byte_vocabulary, is_step_folder
from ..checkpoints.steps import step_folder, steps
from ..comm.group import TensorParallelGroup
from ..config import DecoderConfig
from ..errors import InputError, printable, require
from . import text

WIDE = {"F64": "float64"}           # what a model is loaded in, by how it is stored; float32 otherwise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN", help="a step folder of train, or the folder of the run")
    parser.add_argument("target", metavar="DIR", help="the folder to make; an empty one may be there")
    parser.add_argument("--family", metavar="NAME", help="a model_type, such as llama (that of the checkpoint that the "
                        "run began with)")
    parser.add_argument("--dtype", choices=tuple(STORED_AS), help="to store (as the run's)")


def run(arguments: argparse.Namespace) -> int:
    """Run the command on this rank; return 0."""
    text.print_any_character()
    with TensorParallelGroup() as group:
        group.on_root(lambda: require_new(os.path.abspath(arguments.target)))
        model = load_run(group, arguments.source)
        family, keys, companions, more = group.comm.bcast(group.on_root(lambda: form_of(model, arguments.family)))
        target = family_named(family)
        write_model(model, arguments.target, target, keys, arguments.dtype, companions=companions, documents=more)
        if group.rank == 0:
            count = sum(prod(spec.shape) for spec in model.specs.values())
            print(f"{printable(model.folder.checkpoint.folder)} as {family}: {count:,} parameters, "
                  f"{arguments.dtype or model.dtype}, in {printable(arguments.target)}")
            print(f"  {about_text(model, companions, more)}", flush=True)
    return 0


# --- what is exported -----------------------------------------------------------------------------------------------

def load_run(group: TensorParallelGroup, source: str) -> LoadedDecoder:
    """Load a step folder, or the newest one of a run that is whole, in the dtype that it is stored in. Collective.

    Raises InputError on every rank where there is none. A damaged one of a run is a note on standard error.
    """
    if group.comm.bcast(group.on_root(lambda: is_step_folder(source))):
        return load_step(group, source)
    first: InputError | None = None
    for step in reversed(group.comm.bcast(group.on_root(lambda: steps_of(source)))):
        try:
            return load_step(group, step_folder(source, step))
        except InputError as damage:
            first = first or damage
            if group.rank == 0:
                print(f"mpitp: note: {printable(str(damage))}: expected a whole one, an older one is taken",
                      file=sys.stderr, flush=True)
    assert first is not None, "steps_of() found one"
    raise InputError(f"{first}; no other step folder of {source} is whole")


def steps_of(run_folder: str) -> list[int]:
    """Return the steps of a run's folders, in order. Raises InputError where there is none."""
    found = steps(run_folder) if os.path.isdir(run_folder) else []
    require(found, f"no step folder in {run_folder}", "a step folder of train, or the folder of a run")
    return found


def load_step(group: TensorParallelGroup, folder: str) -> LoadedDecoder:
    """Load and verify a step folder. Collective."""
    opened = open_on_all(group, folder)
    stored = {view.dtype for view in opened.views.values()}
    return LoadedDecoder(group, opened, max(WIDE.get(dtype, "float32") for dtype in stored))


# --- how it is written ----------------------------------------------------------------------------------------------

Form = tuple[str, dict, list[str], dict[str, str]]


def form_of(model: LoadedDecoder, named: str | None) -> Form:
    """Return what a model is exported as: its family, config.json, companions, more documents. Rank 0 alone.

    Raises InputError, naming the families that can, where none is named or the named one cannot have this model.
    """
    folder, config = model.folder, model.config
    if folder.family is not None and named in (None, folder.family.model_type):
        family, keys = saved_form(folder)
        return family.model_type, keys, companions_of(folder.checkpoint.folder), {}
    if named is None:
        raise InputError(f"found no --family, expected one of {', '.join(that_can_say(config))}, which can have this "
                         f"model")
    family = saved_as(family_named(named))
    keys = config_of(config, family)
    size = byte_vocabulary(folder.checkpoint.folder)
    more = {} if size is None else documents(size)
    if folder.family is not None:               # other names, the same tokens
        return family.model_type, keys, companions_of(folder.checkpoint.folder), more
    assert isinstance(folder.checkpoint, StepCheckpoint), "load_run() opens nothing else"
    if config.position_embedding != "learned" and not any(turns and turns.longest for turns in config.rotaries):
        keys["max_position_embeddings"] = folder.checkpoint.state.get("seq_length")
    # No token ends a text of a run's own, whatever the family's tokenizer would have there.
    return family.model_type, {**keys, "bos_token_id": None, "eos_token_id": None}, [], more


def config_of(config: DecoderConfig, family: Family) -> dict:
    """Return config.json. Raises InputError, naming the families that can, where the family cannot have this model."""
    try:
        return config_json(config, family)
    except InputError as error:
        raise InputError(f"--family {family.model_type}: {error}; {', '.join(that_can_say(config)) or 'no family'} "
                         f"can") from None


def that_can_say(config: DecoderConfig) -> list[str]:
    """Return the families that can have a model of this config."""
    found = []
    for model_type in MODULES:
        family = family_named(model_type)
        try:
            config_json(config, family)
        except InputError:
            continue
        if not family.saved_as:
            found.append(model_type)
    return found


def about_text(model: LoadedDecoder, companions: list[str], more: dict[str, str]) -> str:
    """Return a line about the tokenizer, for people."""
    files = [*more, *map(os.path.basename, companions)]
    if files:
        return f"{tables.count(len(files), 'file')} beside it: {', '.join(sorted(files))}"
    return "no tokenizer: the run was trained on token ids" if byte_vocabulary(model.folder.checkpoint.folder) is None \
        else f"no tokenizer: one of bytes has 256 tokens, the model {model.config.vocab_size}"
