"""The court judges a dump of somebody's tensor-parallel run by the oracle: right or wrong, where first, which mistake.

    dump         reads a folder that a Recorder wrote, and checks all of it
    ranks        P ranks in lockstep on one process, whose sums a mistake may change
    programs     what each kind of layer computes, dense and on ranks, by the functions of mpitp.oracle
    yardstick    how far a result is from another one, in units of rounding
    mistakes     what is known to go wrong, each recomputed to see whether it explains the numbers
    verdict      all of this on one dump
"""
