#!/bin/bash
#SBATCH --job-name=mpitp-scaling
#SBATCH --nodes=1
#SBATCH --ntasks=4
#SBATCH --cpus-per-task=2
#SBATCH --time=00:20:00
# sbatch examples/slurm_scaling.sh, from the project's folder, after ./run.sh --prepare (see slurm.sh) or in an
# environment of your own: a scaling study in one job, one number of ranks after the other. Options behind the script's
# name are passed on: with --calibrate each number of ranks is measured first, for minutes, so that the plan's times
# stand beside these; else those of a machine that was calibrated before do.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
# module load ...            the MPI that the site wants you to use
activate=${MPITP_VENV:-.venv}/bin/activate
if [ -e "$activate" ]; then . "$activate"; fi
# From Slurm 22.05 on srun does not take this over from sbatch by itself, and a rank would have one core.
start="srun --overlap --cpus-per-task=${SLURM_CPUS_PER_TASK:-1}"
# MPI_TYPE: of `srun --mpi=list`, the one that starts this MPI. By default the first of these with which two ranks meet.
for type in ${MPI_TYPE:-pmi2 pmix}; do
    if timeout 60 $start --mpi="$type" -n 2 python -c \
        "from mpi4py import MPI; raise SystemExit(MPI.COMM_WORLD.size != 2)" 2> /dev/null; then break; fi
done
python -m mpitp scale --ranks 1,2,4 --threads "${SLURM_CPUS_PER_TASK:-1}" --launcher "$start --mpi=$type" \
    --json scaling.json "$@"
