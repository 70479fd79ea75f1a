#!/bin/bash
#SBATCH --job-name=mpitp
#SBATCH --nodes=1
#SBATCH --ntasks=4
#SBATCH --cpus-per-task=2
#SBATCH --time=00:10:00
# sbatch examples/slurm.sh, from the project's folder. run.sh takes ranks and cores from the allocation and starts
# them with srun, by whichever of `srun --mpi=list` starts the site's MPI. Before the first job, on a login node: load
# the site's MPI and Python modules, then ./run.sh --prepare once, since compute nodes often have no network.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
# module load ...            the MPI that the site wants you to use
./run.sh verify --hidden-size 1024 "$@"
# The same without run.sh, in an environment of your own:
# srun --mpi=pmix --cpus-per-task="$SLURM_CPUS_PER_TASK" python -m mpitp verify --hidden-size 1024
