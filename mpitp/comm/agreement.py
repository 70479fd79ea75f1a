"""Do all ranks mean the same? MPI does not ask: it adds up whatever bytes arrive, exit status 0.

One small all-reduce proves it, as PETSc does: the maximum of (h, -h) over the ranks is (h, -h) only where
every rank has the same h.
"""
import hashlib
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from mpi4py import MPI

from ..errors import InputError

T = TypeVar("T")


def agree(comm: MPI.Comm, text: str) -> bool:
    """Return whether `text` is the same on every rank. Collective: MPI_Allreduce of 16 bytes."""
    digest = int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=7).digest(), "big")
    extremes = np.array([digest, -digest], np.int64)
    comm.Allreduce(MPI.IN_PLACE, extremes, MPI.MAX)
    return bool(extremes[0] == -extremes[1])


def by_ranks(texts: Sequence[str]) -> str:
    """Say which ranks have which text: ['a', 'b', 'a'] -> 'ranks 0, 2: a; rank 1: b'."""
    ranks: dict[str, list[str]] = {}
    for rank, text in enumerate(texts):
        ranks.setdefault(text, []).append(str(rank))
    return "; ".join(f"rank{'s' if len(who) > 1 else ''} {', '.join(who)}: {text}" for text, who in ranks.items())


def disagreement(comm: MPI.Comm, text: str) -> str | None:
    """Return what each rank says where they differ, None where all say the same. Collective."""
    return None if agree(comm, text) else by_ranks(comm.allgather(text))


def require_agreement(comm: MPI.Comm, subject: str, text: str) -> None:
    """Raise InputError on every rank, listing what each says, unless `text` is the same everywhere. Collective."""
    found = disagreement(comm, text)
    if found:
        raise InputError(f"the ranks disagree on {subject}: {found}")


def require_everywhere(comm: MPI.Comm, subject: str, look: Callable[[], str]) -> None:
    """Raise InputError on every rank where look() raises it on any, or gives different texts. Collective.

    An error that only one rank meets would leave the others waiting for it; so it counts as what that rank says.
    """
    error: InputError | None = None
    try:
        text = look()
    except InputError as found:
        text, error = str(found), found
    if not agree(comm, text):
        where = f" (on {socket.gethostname()})" if error else ""
        raise InputError(f"the ranks disagree on {subject}: {by_ranks(comm.allgather(text + where))}")
    if error is not None:
        raise error


def same_everywhere(comm: MPI.Comm, find: Callable[[], T], describe: Callable[[T], Mapping[str, str]]) -> T:
    """Return find() where everything that describe(find()) says is the same on every rank. Collective.

    Parameters
    ----------
    comm : mpi4py communicator
    find : function
        Finds this rank's value.
    describe : function of that value
        Says it as {what it is about: text}.

    Returns
    -------
    object
        This rank's value.

    Raises
    ------
    InputError
        On every rank, in one line: which ranks say what about the first thing that differs; or, where find() raised
        InputError or OSError on some ranks alone, the first of them, its host, and its error.
    """
    said: dict[str, str] = {}
    problem: InputError | None = None
    value: T | None = None
    try:
        value = find()
        said = dict(describe(value))
    except InputError as error:
        problem = error
    except OSError as error:
        problem = InputError(f"{error.filename}: found {error.strerror}, expected to read it")
    found = (said, problem and str(problem))
    if not agree(comm, json.dumps(found)):
        raise InputError(first_difference(comm.allgather((*found, socket.gethostname()))))
    if problem is not None:
        raise problem
    return value                                            # type: ignore[return-value]


def first_difference(of_ranks: Sequence[tuple[Mapping[str, str], str | None, str]]) -> str:
    """Return the line about ranks that differ, from (what it says, its problem or None, its host) of each rank."""
    for rank, (_, problem, host) in enumerate(of_ranks):
        if problem is not None:
            return f"rank {rank} on {host}: {problem}"
    names = list(dict.fromkeys(name for said, *_ in of_ranks for name in said))
    for name in names:
        texts = [said.get(name, "nothing") for said, *_ in of_ranks]
        if len(set(texts)) > 1:
            return f"the ranks disagree on {name}: {by_ranks(texts)}"
    return "the ranks disagree on the order of what they say"
