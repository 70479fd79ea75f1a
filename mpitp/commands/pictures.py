"""What a command asks before the work, where a figure is to be drawn at its end."""
from .. import tables
from ..errors import InputError, require

ENDINGS = (".png", ".svg", ".pdf")


def require_picture(path: str) -> None:
    """Raise InputError where a picture cannot be drawn: no matplotlib, an unknown ending, no way to write it."""
    require(path.endswith(ENDINGS), f"--plot {path}", f"a file that ends with {', '.join(ENDINGS)}")
    tables.require_writable(path)
    try:
        import matplotlib       # noqa: F401
    except ImportError:
        raise InputError("found no matplotlib, expected it for --plot: pip install 'mpitp[plot]'") from None
