"""What is wrong with the names of arrays that a layer was given for its parameters."""
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from ..errors import InputError

MANY = 12       # parameters; a message does not list as many


def refuse_names(specs: Mapping[str, Any], arrays: Any, what: str) -> NoReturn:
    """Raise InputError for something that is no dict with the names of `specs`; `what` is its name, for the message."""
    if not isinstance(arrays, Mapping):
        raise InputError(f"{what}: found {type(arrays).__name__}, expected a dict of {', '.join(specs)}")
    if len(specs) > MANY:                       # then only where they differ
        missing, unexpected = specs.keys() - arrays.keys(), arrays.keys() - specs.keys()
        raise InputError(f"{what}: found no {some(missing)}; unexpected: {some(unexpected)}; expected the {len(specs)} "
                         f"names of the model's parameters")
    raise InputError(f"{what}: found names {', '.join(map(str, arrays)) or '(none)'}, expected {', '.join(specs)}")


def some(names: Iterable[object]) -> str:
    """Return a few of the names, for a message."""
    texts = sorted(map(str, names))
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "") if texts else "none"
