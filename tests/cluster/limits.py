"""examples/slurm_train.sh with Slurm's real time limits, which are a minute at least."""
import time

from student import MPICH, Done, good, hold, steps_of, student, wait_for

TINY = "--hidden-size 32 --num-layers 1 --num-attention-heads 4 --seq-length 16 --micro-batch-size 2"
TRAIN = "train --hidden-size 512 --num-layers 8 --save-minutes 30"      # as the script; TINY comes behind it
LONGEST = 3600              # seconds of the whole of it, where other work comes up after steps were timed
ENDS = ("FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED", "OUT_OF_MEMORY")


def seconds_a_step(mpi: str) -> float:
    """Return the seconds of a step over both hosts."""
    times = []
    for steps in (20, 220):
        began = time.monotonic()
        good("h0", f"salloc -Q -N 2 -n 2 ./run.sh {TRAIN} --train-iters {steps} {TINY}", mpi)
        times.append(time.monotonic() - began)
    return max(times[1] - times[0], 0.2) / 200


def real_time_limits(mpi: str) -> None:
    """A job whose limit ends it by TERM, then one that USR1 tells of its limit and that queues itself until the end."""
    name = f"limits-{mpi.split()[0].lower()}"
    steps = int(240 / seconds_a_step(mpi))              # a minute, then half a minute a job, of which two start
    submit = f"OUT=$HOME/{name} STEPS={steps} sbatch --parsable -N 2 -n 2 --cpus-per-task=1 --time=1"
    good("h0", f"rm -rf ~/{name}*", mpi)
    first = good("h0", f"{submit} -o ~/{name}.1 --signal=CONT@1 examples/slurm_train.sh {TINY}", mpi).split()[-1]
    wait_for(f"scontrol show job {first} | grep -q JobState=TIMEOUT", f"~/{name}.1", 150)
    text = good("h0", f"cat ~/{name}.1")
    hold("stopped by SIGTERM after step" in text, Done(0, text))

    job = good("h0", f"{submit} -o ~/{name}.2 --signal=USR1@30 examples/slurm_train.sh {TINY}", mpi).split()[-1]
    follow(job, f"~/{name}.2")
    require_whole(name, steps, job)


def of_job(job: str, field: str) -> str:
    """Return what Slurm says of a job."""
    return good("h0", f"scontrol show job {job}").split(f"{field}=")[1].split()[0]


def follow(job: str, log: str) -> None:
    """Wait for the end of a job that queues itself again and again."""
    until, state, woken = time.monotonic() + LONGEST, "", "0"
    while state != "COMPLETED":
        state, restarts = of_job(job, "JobState"), of_job(job, "Restarts")
        if state == "PENDING" and restarts != woken:    # a requeued job would rest for two minutes
            student("h0", f"scontrol update job={job} StartTime=now+3")
            woken = restarts
        hold(state not in ENDS and time.monotonic() < until, student("h0", f"tail -n 20 {log}"))
        time.sleep(0.5)


def require_whole(name: str, steps: int, job: str) -> None:
    """Raise Failed unless a run of several jobs is the run of one: each step once in its log, the same files."""
    text, restarts = good("h0", f"cat ~/{name}.2"), int(of_job(job, "Restarts"))
    hold(restarts >= 3 and text.count("stopped by SIGUSR1 after step") == restarts, Done(restarts, text))
    logged = steps_of(f"~/{name}")
    hold(logged == list(range(1, steps + 1)), Done(0, str(logged)))
    good("h1", f"./run.sh -n 2 {TRAIN} --train-iters {steps} --out ~/{name}-whole {TINY}", MPICH, LONGEST)
    sums = [good("h0", f"cd ~/{folder}/step-{steps:08d} && sha256sum *") for folder in (name, f"{name}-whole")]
    hold(sums[0] == sums[1], Done(0, "\n".join(sums)))
