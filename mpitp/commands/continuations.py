"""What continues the prompts, on rank 0: ids and text as they come, up to where they stop."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .. import tables
from ..inference.generation import ENDED
from .stops import StopText
from .text import TextStream

WIDEST = 40         # characters of a token's text in the table of log-probabilities


@dataclass
class Continuation:
    """A prompt and what continues it, as they are reported."""
    prompt_ids: list
    new_ids: list
    prompt: str | None          # None where ids were given
    text: str | None


@dataclass
class ScoredContinuation(Continuation):
    """A Continuation with the log-probability of each new token."""
    logprobs: list


@dataclass
class Stops:
    """What --stop says: ids, and texts."""
    ids: Sequence[int] = ()
    texts: Sequence[str] = ()


class Row:
    """A Row is one prompt and what continues it.

    Parameters
    ----------
    prompt_ids : list of int
    prompt : str or None
        Its text, None where ids were given.
    decode : function of ids -> text, or None
    stops : Stops
    """

    def __init__(self, prompt_ids: list[int], prompt: str | None, decode: Callable[[list[int]], str] | None,
                 stops: Stops):
        self.prompt_ids, self.prompt, self.stops = prompt_ids, prompt, stops
        self.stream = None if decode is None else TextStream(decode, prompt_ids)
        self.gate = StopText(stops.texts)
        self.new_ids: list[int] = []
        self.logprobs: list[float] = []
        self.pieces: list[str] = []
        self.is_stopped = False

    def push(self, token: int, logprob: float | None) -> str:
        """Add a token; return what is to be printed of it: its text as far as it is known, or its id."""
        self.new_ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if self.stream is None:
            return self.add(("," if self.pieces else "") + str(token))
        if token in self.stops.ids:
            self.is_stopped = True
            return ""
        found = self.gate.push(self.stream.push(token))
        self.is_stopped = self.gate.is_met
        return self.add(found)

    def rest(self) -> str:
        """Return the text that was held back; nothing follows."""
        if self.stream is None:
            return ""
        return self.add(self.gate.push(self.stream.rest()) + self.gate.rest())

    def add(self, piece: str) -> str:
        """Add a piece of text and return it."""
        self.pieces.append(piece)
        return piece

    def text(self) -> str:
        """Return the new text, or the new ids with commas between."""
        return "".join(self.pieces)

    def report(self) -> Continuation:
        """Return what is reported of this row."""
        said = self.prompt_ids, self.new_ids, self.prompt, None if self.stream is None else self.text()
        return ScoredContinuation(*said, self.logprobs) if self.logprobs else Continuation(*said)


class Continuations:
    """Continuations are the rows of a batch: one is printed as it comes, several at the end.

    Parameters
    ----------
    rows : list of Row
    shows_prompts : bool
        Whether the text of a prompt is printed before what continues it.
    """

    def __init__(self, rows: list[Row], shows_prompts: bool):
        self.rows, self.shows_prompts = rows, shows_prompts
        self.alone, self.begun = len(rows) == 1, False

    @property
    def prompts(self) -> list[list[int]]:
        """The ids of the prompts."""
        return [row.prompt_ids for row in self.rows]

    def push(self, tokens_B: np.ndarray, logprobs_B: np.ndarray | None) -> None:
        """Add the tokens of a step."""
        for b, (row, token) in enumerate(zip(self.rows, tokens_B.tolist())):
            if token != ENDED:
                self.show(row, row.push(token, None if logprobs_B is None else float(logprobs_B[b])))

    def show(self, row: Row, piece: str) -> None:
        """Print a piece of text where it is the only row's."""
        if self.alone:
            print(("" if self.begun else self.before(row)) + piece, end="", flush=True)
            self.begun = True

    def before(self, row: Row) -> str:
        """Return what is printed before the new text of a row."""
        return row.prompt if self.shows_prompts and row.prompt is not None else ""

    def stopped(self) -> np.ndarray:
        """Return which rows have met a stop."""
        return np.array([row.is_stopped for row in self.rows])

    def finish(self) -> None:
        """Print the rest."""
        for row in self.rows:
            self.show(row, row.rest())
        if self.alone:
            print()
        else:
            for b, row in enumerate(self.rows):
                print(f"[{b}] {self.before(row)}{row.text()}")

    def logprob_lines(self, decode: Callable[[list[int]], str] | None) -> Iterator[str]:
        """Yield a table of the new tokens and their log-probabilities, and each row's sum."""
        for b, row in enumerate(self.rows):
            total, count = sum(row.logprobs), tables.count(len(row.logprobs), "new token")
            yield ""
            yield f"{'' if self.alone else f'[{b}] '}natural logarithms of the probabilities of {count}: " \
                  f"sum {total:.6f}, mean {total / len(row.logprobs):.6f}"
            texts = [shown(decode([token])) if decode else "" for token in row.new_ids]
            cells = [(token, f"{logprob:.6f}", *([piece] if decode else []))
                     for token, logprob, piece in zip(row.new_ids, row.logprobs, texts)]
            yield from tables.table(("token", "log p", *(["text"] if decode else [])), cells)


def shown(piece: str) -> str:
    """Return a text as a cell of a table: quoted, on one line, not too long."""
    quoted = repr(piece)
    return quoted if len(quoted) <= WIDEST else quoted[:WIDEST - 3] + "..."
