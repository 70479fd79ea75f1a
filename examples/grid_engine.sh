#!/bin/bash
#$ -N mpitp
#$ -pe mpi 4
#$ -l h_rt=00:10:00
#$ -cwd
# qsub examples/grid_engine.sh, from the project's folder; `qconf -spl` lists the site's parallel environments in place
# of mpi. Ranks are the slots ($NSLOTS), on the hosts of $PE_HOSTFILE. Before the first job, on a login node: load the
# site's modules, then ./run.sh --prepare once, since compute nodes often have no network.
set -euo pipefail
# module load ...            the MPI that the site wants you to use
./run.sh verify --hidden-size 1024 "$@"
# The same without run.sh, in an environment of your own:
# mpirun -n "$NSLOTS" python -m mpitp verify --hidden-size 1024
