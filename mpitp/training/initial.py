"""A run that begins with a checkpoint folder: its weights, and what an export of the run will say."""
from __future__ import annotations

import json
import os
import shutil

from ..checkpoints.loading import read_slice
from ..checkpoints.model_folder import ModelFolder
from ..checkpoints.saving import companions_of, saved_form
from ..checkpoints.step_models import MODEL_FILES, StepCheckpoint, require_whole
from ..comm.agreement import require_everywhere
from ..errors import InputError
from .loop import Trainer


def description_of(folder: ModelFolder) -> dict | None:
    """Return the family and the config.json that state.json keeps; None of a step folder that has none either."""
    if folder.family is None:
        return None
    family, keys = saved_form(folder)
    return {"family": family.model_type, "config": keys}


def begin_with(trainer: Trainer, folder: ModelFolder) -> None:
    """Read the weights that a run begins with, each rank its slices. Collective, no data.

    A step folder is verified first. Raises InputError on every rank where any cannot read.
    """
    if isinstance(folder.checkpoint, StepCheckpoint):
        require_whole(trainer.group, folder.checkpoint, folder.specs)
    require_everywhere(trainer.world.comm, "whether the checkpoint could be read", lambda: read_all(trainer, folder))
    trainer.optimizer.round_weights()


def read_all(trainer: Trainer, folder: ModelFolder) -> str:
    """Read this rank's slices into the weights that the optimizer moves."""
    group = trainer.group
    try:
        for name, spec in trainer.model.specs.items():
            read_slice(folder.views[name], spec.window(group.place), trainer.optimizer.master[name], group.xp)
    except OSError as error:
        raise InputError(f"{folder.checkpoint.folder}: found {error.strerror}, expected to read it") from None
    return "read"


def keep_model_files(out: str, folder: ModelFolder, description: dict | None) -> None:
    """Copy what comes along with a model, such as its tokenizer, into the run's folder. Rank 0 alone."""
    if description is None:
        return
    kept = os.path.join(out, MODEL_FILES)
    try:
        os.makedirs(kept, exist_ok=True)
        with open(os.path.join(kept, "config.json"), "w", encoding="utf-8") as file:
            file.write(json.dumps(description["config"], indent=2) + "\n")
        for source in companions_of(folder.checkpoint.folder):
            shutil.copyfile(source, os.path.join(kept, os.path.basename(source)))
    except OSError as error:
        raise InputError(f"{kept}: found {error.strerror}, expected to write the model's other files there") from None
