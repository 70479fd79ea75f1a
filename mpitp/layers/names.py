"""What is wrong with arrays that a layer was given for its parameters: names, kinds, memory."""
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from ..arrays import Array, is_writable, module_of
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


def require_gradients(out: dict[str, Array], layer: Any) -> dict[str, Array]:
    """Return `out` if backward can write its gradients into these arrays. Raises InputError otherwise."""
    layer.require_names(out, "out")
    for name, w in layer.weights.items():
        g = out[name]
        fits = module_of(g) is layer.group.xp and g.shape == w.shape and g.dtype == layer.sum_dtype
        if not (fits and is_writable(g)):
            raise InputError(f"out[{name!r}]: found {getattr(g, 'dtype', type(g).__name__)} {getattr(g, 'shape', '')}, "
                             f"expected C-contiguous {layer.sum_dtype} {w.shape}, aligned and writable")
    require_apart(out, layer.weights)
    return out


def require_apart(out: Mapping[str, Array], weights: Mapping[str, Array]) -> None:
    """Raise InputError unless the gradients of `out` share no memory, neither with each other nor with weights."""
    places = []
    for what, arrays in (("out", out), ("weights", weights)):
        for name, a in arrays.items():
            if getattr(a, "size", 0):               # a packed weight has no gradient
                start = first_byte(a)
                places.append((start, start + a.nbytes, what, name))
    places.sort()
    for (_, end, one, name), (start, _, other, other_name) in zip(places, places[1:]):
        if start < end and "out" in (one, other):
            raise InputError(f"out: found {one}[{name!r}] and {other}[{other_name!r}] in the same memory, "
                             f"expected an array for each gradient, beside the weights")


def first_byte(a: Array) -> int:
    """Return the address of an array's first number, in the memory that it is in."""
    return a.data.ptr if hasattr(a.data, "ptr") else a.__array_interface__["data"][0]
