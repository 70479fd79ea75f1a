"""The one error that is the caller's to mend."""
from numbers import Integral


class InputError(ValueError):
    """Bad input, found on every rank alike: one line that names what was found and what was expected.

    The command line prints it once and exits with 2. Anything else that is raised ends the whole job.
    """


def require(condition, found, expected):
    """Raise InputError("found ..., expected ...") unless condition holds."""
    if not condition:
        raise InputError(f"found {found}, expected {expected}")


def require_positive(**sizes):
    """Raise InputError unless every size is an integer of at least 1."""
    for name, size in sizes.items():
        require(is_integer(size) and size > 0, f"{name} = {size!r}", "a positive integer")


def is_integer(value):
    """Whether value is an integer of Python or NumPy; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)
