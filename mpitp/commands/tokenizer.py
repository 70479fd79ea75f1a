"""Which tokenizer a checkpoint folder has: that of its file, which begins to load early, or one of bytes."""
from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from ..errors import InputError
from .tokenizer_process import Tokenizer

RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")       # launchers' variables, which are there before MPI is
_begun: dict[str, Tokenizer] = {}       # those of begin(), by folder, until tokenizer_of() takes them


def begin_before_mpi(argv: Sequence[str], environment: Mapping[str, str]) -> None:
    """Do what begin() does, on the process that a launcher's variables call rank 0: MPI takes a tenth of a second."""
    if {environment[name] for name in RANKS if name in environment} == {"0"}:       # none says otherwise
        begin(argv)


def begin(argv: Sequence[str]) -> None:
    """Begin to load the tokenizer that a command line is going to need, before NumPy and the layers are imported.

    A guess, which is only about time: tokenizer_of() begins what this has missed, and bad options are refused later.
    """
    folder = None
    for word, following in zip(argv, [*argv[1:], None]):
        if word == "--model":
            folder = following
        elif word.startswith("--model="):
            folder = word.partition("=")[2]
    needs_none = any(word.startswith("--ids") or word in ("-h", "--help") for word in argv)
    if folder is not None and folder not in _begun and not needs_none:
        with contextlib.suppress(InputError, OSError):
            _begun[folder] = Tokenizer(folder)


def tokenizer_of(folder: str) -> Tokenizer:
    """Return the tokenizer of a folder: the one that begin() has begun to load, else a new one.

    That of a step folder is one of bytes, or lies in the folder of its run.
    """
    begun = _begun.pop(folder, None)
    if begun is not None:
        return begun
    from ..checkpoints.step_models import byte_vocabulary, model_files      # late: begin() waits for no NumPy
    size = byte_vocabulary(folder)
    if size is None:
        return Tokenizer(model_files(folder))
    from .byte_tokenizer import ByteTokenizer
    return ByteTokenizer(size)
