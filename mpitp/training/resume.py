"""A run goes on from a step folder, on any number of ranks: the same model, settings and data, and nothing damaged."""
from __future__ import annotations

import json
import sys
from dataclasses import MISSING, asdict, dataclass, fields

from ..checkpoints import steps as step_folders
from ..checkpoints.steps import DamagedStep
from ..config import DecoderConfig
from ..errors import InputError, require
from .log import cut_log, read_log
from .loop import Trainer
from .optimizer import learning_rate
from .settings import MICRO_BATCH, UNITS, Settings

COMPARED = ("config", "unit", "settings", "data", "seq_length", "dtype", "blocks", "model")
SCHEDULE = ("train_iters", "lr_decay_iters", "warmup")      # these may differ where no step that was taken would


@dataclass
class Found:
    """What lies in the folder of a run: the steps of its folders, and what was removed of unfinished ones."""
    steps: list[int]
    left: list[str]


def resume(trainer: Trainer, step: int | None = None, auto: bool = False) -> bool:
    """Continue a run from a step folder, whatever number of ranks wrote it.

    Parameters
    ----------
    trainer : Trainer
        Its folder is the run's.
    step : int, optional
        Of the folder; None: the newest one. Folders of later steps are set aside under other names.
    auto : bool, optional
        Whether a run that has not saved yet begins, and one at its end is no error.

    Returns
    -------
    bool
        Whether there are steps left to take.

    Raises
    ------
    InputError
        On every rank: where there is no such folder; where it belongs to another run; where it is damaged, with the
        newest one that is whole. The trainer's weights can be anything then.

    Notes
    -----
    Collective, no data: see steps.read_state and steps.load.
    """
    group, folder = trainer.world, trainer.folder
    if not folder:
        raise InputError("found no folder, expected the one to resume from")
    found = group.comm.bcast(group.on_root(lambda: find(folder)))
    removed = f" (removed the unfinished {', '.join(found.left)})" if found.left else ""
    if auto and not found.steps:
        group.on_root(lambda: cut_log(folder, 0))
        return True
    require(found.steps, f"no step folder in {folder}{removed}", "one to resume from")
    step = found.steps[-1] if step is None else step
    require(step in found.steps, f"no folder of step {step} in {folder}",
            f"one of {', '.join(map(str, found.steps[-8:]))}")
    try:
        state, said = read(trainer, folder, step)
        if auto and step >= trainer.settings.train_iters:
            if group.rank == 0:
                trainer.say(f"nothing left to do: {folder} has step {step} of {trainer.settings.train_iters}")
            return False
        said += load(trainer, folder, step, state)
    except DamagedStep as damage:
        older = [other for other in found.steps if other < step]
        raise InputError(f"{damage}; {offer(trainer, folder, older)}") from None
    aside, log = group.comm.bcast(group.on_root(lambda: settle(folder, step)))
    trainer.optimizer.round_weights()
    trainer.step = step
    trainer.spikes.replay(log)
    if group.rank == 0:
        said += [f"removed {', '.join(found.left)}"] if found.left else []
        said += [f"set aside {', '.join(aside)}"] if aside else []
        trainer.say("; ".join([f"resumed from {folder}, step {step}", *said]))
    return True


def find(folder: str) -> Found:
    """Return what lies in the folder of a run, after the unfinished folders are removed; rank 0 alone."""
    left = step_folders.clean(folder)
    return Found(step_folders.steps(folder), left)


def read(trainer: Trainer, folder: str, step: int) -> tuple[dict, list[str]]:
    """Return the state of a step folder, and in words what differs in it and may. Collective.

    Raises DamagedStep where the state is damaged, another InputError where it is another run's.
    """
    state = step_folders.read_state(trainer.world, folder, step)
    return state, require_same_run(folder, state, trainer.state())


def load(trainer: Trainer, folder: str, step: int, state: dict) -> list[str]:
    """Fill the trainer's arrays from a step folder, and verify them. Returns what was verified, in words. Collective.

    Raises DamagedStep where the folder is damaged, another InputError where there is no step left to take.
    """
    steps = trainer.settings.train_iters
    require(step < steps, f"step {step} in {folder}", f"a run that is not at its end, --train-iters {steps}")
    step_folders.load(trainer.group, folder, step, trainer.files(), state.get("checksums"), trainer.world)
    if "checksums" in state:
        return [f"{sum(map(len, state['checksums'].values()))} tensors verified"]
    if trainer.world.rank == 0:
        print(f"mpitp: note: {step_folders.step_folder(folder, step)}: found no checksums, as mpitp 0.2.0 and older "
              f"wrote it, expected them: not verified", file=sys.stderr, flush=True)
    return []


