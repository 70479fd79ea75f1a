"""`bench --calibrate`: measure this machine, and write the file that `plan` reads."""
from __future__ import annotations

import argparse
import os

from .. import tables
from ..errors import require
from ..measure.calibrate import Calibration
from ..measure.calibrate_python import calibrate
from ..measure.timed_cases import Sizes
from ..plan.machine_file import default_path, write_machine
from . import device
from .progress import Progress

PASSES = 3


def run_calibration(arguments: argparse.Namespace, sizes: Sizes | None = None) -> int:
    """Measure on all ranks, write on rank 0; return 0."""
    require(not (arguments.what or arguments.plot or arguments.csv or arguments.json or arguments.reports),
            "--calibrate with other benches, or with files for their figures", "it alone")
    with device.group_of(arguments, reproducible=False) as group:
        path = arguments.calibrate
        group.on_root(lambda: prepare(path))
        with Progress("calibrate", PASSES) as bar:
            machine = calibrate(Calibration(group, arguments.dtype, sizes), PASSES, bar.advance)
        if group.rank == 0:
            write_machine(path, machine, arguments.dtype)
            flops = machine.flops_per_second[arguments.dtype]
            print(f"{path}: {tables.count(group.size, 'rank')} of {machine.source}\n"
                  f"  products {flops / 1e9:.0f} GF/s and reading {tables.rate(machine.read_bytes_per_second)} a rank, "
                  f"an all-reduce {tables.seconds(machine.inside.alpha_seconds)} at least", flush=True)
    return 0


def prepare(path: str) -> None:
    """Make the folder of the file. Raises InputError where it cannot be written."""
    if path == default_path():                  # a folder of our own; another one that is missing is a mistyped one
        os.makedirs(os.path.dirname(path), exist_ok=True)
    tables.require_writable(path)
