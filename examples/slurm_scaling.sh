#!/bin/bash
#SBATCH --job-name=mpitp-scaling
#SBATCH --nodes=1
#SBATCH --ntasks=4
#SBATCH --cpus-per-task=2
#SBATCH --time=00:20:00
# sbatch examples/slurm_scaling.sh, from the project's folder: a scaling study in one job, one number of ranks after the
# other. It needs the environment that ./run.sh --prepare makes, or one of your own, and the type of MPI that the site's
# srun starts (srun --mpi=list): pmix for Open MPI, pmi2 for MPICH. With OPTIONS=--calibrate each number of ranks is
# measured first, for minutes, so that the plan's times stand beside these; else those of a machine calibrated before do.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
# module load ...            the MPI that the site wants you to use
[ -e .venv/bin/activate ] && . .venv/bin/activate
python -m mpitp scale --ranks 1,2,4 --threads "$SLURM_CPUS_PER_TASK" --launcher "srun --overlap --mpi=${MPI_TYPE:-pmi2}" \
    --json scaling.json ${OPTIONS:-}
