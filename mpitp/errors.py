"""The error that is the caller's to mend, and what raises it."""
from numbers import Integral


class InputError(ValueError):
    """An InputError is the caller's to mend: one line that names what was found and what was expected, on every rank.

    The command line prints it once and exits with 2. Anything else that is raised ends the whole job. What a hostile
    file put into it is escaped: control characters of names, line ends too.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """Return a text with everything that does not print, line ends too, as Python escapes it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def require(condition: object, found: str, expected: str) -> None:
    """Raise InputError("found ..., expected ...") unless condition holds."""
    if not condition:
        raise InputError(f"found {found}, expected {expected}")


def require_positive(**sizes: object) -> None:
    """Raise InputError unless every size is an integer of at least 1."""
    for name, size in sizes.items():
        good = isinstance(size, Integral) and is_integer(size) and int(size) > 0
        require(good, f"{name} = {size!r}", "a positive integer")


def is_integer(value: object) -> bool:
    """Return whether value is an integer of Python or NumPy; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise InputError unless value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"found {name} {value!r}, expected one of {', '.join(choices)}")