def offer(trainer: Trainer, folder: str, steps: list[int]) -> str:
    """Return which is the newest of these step folders that is whole, for a message. Collective; reads them."""
    for step in reversed(steps):
        try:
            load(trainer, folder, step, read(trainer, folder, step)[0])
        except InputError:
            continue
        path = step_folders.step_folder(folder, step)
        return f"the newest folder that is whole: --resume-from {path}"
    return "no older step folder is whole"


def settle(folder: str, step: int) -> tuple[list[str], list[dict]]:
    """Put away what lies beyond a step: later folders, lines of the log. Returns the folders' names and the log."""
    aside = step_folders.set_aside(folder, step)
    cut_log(folder, step)
    return aside, read_log(folder)


# --- the same run ---------------------------------------------------------------------------------------------------

def require_same_run(folder: str, state: dict, mine: dict) -> list[str]:
    """Raise InputError unless a state is that of the same run. Returns what differs and may, in words."""
    said = []
    for key, kind in (("config", DecoderConfig), ("settings", Settings)):       # fields that are younger than the state
        if isinstance(state.get(key), dict):
            state[key] = {**defaults(kind, mine[key]), **state[key]}
    state.setdefault("unit", older_unit(state))
    for key in COMPARED:
        if state.get(key) == mine.get(key):
            continue
        if key == "settings" and is_prolonged(state[key], mine[key], state["step"]):
            said.append(f"train_iters {state[key]['train_iters']} -> {mine[key]['train_iters']}, the learning rates "
                        f"of the steps taken being the same")
            continue
        differs = difference(key, state.get(key), mine.get(key))
        raise InputError(f"{folder}: found {differs}: a run is resumed with what it began with{hint(key, state, mine)}")
    return said


def older_unit(state: dict) -> str | None:
    """Return the unit of a reproducible run of mpitp 0.2.0 or older, which added micro-batches one after the other.

    For up to three of them the tree does the same additions.
    """
    if state.get("blocks") is None:
        return None
    settings = state.get("settings")
    few = isinstance(settings, dict) and settings.get("gradient_accumulation") in (1, 2, 3)
    return MICRO_BATCH if few else f"{MICRO_BATCH} of mpitp 0.2.0, more than 3 in a row"


def defaults(kind: type, mine: dict) -> dict:
    """Return the defaults of the fields of a dataclass that a state of this version has."""
    found = {}
    for field in fields(kind):
        if field.name in mine and field.default is not MISSING:
            found[field.name] = field.default
    return json.loads(json.dumps(found, default=asdict))


def is_prolonged(found: object, mine: dict, step: int) -> bool:
    """Return whether settings differ in nothing but the run's length, and every step taken had the same rate."""
    if not isinstance(found, dict) or any(found.get(name) != mine[name] for name in mine if name not in SCHEDULE):
        return False
    try:
        before, after = Settings(**found).schedule(), Settings(**mine).schedule()
        return all(learning_rate(i, *before) == learning_rate(i, *after) for i in range(step))
    except (TypeError, InputError):             # a key or a value that is none of this version's
        return False


def hint(key: str, state: dict, mine: dict) -> str:
    """Return what lets a run go on as it began; or become longer, where it is at its end or on its way there."""
    if key == "unit" and state["unit"] is None:
        return " (without --reproducible)"
    if key == "unit" and state["unit"] in UNITS:
        return f" (--reproducible-unit {state['unit']})" if mine["unit"] else " (--reproducible)"
    if key != "settings":
        return ""
    found, now = state["settings"], mine["settings"]
    if not isinstance(found, dict) or found.get("train_iters") == now["train_iters"]:
        return ""
    steps = found.get("lr_decay_iters") or found.get("train_iters")
    return f" (a longer run has the same learning rates so far with --lr-decay-iters {steps} --lr-warmup-iters " \
           f"{found.get('warmup')})"


def difference(key: str, found: object, expected: object) -> str:
    """Return the first thing that two parts of a state differ in, for a message."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                return difference(name, found.get(name), expected.get(name))
    return f"{key} = {found!s:.200}, expected {expected!s:.200}"
