"""python -m mpitp: the guard first, then the number of BLAS threads, then the command line."""
import os
import sys
from collections.abc import Mapping

WITH_TEXT = ["generate"], ["score"]             # the commands that may need a tokenizer


def foreign_launcher(library: str, environment: Mapping[str, str]) -> str | None:
    """Return what is wrong when Open MPI's mpirun starts a library of the MPICH kind, else None."""
    ranks = environment.get("OMPI_COMM_WORLD_SIZE", "1")
    if ranks != "1" and library in ("MPICH", "Intel MPI", "MVAPICH", "Cray MPICH"):
        return (f"found {ranks} processes started by Open MPI's mpirun, but mpi4py uses {library}, expected the mpirun "
                f"of {library}, or MPI4PY_LIBMPI set to the library of Open MPI")
    return None


def main() -> int:
    """Run a command on this rank; returns its exit status: 0 good, 1 a check or the run failed, 2 bad input."""
    if sys.argv[1:2] == ["train"]:              # it answers signals, which may come before it has begun
        from .training.requests import hold_signals
        hold_signals()
    if sys.argv[1:2] in WITH_TEXT:              # a large vocabulary takes as long as everything else before the text
        from .commands.tokenizer import begin_before_mpi
        begin_before_mpi(sys.argv[2:], os.environ)
    try:
        import mpi4py
        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True      # MPICH dies in MPI_Init under Open MPI's mpirun:
        from mpi4py import MPI                                      # first see whether they belong together
        problem = None if MPI.Is_initialized() else foreign_launcher(MPI.get_vendor()[0], os.environ)
        if problem:
            print(f"mpitp: {problem}", file=sys.stderr)
            return 2
        if not MPI.Is_initialized():
            MPI.Init_thread()
        from .comm.guard import guarded
        if MPI.COMM_WORLD.size > 1 and os.environ.get("MPITP_STALL_LIMIT") != "0":
            from .comm.early import expect_all
            expect_all()
    except (ImportError, RuntimeError) as error:            # no mpi4py, or no MPI library for it to load
        if sys.argv[1:2] in (["judge"], ["plan"]):
            return run_alone()
        if sys.argv[1:2] in (["-h"], ["--help"], ["--version"]):
            from .commands import main_parser
            main_parser().parse_args(sys.argv[1:2])         # exits
        why = str(error).partition("\n")[0].rstrip(": ")     # mpi4py lists all that it tried
        print(f"mpitp: found no MPI for mpi4py ({why}), expected one: pip install 'mpitp[mpi]' or name the "
              f"library in MPI4PY_LIBMPI", file=sys.stderr)
        return 2
    return guarded(run)


def run_alone() -> int:
    """Run the command that sys.argv names where there is no MPI; returns its exit status."""
    from .comm.absent import stand_in
    stand_in()                                  # `plan` asks the layers, which import what communicates
    from .commands import parse_or_help
    from .errors import InputError
    try:
        command, arguments = parse_or_help(sys.argv[1:])
        return command.run(arguments)
    except InputError as error:
        print(f"mpitp: {error}", file=sys.stderr)
        return 2


def run() -> int:
    """Run the command that sys.argv names, with this rank's number of BLAS threads; returns its exit status."""
    from mpi4py import MPI
    from .comm import launch
    # Before anything imports NumPy, whose BLAS reads the number of threads once.
    launch.set_blas_threads(MPI.COMM_WORLD, reproducible="--reproducible" in sys.argv)
    launch.keep_freed_memory()
    if sys.argv[1:2] in WITH_TEXT and MPI.COMM_WORLD.rank == 0:
        from .commands.tokenizer import begin
        begin(sys.argv[2:])
    from .commands import run_command
    return run_command(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
