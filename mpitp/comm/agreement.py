"""Do all ranks mean the same collective? MPI does not ask: it adds up whatever bytes arrive, exit status 0.

One small all-reduce proves it, as PETSc does: the maximum of (h, -h) over the ranks is (h, -h) only where
every rank has the same h.
"""
import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from mpi4py import MPI

from ..errors import InputError


def agree(comm: MPI.Comm, text: str) -> bool:
    """Whether `text` is the same on every rank. Collective: MPI_Allreduce of 16 bytes."""
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
    extremes = np.array([digest, -digest], np.int64)
    comm.Allreduce(MPI.IN_PLACE, extremes, MPI.MAX)
    return bool(extremes[0] == -extremes[1])


def by_ranks(texts: Sequence[str]) -> str:
    """Say which ranks have which text: ['a', 'b', 'a'] -> 'ranks 0, 2: a; rank 1: b'."""
    ranks: dict[str, list[str]] = {}
    for rank, text in enumerate(texts):
        ranks.setdefault(text, []).append(str(rank))
    return "; ".join(f"rank{'s' if len(who) > 1 else ''} {', '.join(who)}: {text}" for text, who in ranks.items())


def require_agreement(comm: MPI.Comm, subject: str, text: str) -> None:
    """Raise InputError on every rank, listing what each says, unless `text` is the same everywhere. Collective."""
    if not agree(comm, text):
        raise InputError(f"the ranks disagree on {subject}: {by_ranks(comm.allgather(text))}")


def require_everywhere(comm: MPI.Comm, subject: str, look: Callable[[], str]) -> None:
    """Raise InputError on every rank where look() raises it on any, or gives different texts. Collective.

    An error that only one rank meets would leave the others waiting for it; so it counts as what that rank says.
    """
    error: InputError | None = None
    try:
        text = look()
    except InputError as found:
        text, error = str(found), found
    require_agreement(comm, subject, text)
    if error is not None:
        raise error
