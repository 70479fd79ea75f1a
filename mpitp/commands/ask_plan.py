"""What the commands ask the plan before they load or make anything: is there the memory?

A model that cannot be planned (a damaged folder, more positions than it has learned) is refused where it is loaded.
"""
from __future__ import annotations

import argparse
from typing import Any

from ..checkpoints.config_file import read_config
from ..checkpoints.room import require_room
from ..comm.group import TensorParallelGroup
from ..config import DecoderConfig
from ..errors import InputError
from ..plan.job import Job
from ..training.settings import Settings
from .prompts import Prompts

BYTES_OF_A_TOKEN = 8        # of text, more than there are: nothing is refused for a prompt that is shorter


def generation(group: TensorParallelGroup, arguments: argparse.Namespace, given: Prompts | None) -> None:
    """Refuse a generation for which there is no memory. Collective.

    given : on rank 0 the prompts, as texts or ids, or none where they are typed; None elsewhere
    """
    ids, texts = (given.ids or [], given.texts or []) if given else ([], [])
    lengths = [len(prompt) for prompt in ids] + [len(text.encode()) // BYTES_OF_A_TOKEN for text in texts]
    batch, longest = group.comm.bcast((max(1, len(lengths)), max([1, *lengths])))
    ask(group, arguments, "decode", batch, longest, arguments.max_new_tokens)


def scoring(group: TensorParallelGroup, arguments: argparse.Namespace, given: Any, window: int) -> None:
    """Refuse to score a text for which there is no memory. Collective.

    given : on rank 0 what is scored, with its ids or its content; None elsewhere
    window : tokens seen at once, where --window does not say it
    """
    length = 0
    if given is not None:
        length = len((given.content or "").encode()) // BYTES_OF_A_TOKEN if given.ids is None else len(given.ids)
    ask(group, arguments, "score", 1, max(1, min(arguments.window or window, group.comm.bcast(length))))


def ask(group: TensorParallelGroup, arguments: argparse.Namespace, kind: str, batch: int, tokens: int,
        new_tokens: int = 1) -> None:
    """Ask about the model of --model; rank 0 reads its config.json for all. Collective."""
    job = None
    if group.rank == 0:
        try:
            job = Job(read_config(arguments.model), kind, batch, tokens, new_tokens,
                      dtype=arguments.dtype or "float32", weights=getattr(arguments, "weights", "float32"),
                      device=group.device)
        except InputError:
            job = None
    job = group.comm.bcast(job)
    if job is not None:
        require_room(group, arguments.model, job)


def training(ranks: Any, arguments: argparse.Namespace, config: DecoderConfig, settings: Settings) -> None:
    """Refuse a training for which there is no memory. Collective.

    ranks : a TensorParallelGroup, or a Grid of them
    """
    world, tensor = getattr(ranks, "world", ranks), getattr(ranks, "tensor", ranks)
    try:
        job = Job(config, "train", settings.micro_batch_size, arguments.seq_length,
                  accumulation=settings.gradient_accumulation, unit=settings.reproducible_unit, dtype=arguments.dtype,
                  sequence_parallel=settings.sequence_parallel, gather_again=settings.gather_again,
                  recompute=settings.recompute, device=world.device)
    except InputError:                          # on every rank: what is wrong is refused where it is made
        return
    require_room(world, "the model", job, tensor)
