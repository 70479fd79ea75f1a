"""Check on the ranks at hand that the parallel feed-forward block equals the dense one.

First the example that tensor parallelism is usually told with: input (1, 5, 10), 10 -> 40 -> 10, what each rank
holds and computes. Then a block of a real size, or out of a checkpoint (--model): forward, and the gradients of
x and of every weight, against the dense computation in float64; collectives, memory and time.
Exits with 1 when a check fails, with 2 on bad input.
"""
from dataclasses import dataclass

from .. import __version__
from ..arrays import HALF_DTYPES
from ..comm import launch
from ..errors import InputError, require_positive
from ..ops.activation import ACTIVATIONS
from . import checks, device, report, verify_all


HIDDEN_SIZE, ACTIVATION = 512, "gelu_tanh"      # where neither an option nor a checkpoint says otherwise


def add_arguments(parser):
    parser.add_argument("--all", action="store_true", help="instead: every layer and whole decoders, small")
    parser.add_argument("--hidden-size", type=int, metavar="D", help=f"features of x and y ({HIDDEN_SIZE})")
    parser.add_argument("--ffn-hidden-size", type=int, metavar="F", help="features of the middle (4 D)")
    parser.add_argument("--seq-length", type=int, default=128, metavar="S", help="tokens of a sequence (128)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="sequences (1)")
    parser.add_argument("--dtype", default="float32", help="float32 (the default) or float64")
    parser.add_argument("--activation", help=f"{', '.join(ACTIVATIONS)} ({ACTIVATION})")
    parser.add_argument("--gated", action="store_true", help="act(x G^T) * (x U^T) in the middle, not act(x U^T)")
    parser.add_argument("--bias", action="store_true", help="biases in all projections")
    parser.add_argument("--seed", type=int, default=0, help="of weights, input and output gradient (0)")
    parser.add_argument("--model", metavar="DIR", help="take the block from a Hugging Face checkpoint folder")
    parser.add_argument("--layer", type=int, metavar="N", help="which layer of it (0)")
    device.add_arguments(parser)
    parser.add_argument("--reproducible", action="store_true",
                        help="the same bits for any number of ranks; prints their SHA-256")
    parser.add_argument("--blocks", type=int, default=8, help="blocks of a dimension in reproducible mode (8)")
    parser.add_argument("--json", metavar="FILE", help="write the report there, too")


@dataclass
class Report:
    mpitp: str
    machine: str
    mpi: str
    ranks: int
    cores_per_rank: int
    idle_cores: int             # of the first rank's node, that no rank may use
    dtype: str
    reproducible: bool
    notebook: checks.Notebook
    block: checks.Block
    good: bool


def run(arguments):
    """The command on this rank: 0 when every check holds, else 1."""
    if arguments.dtype in HALF_DTYPES:
        raise InputError(f"found --dtype {arguments.dtype}, expected float32 or float64, in which NumPy can compute the "
                         f"dense side")
    if arguments.all:
        return verify_all.run(arguments)
    check_arguments(arguments)
    with device.group_of(arguments, reproducible=arguments.reproducible, blocks=arguments.blocks,
                         check=True) as group:
        if arguments.json:
            group.root_first(lambda: report.require_writable(arguments.json) if group.rank == 0 else None)
        if arguments.model:
            layer, what, bytes_read = checks.checkpoint_layer(group, arguments)
        else:
            if arguments.hidden_size is None:
                arguments.hidden_size = HIDDEN_SIZE
            if arguments.ffn_hidden_size is None:
                arguments.ffn_hidden_size = 4 * arguments.hidden_size
            arguments.activation = arguments.activation or ACTIVATION
            layer, what, bytes_read = checks.random_layer(group, arguments), "random weights", None
        cores, idle = launch.share_of_cores(group.comm), launch.idle_cores(group.comm)
        notebook = checks.notebook_example(group, arguments.seed)
        block = checks.check_block(group, layer, what, bytes_read, arguments)
        good = True
        if group.rank == 0:
            good = notebook.allclose and block.good
            result = Report(__version__, launch.machine(), launch.library_name(), group.size, cores, idle,
                            str(layer.dtype), group.reproducible, notebook, block, good)
            print("\n".join(lines(result)), flush=True)
            if arguments.json:
                report.write_json(arguments.json, "mpitp.verify/1", result)
        return 0 if all(group.comm.allgather(good)) else 1


def check_arguments(arguments):
    require_positive(seq_length=arguments.seq_length, batch=arguments.batch, blocks=arguments.blocks)
    if arguments.model is None:
        if arguments.layer is not None:
            raise InputError("found --layer without --model, expected the checkpoint folder that it is a layer of")
        return
    own = {"--hidden-size": arguments.hidden_size, "--ffn-hidden-size": arguments.ffn_hidden_size,
           "--activation": arguments.activation, "--gated": arguments.gated, "--bias": arguments.bias}
    given = [flag for flag, value in own.items() if value not in (None, False)]
    if given:
        raise InputError(f"found {', '.join(given)} beside --model, expected the checkpoint alone to say it")


# --- what is printed -------------------------------------------------------------------------------------

def lines(result):
    ranks = count(result.ranks, "rank")
    yield f"mpitp {result.mpitp}: {ranks}, {count(result.cores_per_rank, 'core')} a rank, {result.mpi}"
    yield f"{result.machine}"
    if result.idle_cores:
        idle = count(result.idle_cores, "core")
        yield f"NOTE: pinned, {idle} of this node idle: python -m mpitp doctor says what to do"
    yield ""
    yield from notebook_lines(result.notebook)
    yield ""
    yield from block_lines(result, result.block)
    yield ""
    yield "every check holds" if result.good else "FAILED: see the lines marked FAILED"


def count(number, noun):
    return f"{number} {noun}{'' if number == 1 else 's'}"


def notebook_lines(found):
    yield "1. The notebook's example: x (1, 5, 10), weights 10 -> 40 -> 10, no bias"
    rows = []
    for part in found.parts:
        first, last = part.features
        rows.append((part.rank, f"{first}:{last}", part.up_shape, part.down_shape, part.partial_shape,
                     f"{part.partial_first_value:+.6f}"))
    yield from report.table(("rank", "features", "h_to_4h [out, in]", "4h_to_h [out, in]", "partial sum",
                             "its first value"), rows)
    yield f"  MPI_Allreduce adds the partial sums: {found.sum_first_value:+.6f}; dense: {found.dense_first_value:+.6f}"
    yield f"  allclose(parallel, dense, rtol=1e-05, atol=1e-05): {found.allclose}{failed(not found.allclose)}; " \
          f"largest difference {found.largest_difference:.1e}"


def block_lines(result, block):
    kind = f"{'gated ' if block.gated else ''}{block.activation}{', biases' if block.bias else ''}"
    yield f"2. A feed-forward block: {block.hidden_size} -> {block.ffn_hidden_size} -> {block.hidden_size}, {kind}, " \
          f"{count(block.tokens, 'token')}, {result.dtype}"
    yield f"   {block.what}{', reproducible mode' if result.reproducible else ''}; " \
          f"error = |found - exact| / (eps * magnitude)"
    yield from report.table(
        ("result", "shape", "parallel", "dense", "limit", ""),
        [(r.name, r.shape, f"{r.parallel:.2f}", f"{r.dense:.2f}", f"{r.limit:.2f}", "ok" if r.good else "FAILED")
         for r in block.ratios])
    wrong = block.collectives != block.expected_collectives
    yield f"  collectives   {said(block.collectives)}, as the closed form says" if not wrong else \
        f"  collectives   {said(block.collectives)}, expected {said(block.expected_collectives)}  FAILED"
    yield f"  on the wire   {report.size(block.wire_bytes_per_rank)} sent by a rank, forward and backward"
    mine = block.parameter_bytes_of_ranks
    to_most = f" to {report.size(max(mine))}" if min(mine) != max(mine) else ""
    yield f"  parameters    {report.size(min(mine))}{to_most} a rank, {report.size(block.parameter_bytes_dense)} dense"
    if block.bytes_read_of_ranks:
        yield f"  read          {', '.join(map(report.size, block.bytes_read_of_ranks))} of the checkpoint by the ranks"
    yield f"  time          forward {report.seconds(block.forward_seconds)}, backward " \
          f"{report.seconds(block.backward_seconds)}, {block.communication_share:.0%} of it in communication " \
          f"(waiting included)"
    for name, digest in block.sha256.items():
        yield f"  sha256 {digest}  {name}"


def said(collectives):
    return ", ".join(f"{calls} x {key}" for key, calls in collectives.items()) or "none"


def failed(it):
    return "  FAILED" if it else ""
