"""The error that is the caller's to mend, and what raises it."""
from numbers import Integral


class InputError(ValueError):
    """An error in the caller's input: one line that names what was found and what was expected, on every rank.

    The command line prints it once and exits with 2. Anything else that is raised ends the whole job.
    """


def require(condition: object, found: str, expected: str) -> None:
    """Raise InputError("found ..., expected ...") unless condition holds."""
    if not condition:
        raise InputError(f"found {found}, expected {expected}")


def require_positive(**sizes: object) -> None:
    """Raise InputError unless every size is an integer of at least 1."""
    for name, size in sizes.items():
        require(is_integer(size) and size > 0, f"{name} = {size!r}", "a positive integer")


def is_integer(value: object) -> bool:
    """Return whether value is an integer of Python or NumPy; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)
