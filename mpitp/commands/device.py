"""The options that say where and how to compute, and the group that they ask for."""
import argparse
import os
import sys
from typing import Any

from ..comm.agreement import disagreement
from ..comm.group import TensorParallelGroup
from ..comm.launch import machine
from ..comm.mpi import TRANSPORTS
from ..errors import require, require_positive

BLOCKS = 8          # of a dimension in reproducible mode, where --blocks says nothing else
DTYPES = "float32 (the default), float64; on a GPU float16 and bfloat16 too"


def add_group_arguments(parser: argparse.ArgumentParser, *, dtypes: str = DTYPES, blocks: bool = False,
                        reproducible: str = "the same bits for any number of ranks") -> None:
    """Add --dtype, --reproducible, and what add_arguments adds.

    Parameters
    ----------
    parser : argparse.ArgumentParser
    dtypes, reproducible : str
        The help of --dtype and of --reproducible.
    blocks : bool
        Whether to add --blocks, too.
    """
    parser.add_argument("--dtype", default="float32", help=dtypes)
    add_arguments(parser)
    parser.add_argument("--reproducible", action="store_true", help=reproducible)
    if blocks:
        add_blocks(parser)


def add_blocks(parser: argparse.ArgumentParser) -> None:
    """Add --blocks; blocks_of() reads it."""
    parser.add_argument("--blocks", type=int, metavar="N",
                        help=f"blocks of a dimension in reproducible mode ({BLOCKS})")


def blocks_of(arguments: argparse.Namespace) -> int:
    """Return how many blocks a dimension has in reproducible mode. Raises InputError for --blocks of another mode."""
    if arguments.blocks is None:
        return BLOCKS
    require_positive(blocks=arguments.blocks)
    require(arguments.reproducible, f"--blocks {arguments.blocks} without --reproducible",
            "both: an ordinary run has one block a rank")
    return arguments.blocks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --device, --transport, --share-gpu, --tf32, --stall-limit and --timeline."""
    parser.add_argument("--device", default="cpu", help="cpu (NumPy, the default) or gpu (CuPy)")
    parser.add_argument("--transport", default="auto", help=f"between GPUs: {', '.join(TRANSPORTS)} (auto)")
    parser.add_argument("--share-gpu", action="store_true", help="several ranks may have one GPU")
    parser.add_argument("--tf32", action="store_true", help="products of float32 on the GPU in TF32")
    parser.add_argument("--stall-limit", type=float, metavar="S", help="seconds that a rank waits for another before "
                        "the job ends; 0: for ever (MPITP_STALL_LIMIT, or 600)")
    parser.add_argument("--timeline", metavar="FILE", help="write when each rank did what: FILE.json for Perfetto, "
                        "FILE.png a picture")


def group_of(arguments: argparse.Namespace, **changes: Any) -> TensorParallelGroup:
    """Return the TensorParallelGroup that the options ask for. Collective; warns of ranks on different machines.

    Parameters
    ----------
    arguments : argparse.Namespace
        The options of add_group_arguments.
    **changes
        Arguments of TensorParallelGroup that the options do not give, or that differ from them.
    """
    group = TensorParallelGroup(**{**options_of(arguments), **changes})
    if group.size > 1 and group.device == "cpu":
        warn_of_machines(group)
    record(group, arguments)
    return group


def grid_of(arguments: argparse.Namespace, data: int) -> Any:
    """Return the Grid of so many data ranks that the options ask for. Collective; warns as group_of does."""
    from ..grid import Grid
    grid = Grid(data=data, **options_of(arguments))
    if grid.world.device == "cpu":
        warn_of_machines(grid.world)
    record(grid, arguments)
    return grid


def record(ranks: Any, arguments: argparse.Namespace) -> None:
    """Begin the timeline of a group or a grid that --timeline asks for. Collective."""
    if arguments.timeline:
        from ..timeline.timeline import Timeline
        Timeline(ranks, arguments.timeline).until_closed()


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options as TensorParallelGroup's arguments; --stall-limit goes into the environment."""
    options = dict(device=arguments.device, transport=arguments.transport, share_gpu=arguments.share_gpu,
                   tf32=arguments.tf32, reproducible=arguments.reproducible)
    if "blocks" in arguments:
        options["blocks"] = blocks_of(arguments)
    os.environ.update({} if arguments.stall_limit is None else {"MPITP_STALL_LIMIT": str(arguments.stall_limit)})
    return options


def warn_of_machines(group: TensorParallelGroup) -> None:
    """Say on rank 0 where ranks run on machines whose products differ in the last bits. Collective: 16 bytes."""
    found = disagreement(group.comm, machine())
    if found and group.rank == 0:
        print(f"mpitp: warning: the ranks run on different kinds of machine ({found}): copies of a replicated weight "
              f"come apart in the last bits, and training ends when it compares them", file=sys.stderr, flush=True)
