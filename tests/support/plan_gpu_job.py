"""Calibrate a stand-in for a GPU, and plan for what was found: plan_gpu_job.py FILE, on any number of ranks."""
import sys

import stand_in
from mpi4py import MPI

stand_in.install(kernels=True)

from mpitp.commands import Parser, bench        # noqa: E402
from mpitp.commands.bench_calibrate import run_calibration      # noqa: E402
from mpitp.config import DecoderConfig          # noqa: E402
from mpitp.measure.timed_cases import Sizes     # noqa: E402
from mpitp.plan import outcome                  # noqa: E402
from mpitp.plan.job import Job                  # noqa: E402
from mpitp.plan.machine_file import read_machine        # noqa: E402

FEW = Sizes(rows=(1, 2), sides=(16, 64), tokens=(4, 16), features=(16, 32), keys=(4, 16), elements=(64, 512),
            reads=(1 << 12, 1 << 14), messages=(8, 64))
parser, first = Parser(), MPI.COMM_WORLD.rank == 0
bench.add_arguments(parser)
for dtype in ("float32", "bfloat16"):
    file = f"{sys.argv[1]}.{dtype}"
    run_calibration(parser.parse_args(["--calibrate", file, "--device", "gpu", "--share-gpu", "--dtype", dtype]), FEW)
    if not first:               # which alone knows that the file is there
        continue
    machine = read_machine(file)
    assert machine.device == "gpu" and "Stand-in" in machine.source and machine.memory_bytes % (1 << 33) == 0
    for kind in ("train", "decode", "score"):
        job = Job(DecoderConfig(27, 16, 2, 4), kind, 1, 8, dtype=dtype, device="gpu")
        of, = outcome.plan(job, machine, [machine.ranks_per_host])
        assert of.fits and of.seconds > 0, (kind, dtype)
print("planned" if first else "calibrated")
