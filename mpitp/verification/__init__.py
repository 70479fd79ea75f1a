"""What `verify` computes: the parallel layers on the ranks at hand against the dense ones of mpitp.oracle.

Nothing here prints. A check is a list of steps, so that a command can show how far it is.
"""
from collections.abc import Callable
from typing import Any

Step = tuple[str, Callable[[], Any]]        # what it does, and the function that does it; collective
