"""The one error that is the caller's to mend."""


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
        is_integer = hasattr(size, "__index__") and not isinstance(size, bool)
        require(is_integer and size > 0, f"{name} = {size!r}", "a positive integer")
