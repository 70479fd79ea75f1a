"""Judge somebody's tensor-parallel run by what its ranks wrote down.

DUMP is a folder that a mpitp.oracle.Recorder wrote: run.json, and a safetensors file of each phase and rank. The same
is computed densely in float64 on one process. Three lines say whether the run is right, where it first goes wrong, and
which mistake that is; the table has every tensor, in the order of computation:
error = |found - exact| / (eps * magnitude), elementwise; norm = the same in Euclidean norms.
Exits with 0 when the run is right, with 1 when it is wrong, with 2 when the dump cannot be judged.
Needs no MPI and no framework.
"""
from __future__ import annotations

from argparse import ArgumentParser, Namespace

from .. import tables
from ..court.dump import read_dump
from ..court.report import lines
from ..court.verdict import as_json, judge
from ..errors import InputError
from . import speaks


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `judge`."""
    parser.add_argument("dump", metavar="DUMP", help="folder with run.json and PHASE-RANK.safetensors")
    parser.add_argument("--json", metavar="FILE", help="write the verdict there, too")


def run(arguments: Namespace) -> int:
    """Judge the dump; every rank of a job finds the same, the first one prints it."""
    if arguments.json:
        tables.require_writable(arguments.json)
    verdict = judge(read_dump(arguments.dump))
    if speaks():
        print("\n".join(lines(verdict)), flush=True)
        if arguments.json:
            tables.write_json(arguments.json, "mpitp.judge/1", as_json(verdict))
    if verdict.unreadable:
        raise InputError(verdict.unreadable)
    return 0 if verdict.good else 1
