"""Check on the ranks at hand that the parallel feed-forward block equals the dense one.

First the example that tensor parallelism is usually told with: input (1, 5, 10), 10 -> 40 -> 10, what each rank
holds and computes. Then a block of a real size, or out of a checkpoint (--model): forward, and the gradients of
x and of every weight, against the dense computation in float64; collectives, memory and time.
Exits with 1 when a check fails, with 2 on bad input.
"""
from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .. import tables
from ..arrays import HALF_DTYPES
from ..comm import launch
from ..comm.group import TensorParallelGroup
from ..errors import InputError, require_positive
from ..ops.activation import ACTIVATIONS
from ..verification.feed_forward import (FeedForwardCheck, FeedForwardResult, checkpoint_layer, random_layer,
                                         require_room)
from ..verification.notebook import Notebook, notebook_example
from . import device, model, verify_all
from .verify_report import VerifyReport, json_of, opening, run_checks, take_steps

HIDDEN_SIZE, ACTIVATION = 512, "gelu_tanh"      # where neither an option nor a checkpoint says otherwise


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `verify`."""
    parser.add_argument("--all", action="store_true", help="instead: every layer and whole decoders, small")
    parser.add_argument("--hidden-size", type=int, metavar="D", help=f"features of x and y ({HIDDEN_SIZE})")
    parser.add_argument("--ffn-hidden-size", type=int, metavar="F", help="features of the middle (4 D)")
    parser.add_argument("--seq-length", type=int, default=128, metavar="S", help="tokens of a sequence (128)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="sequences (1)")
    parser.add_argument("--activation", help=f"{', '.join(ACTIVATIONS)} ({ACTIVATION})")
    parser.add_argument("--gated", action="store_true", help="act(x G^T) * (x U^T) in the middle, not act(x U^T)")
    parser.add_argument("--bias", action="store_true", help="biases in all projections")
    parser.add_argument("--seed", type=int, default=0, help="of weights, input and output gradient (0)")
    parser.add_argument("--model", metavar="DIR", help="take the block from a Hugging Face checkpoint folder")
    parser.add_argument("--layer", type=int, metavar="N", help="which layer of it (0)")
    model.add_verify_weights(parser)
    device.add_group_arguments(parser, dtypes="float32 (the default) or float64", blocks=True,
                               reproducible="the same bits for any number of ranks; prints their SHA-256")
    parser.add_argument("--json", metavar="FILE", help="write the report there, too")


@dataclass
class BlockReport(VerifyReport):
    """A BlockReport holds the example and one feed-forward block.

    Parameters
    ----------
    idle_cores : int
        Of the first rank's node, which no rank may use.
    notebook : Notebook
    block : FeedForwardResult
    """
    idle_cores: int
    notebook: Notebook
    block: FeedForwardResult

    def as_json(self) -> dict[str, Any]:
        """Return the fields by the keys of the JSON."""
        return {**vars(self), "block": json_of(self.block)}


def run(arguments: Namespace) -> int:
    """Run the command on this rank, and return 0 when every check holds, else 1."""
    if arguments.dtype in HALF_DTYPES:
        raise InputError(f"found --dtype {arguments.dtype}, expected float32 or float64, in which NumPy can compute "
                         f"the dense side")
    if arguments.all:
        return verify_all.run(arguments)
    check_arguments(arguments)
    return run_checks(arguments, check_block, lines, "mpitp.verify/1")


def check_block(group: TensorParallelGroup, arguments: Namespace) -> BlockReport | None:
    """Check the example, and the block that the options ask for. Collective; the report on rank 0, else None."""
    tokens = arguments.batch * arguments.seq_length
    if arguments.model:
        layer, what, bytes_read = checkpoint_layer(group, arguments.model, arguments.layer or 0, arguments.dtype,
                                                   tokens, arguments.verify_weights)
    else:
        hidden_size = HIDDEN_SIZE if arguments.hidden_size is None else arguments.hidden_size
        ffn_hidden_size = 4 * hidden_size if arguments.ffn_hidden_size is None else arguments.ffn_hidden_size
        require_room(group, hidden_size, ffn_hidden_size, arguments.gated, tokens)
        layer = random_layer(group, hidden_size, ffn_hidden_size, arguments.activation or ACTIVATION, arguments.gated,
                             arguments.bias, arguments.dtype, arguments.seed)
        what, bytes_read = "random weights", None
    start, idle = opening(group, layer.dtype), launch.idle_cores(group.comm)
    notebook = notebook_example(group, arguments.seed)
    check = FeedForwardCheck(group, layer, arguments.batch, arguments.seq_length, arguments.seed, what, bytes_read)
    block = take_steps(check.steps())[-1]
    if notebook is None or block is None:
        return None
    return BlockReport(*start, notebook.allclose and block.good, idle, notebook, block)


def check_arguments(arguments: Namespace) -> None:
    """Raise InputError for options that do not fit each other."""
    require_positive(seq_length=arguments.seq_length, batch=arguments.batch)
    if arguments.model is None:
        if arguments.layer is not None:
            raise InputError("found --layer without --model, expected the checkpoint folder that it is a layer of")
        if arguments.verify_weights:
            raise InputError("found --verify-weights without --model, expected the checkpoint folder to verify")
        return
    of_random_block = {"--hidden-size": arguments.hidden_size, "--ffn-hidden-size": arguments.ffn_hidden_size,
                       "--activation": arguments.activation, "--gated": arguments.gated, "--bias": arguments.bias}
    given = [flag for flag, setting in of_random_block.items() if setting not in (None, False)]
    if given:
        raise InputError(f"found {', '.join(given)} beside --model, expected the checkpoint alone to say it")


# --- what is printed -------------------------------------------------------------------------------------

def lines(found: BlockReport) -> Iterator[str]:
    """Yield the lines of the report."""
    ranks = tables.count(found.ranks, "rank")
    yield f"mpitp {found.mpitp}: {ranks}, {tables.count(found.cores_per_rank, 'core')} a rank, {found.mpi}"
    yield f"{found.machine}"
    if found.idle_cores:
        idle = tables.count(found.idle_cores, "core")
        yield f"NOTE: pinned, {idle} of this node idle: python -m mpitp doctor says what to do"
    yield ""
    yield from notebook_lines(found.notebook)
    yield ""
    yield from block_lines(found, found.block)
    yield ""
    yield "every check holds" if found.good else "FAILED: see the lines marked FAILED"


def notebook_lines(notebook: Notebook) -> Iterator[str]:
    """Yield the table of the example."""
    yield "1. The notebook's example: x (1, 5, 10), weights 10 -> 40 -> 10, no bias"
    yield "   Look at `its first value`: no rank has y's, only a summand of it."
    rows = []
    for part in notebook.parts:
        first, last = part.features
        rows.append((part.rank, f"{first}:{last}", part.up_shape, part.down_shape, part.partial_shape,
                     f"{part.partial_first_value:+.6f}"))
    yield from tables.table(("rank", "features", "h_to_4h [out, in]", "4h_to_h [out, in]", "partial sum",
                             "its first value"), rows)
    yield f"  MPI_Allreduce adds the partial sums: {notebook.sum_first_value:+.6f}; dense: " \
          f"{notebook.dense_first_value:+.6f}"
    yield f"  allclose(parallel, dense, rtol=1e-05, atol=1e-05): {notebook.allclose}" \
          f"{'' if notebook.allclose else '  FAILED'}; largest difference {notebook.largest_difference:.1e}"


def block_lines(found: BlockReport, block: FeedForwardResult) -> Iterator[str]:
    """Yield the table of the block, and its figures."""
    kind = f"{'gated ' if block.gated else ''}{block.activation}{', biases' if block.bias else ''}"
    yield f"2. A feed-forward block: {block.hidden_size} -> {block.ffn_hidden_size} -> {block.hidden_size}, {kind}, " \
          f"{tables.count(block.tokens, 'token')}, {found.dtype}"
    yield f"   {block.what}{', reproducible mode' if found.reproducible else ''}; " \
          f"error = |found - exact| / (eps * magnitude)"
    yield "   Look at `parallel` beside `dense`: rounding makes both, and a mistake would pass the limit."
    yield from tables.table(
        ("result", "shape", "parallel", "dense", "limit", ""),
        [(c.name, c.shape, f"{c.error:.2f}", f"{c.dense_error:.2f}", f"{c.limit:.2f}",
          "ok" if block.is_good(c) else "FAILED") for c in block.comparisons])
    yield from (f"  {comparison}" for comparison in block.comparisons if not block.is_good(comparison))
    yield collectives_line(block)
    yield f"  on the wire   {tables.size(block.wire_bytes_per_rank)} sent by a rank, forward and backward"
    least, most = min(block.parameter_bytes_of_ranks), max(block.parameter_bytes_of_ranks)
    to_most = f" to {tables.size(most)}" if least != most else ""
    yield f"  parameters    {tables.size(least)}{to_most} a rank, {tables.size(block.parameter_bytes_dense)} dense"
    if block.bytes_read_of_ranks:
        yield f"  read          {', '.join(map(tables.size, block.bytes_read_of_ranks))} of the checkpoint by the ranks"
    yield f"  time          forward {tables.seconds(block.forward_seconds)}, backward " \
          f"{tables.seconds(block.backward_seconds)}, {block.communication_share:.0%} of it in communication " \
          f"(waiting included)"
    yield from (f"  sha256 {digest}  {name}" for name, digest in block.sha256.items())


def collectives_line(block: FeedForwardResult) -> str:
    """Return the line that sets counted collectives beside the closed form's."""
    counted, expected = collectives_text(block.collectives), collectives_text(block.expected_collectives)
    if block.collectives == block.expected_collectives:
        return f"  collectives   {counted}, as the closed form says"
    return f"  collectives   {counted}, expected {expected}  FAILED"


def collectives_text(collectives: dict[str, int]) -> str:
    """Return counted collectives as text: "2 x all_reduce 65536 float32"."""
    return ", ".join(f"{calls} x {key}" for key, calls in collectives.items()) or "none"
