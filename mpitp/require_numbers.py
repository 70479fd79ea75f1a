"""What is asked of the numbers in a config and in the options of a loss."""
from math import isfinite

from .errors import require


def require_probability(name: str, value: float) -> None:
    """Raise InputError unless value is a probability below 1."""
    require_number(name, value)
    require(0 <= value < 1, f"{name} = {value}", "a probability below 1")


def require_number(name: str, value: float, above: float | None = None) -> None:
    """Raise InputError unless value is a finite number, above a limit if one is given."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
    require(good and (above is None or value > above), f"{name} = {value!r}",
            "a number" if above is None else f"a number above {above}")
