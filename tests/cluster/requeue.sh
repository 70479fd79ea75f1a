#!/bin/bash
# A training job that saves when its time is up, and goes on when it is requeued: sbatch with RUN=FOLDER.
#SBATCH --requeue --open-mode=append
echo "started ${SLURM_RESTART_COUNT:-0}"
resume=
ls -d "$RUN"/step-* >/dev/null 2>&1 && resume=--resume
./run.sh train --hidden-size 32 --num-layers 1 --num-attention-heads 4 --seq-length 16 --micro-batch-size 2 --keep 0 \
    --save-interval 100000 --train-iters 300 --out "$RUN" $resume &
training=$!
again() {       # SIGUSR1 makes the ranks save; then the job goes back to the queue
    saved=$(ls "$RUN" | grep -c step-)
    kill -USR1 $training
    until [ "$(ls "$RUN" | grep -c step-)" -gt "$saved" ]; do sleep 0.2; done
    scontrol requeue "$SLURM_JOB_ID"
}
trap again USR1
wait $training
wait $training          # the signal ended the first wait
