"""What a case of the zoo is: a mistake, the code that makes it, and where it was published."""
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

UNPUBLISHED = "no published case known"


@dataclass(frozen=True)
class Case:
    """One mistake in one program.

    Parameters
    ----------
    name : str
        What was done, in a few words; the last letters tell cases apart that differ in the program only.
    host : str
        "plain", "mpitp" or "torch".
    kind : str
        Of the layer, as in run.json.
    code : class or function
        Makes the mistake.
    source : str
        A tracker's thread that reports it, or UNPUBLISHED. A question there is called one.
    family : str
        Its row in the confusion matrix.
    named : str
        A regular expression: what the judge says of it, "name: sentence", if it has understood.
    sizes : dict
        Of the problem, see problems.make.
    ranks : tuple of int
        The numbers of ranks on which it is run.
    """
    name: str
    host: str
    kind: str
    code: Any
    source: str
    family: str
    named: str
    sizes: dict = field(default_factory=dict)
    ranks: tuple[int, ...] = (2, 3)
    dtype: str = "float64"
    sequence_parallel: bool = False
    tokens: int | None = None
    options: dict = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """A name for files."""
        return self.code.__name__


class Registry(list):
    """The cases of one host, in the order of the file."""

    def __init__(self, host: str):
        self.host = host

    def __call__(self, name: str, kind: str, family: str, named: str, source: str = UNPUBLISHED,
                 **more: Any) -> Callable[[Any], Any]:
        """Register what is decorated."""
        return Entry(self, name, kind, family, named, source, more)


@dataclass
class Entry:
    """A decorator that makes a Case of what it decorates."""
    registry: Registry
    name: str
    kind: str
    family: str
    named: str
    source: str
    more: dict

    def __call__(self, code: Any) -> Any:
        self.registry.append(Case(self.name, self.registry.host, self.kind, code, self.source, self.family, self.named,
                                  **self.more))
        return code
