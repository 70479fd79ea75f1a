"""Run `python -m mpitp verify --hidden-size 8` and print, as rank 0, the lines of mpitp that it executes: FILE:LINE."""
import sys

from mpi4py import MPI

import mpitp.__main__

FOLDER = mpitp.__main__.__file__.removesuffix("__main__.py")
executed = []


def trace(frame, event, argument):
    """The trace function of sys.settrace: notes each line of mpitp, and skips frames of other packages."""
    if not frame.f_code.co_filename.startswith(FOLDER):
        return None
    if event == "line":
        executed.append(f"{frame.f_code.co_filename.removeprefix(FOLDER)}:{frame.f_lineno}")
    return trace


sys.argv = ["mpitp", "verify", "--hidden-size", "8", "--seq-length", "4"]
sys.settrace(trace)
status = mpitp.__main__.main()
sys.settrace(None)
if MPI.COMM_WORLD.rank == 0:
    print(*executed, sep="\n")
sys.exit(status)
