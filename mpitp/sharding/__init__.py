"""Who holds what: integers, names and addressed random numbers. No MPI, no sums."""
