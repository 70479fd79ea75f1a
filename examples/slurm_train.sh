#!/bin/bash
#SBATCH --job-name=mpitp-train
#SBATCH --nodes=1
#SBATCH --ntasks=4
#SBATCH --cpus-per-task=2
#SBATCH --time=00:30:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
# sbatch examples/slurm_train.sh, from the project's folder, after ./run.sh --prepare (see slurm.sh). Two minutes before
# the time limit Slurm sends USR1 to the ranks, which save and stop; the job then queues itself again and goes on where
# it stopped, until the last step. One command line serves the first start and every later one. Options behind the
# script's name are passed on: sbatch examples/slurm_train.sh --data book.txt
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
# module load ...            the MPI that the site wants you to use
out=${OUT:-run} steps=${STEPS:-10000}
./run.sh train --hidden-size 512 --num-layers 8 --train-iters "$steps" --out "$out" --save-minutes 30 \
    --resume auto --stop-on TERM,USR1 "$@"
if [ ! -d "$out/step-$(printf %08d "$steps")" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
