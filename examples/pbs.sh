#!/bin/bash
#PBS -N mpitp
#PBS -l select=1:ncpus=8:mpiprocs=4:ompthreads=2
#PBS -l walltime=00:10:00
# qsub examples/pbs.sh, from the project's folder. One line of $PBS_NODEFILE is one rank (mpiprocs), ompthreads its
# cores for BLAS. Before the first job, on a login node: load the site's modules, then ./run.sh --prepare once.
set -euo pipefail
cd "$PBS_O_WORKDIR"
# module load ...            the MPI that the site wants you to use
./run.sh verify --hidden-size 1024 "$@"
# The same without run.sh, in an environment of your own:
# mpiexec -n 4 python -m mpitp verify --hidden-size 1024
