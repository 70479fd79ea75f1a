"""`train --model`: a run that begins with a checkpoint folder has its config, its weights, and its tokens."""
from __future__ import annotations

import argparse
import os
from dataclasses import replace

import numpy as np

from ..checkpoints.loading import open_on_all
from ..checkpoints.model_folder import ModelFolder
from ..checkpoints.step_models import byte_vocabulary, model_files
from ..comm.group import TensorParallelGroup
from ..config import DecoderConfig
from ..errors import InputError, require
from ..training.data import Tokens, holds_ids, standard_library
from ..training.initial import begin_with, description_of, keep_model_files
from ..training.loop import Trainer
from . import model, text
from .tokenizer import tokenizer_of

SIZES = ("vocab_size", "hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads", "num_query_groups")
DROPOUTS = ("hidden_dropout", "attention_dropout")
OF_MODEL = ("strict", "verify_weights")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --model, --strict and --verify-weights."""
    parser.add_argument("--model", metavar="DIR", help="begin with this checkpoint folder, or step folder: its sizes, "
                        "its weights; text goes through its tokenizer")
    model.add_strict(parser)
    model.add_verify_weights(parser)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise InputError for options that contradict --model, or that need it."""
    given = [name for name in (SIZES if arguments.model else OF_MODEL) if getattr(arguments, name) not in (None, False)]
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
    if given and arguments.model:
        raise InputError(f"found {flags} beside --model, expected the checkpoint alone to say it")
    if given:
        raise InputError(f"found {flags} without --model, expected the checkpoint folder to begin with")


class BeginWith:
    """The checkpoint folder that a run begins with. Making one is collective; all ranks have opened the same contents.

    config : DecoderConfig of the folder, with the dropouts that the options name
    description : what state.json keeps of the folder, None of a run of random weights
    """

    def __init__(self, group: TensorParallelGroup, arguments: argparse.Namespace):
        self.group, self.arguments = group, arguments
        self.folder: ModelFolder = open_on_all(group, arguments.model, arguments.strict, arguments.verify_weights)
        named = {name: getattr(arguments, name) for name in DROPOUTS if getattr(arguments, name) is not None}
        self.config: DecoderConfig = replace(self.folder.config, **named)
        require(self.config.causal, f"attention in both directions in {arguments.model}",
                "a causal model, whose tokens do not see those that they are to predict")
        self.description = description_of(self.folder)

    def token_ids(self) -> np.ndarray | None:
        """Return the ids of the data by the folder's tokenizer; None where the data are ids, or the tokens bytes.

        Collective: rank 0 reads the text, and broadcasts its ids.
        """
        return self.group.comm.bcast(self.group.on_root(self.token_ids_on_root))

    def token_ids_on_root(self) -> np.ndarray | None:
        """Read the text and return its ids, rank 0 alone."""
        path, folder = self.arguments.data, self.arguments.model
        if byte_vocabulary(folder) is not None or path is not None and holds_ids(path, self.arguments.data_dtype):
            return None
        found = standard_library().tobytes().decode("utf-8", "replace") if path is None else text.read_text(path)
        if not os.path.isfile(os.path.join(model_files(folder), "tokenizer.json")):
            raise InputError(f"found no tokenizer.json in {folder} for the text {path}, expected it, or token ids: "
                             f"--data-dtype")
        tokenizer = tokenizer_of(folder)
        ids = np.array(tokenizer.encode(found)[0], np.uint32)
        tokenizer.close()
        return ids

    def begin(self, trainer: Trainer) -> None:
        """Have a new trainer begin with the folder; a run that goes on reads its own weights instead. Collective."""
        trainer.began_with = self.description
        if self.arguments.resume == "newest" or self.arguments.resume_from:
            return
        begin_with(trainer, self.folder)
        out = self.arguments.out
        if out:
            self.group.on_root(lambda: keep_model_files(out, self.folder, self.description))


def tokens_of(arguments: argparse.Namespace, vocab_size: int, ids: np.ndarray | None) -> Tokens:
    """Return the data's tokens; ids: what a tokenizer made of the file, None where it is read as it is."""
    return Tokens(arguments.data, vocab_size, arguments.seq_length, arguments.seed, arguments.data_dtype, ids)
