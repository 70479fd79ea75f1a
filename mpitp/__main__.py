"""python -m mpitp: the guard first, then the number of BLAS threads, then the command line."""
import sys


def main():
    """Run a command on this rank; returns its exit status: 0 good, 1 a check or the run failed, 2 bad input."""
    try:
        from .comm.guard import guarded
    except (ImportError, RuntimeError) as error:            # no mpi4py, or no MPI library for it to load
        print(f"mpitp: found no MPI for mpi4py ({error}), expected one: pip install 'mpitp[mpi]' or name the "
              f"library in MPI4PY_LIBMPI", file=sys.stderr)
        return 2
    return guarded(run)


def run():
    from mpi4py import MPI
    from .comm import launch
    # Before anything imports NumPy, whose BLAS reads the number of threads once.
    launch.set_blas_threads(MPI.COMM_WORLD, reproducible="--reproducible" in sys.argv)
    from .commands import run_command
    return run_command(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
