#!/bin/bash
#BSUB -J mpitp
#BSUB -n 4
#BSUB -W 10
#BSUB -o mpitp.%J.out
# bsub < examples/lsf.sh, from the project's folder. Ranks are the slots of -n; the launcher is jsrun where there is
# one, else the site's mpirun. Before the first job, on a login node: load the site's modules, then once
# ./run.sh --prepare, since compute nodes often have no network.
set -euo pipefail
cd "$LS_SUBCWD"
# module load ...            the MPI that the site wants you to use
./run.sh verify --hidden-size 1024 "$@"
# The same without run.sh, in an environment of your own:
# mpirun -n 4 python -m mpitp verify --hidden-size 1024
