"""Where a continuation stops by --stop: at a token id, or at a text, which may begin and end inside of tokens."""
from __future__ import annotations

import json
from collections.abc import Sequence

from ..errors import require
from . import text

HELP = "end a continuation at this token id or text, and leave the text out; may be given again. Digits are a token " \
       "id; what is in double quotes is a JSON string"


def parse(given: Sequence[str], with_text: bool) -> tuple[list[int], list[str]]:
    """Return the token ids and the texts of the --stop options. Raises InputError for what is neither.

    with_text : whether there is text; without, all have to be ids
    """
    ids, texts = [], []
    for argument in given:
        found = text.text_of_argument(argument, "--stop")
        if found.isascii() and found.isdigit():
            ids.append(int(found))
            continue
        require(with_text, f"--stop {found!r} beside --ids", "a token id: no text is made of ids")
        found = unquoted(found)
        require(found, "an empty --stop", "a text or a token id")
        texts.append(found)
    return ids, texts


def unquoted(argument: str) -> str:
    """Return the text of a JSON string, such as a newline for "\\\\n"; any other argument is itself the text."""
    if len(argument) > 1 and argument[0] == argument[-1] == '"':
        try:
            return str(json.loads(argument))
        except ValueError:
            pass
    return argument


class StopText:
    """A StopText lets a text through, piece by piece, up to the first of some texts.

    Of several, the one that is complete first counts (of those that end together, the longest), wherever the pieces
    begin and end. What may be the beginning of one is held back until it is known.

    Parameters
    ----------
    stops : sequence of str

    Attributes
    ----------
    is_met : bool
        Whether one of them has come.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops, self.held, self.is_met = stops, "", False
        self.longest = max(map(len, stops), default=0)

    def push(self, piece: str) -> str:
        """Return what is known not to belong to a stop, of this piece and of what was held back."""
        if self.is_met:
            return ""
        found, self.held = self.held + piece, ""
        ends = [(start + len(stop), start) for stop in self.stops if (start := found.find(stop)) >= 0]
        if ends:
            self.is_met = True
            return found[:min(ends)[1]]
        for size in range(min(len(found), self.longest - 1), 0, -1):
            if any(stop.startswith(found[-size:]) for stop in self.stops):
                found, self.held = found[:-size], found[-size:]
                break
        return found

    def rest(self) -> str:
        """Return what is held back; nothing will complete a stop."""
        held, self.held = self.held, ""
        return held
