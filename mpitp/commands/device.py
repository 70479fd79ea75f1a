"""The options that say where and how to compute, and the group that they ask for."""
import argparse
from typing import Any

from ..comm.group import TensorParallelGroup
from ..comm.mpi import TRANSPORTS

DTYPES = "float32 (the default), float64; on a GPU float16 and bfloat16 too"


def add_group_arguments(parser: argparse.ArgumentParser, *, dtypes: str = DTYPES, blocks: bool = False,
                        reproducible: str = "the same bits for any number of ranks") -> None:
    """Add --dtype, --device, --transport, --share-gpu, --tf32 and --reproducible.

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
        parser.add_argument("--blocks", type=int, default=8, help="blocks of a dimension in reproducible mode (8)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --device, --transport, --share-gpu and --tf32."""
    parser.add_argument("--device", default="cpu", help="cpu (NumPy, the default) or gpu (CuPy)")
    parser.add_argument("--transport", default="auto", help=f"between GPUs: {', '.join(TRANSPORTS)} (auto)")
    parser.add_argument("--share-gpu", action="store_true", help="several ranks may have one GPU")
    parser.add_argument("--tf32", action="store_true", help="products of float32 on the GPU in TF32")


def group_of(arguments: argparse.Namespace, **changes: Any) -> TensorParallelGroup:
    """Return the TensorParallelGroup that the options ask for. Collective.

    Parameters
    ----------
    arguments : argparse.Namespace
        The options of add_group_arguments.
    **changes
        Arguments of TensorParallelGroup that the options do not give, or that differ from them.
    """
    options = dict(device=arguments.device, transport=arguments.transport, share_gpu=arguments.share_gpu,
                   tf32=arguments.tf32, reproducible=arguments.reproducible)
    if "blocks" in arguments:
        options["blocks"] = arguments.blocks
    return TensorParallelGroup(**{**options, **changes})
