"""A stand-in for mpi4py in a process without MPI: the layers can be imported, to be asked what they would do.

`python -m mpitp plan` takes it, and nothing that communicates: of a world of one rank there is the size and the rank.
"""
import sys
from types import ModuleType


class World:
    """The world of a process that is alone."""
    rank, size = 0, 1


class AbsentMPI(ModuleType):
    """mpi4py.MPI, whose every name is an empty class: enough for annotations and for tables of operations."""
    COMM_WORLD = World()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def stand_in() -> None:
    """From now on this process imports the stand-in for mpi4py.MPI."""
    package = sys.modules["mpi4py"] = sys.modules.get("mpi4py") or ModuleType("mpi4py")     # it may have been refused
    package.MPI = sys.modules["mpi4py.MPI"] = AbsentMPI("mpi4py.MPI")       # type: ignore[attr-defined]
