"""Time collectives, matrix products and the blocks on the ranks at hand, each beside its limit.

    allreduce   latency and bandwidth of the collectives by size
    matmul      matrix products of a rank's share, and reading of weights, all ranks at once
    ffn         the feed-forward block, forward and backward, as a share of those limits
    block       a decoder block (layer norms, causal attention, GELU) as a share of its products
    decode      one token after a prompt, 2 layers, as a share of the matrix-vector products

Medians of interleaved rounds, with the fastest and the slowest; a time is that of the slowest rank.
"""
import argparse
from collections.abc import Callable
from functools import partial

from .. import measure, tables
from ..arrays import compute_dtype
from ..comm.group import TensorParallelGroup
from ..errors import InputError, require_positive
from ..plan.machine_file import default_path
from . import device, report
from .bench_page import BenchReport, Fit, Row, draw, lines, read_report, write_csv
from .progress import Progress

BANDWIDTH_BYTES = 1 << 15           # messages whose time is more than latency, so that a link can be their limit
BENCHES = ("allreduce", "matmul", "ffn", "block", "decode")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="*", help=f"{', '.join(BENCHES)} (all)")
    parser.add_argument("--hidden-size", type=int, default=2048, metavar="D", help="of all but allreduce (2048)")
    parser.add_argument("--num-attention-heads", type=int, default=8, metavar="H", help="of block, decode (8)")
    parser.add_argument("--ffn-hidden-size", type=int, metavar="F", help="features of the middle (4 D)")
    parser.add_argument("--seq-length", type=int, default=512, metavar="S", help="tokens (512; and one token)")
    parser.add_argument("--max-bytes", type=int, default=1 << 24, help="largest message of allreduce (16 MiB)")
    parser.add_argument("--rounds", type=int, default=9, help="how many times each is timed (9)")
    device.add_group_arguments(parser, reproducible="the feed-forward block in reproducible mode, too")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--csv", metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", metavar="FILE.png", help="draw them (needs matplotlib: pip install 'mpitp[plot]')")
    parser.add_argument("--calibrate", nargs="?", const=default_path(), metavar="FILE", help="measure this machine for "
                        "`plan`, and write it there (where `plan` looks by itself)")
    parser.add_argument("--from", dest="reports", nargs="+", metavar="FILE",
                        help="draw these reports (--json of several numbers of ranks) with --plot, run nothing")


def run(arguments: argparse.Namespace) -> int:
    """Run the command on this rank; returns 0."""
    if arguments.calibrate:
        from .bench_calibrate import run_calibration        # where it is used
        return run_calibration(arguments)
    check_arguments(arguments)
    if arguments.reports:
        with TensorParallelGroup() as group:
            group.on_root(lambda: draw(arguments.plot, [read_report(path) for path in arguments.reports]))
        return 0
    with device.group_of(arguments, reproducible=False) as group:
        report.require_files(group, arguments.json, arguments.csv, arguments.plot)
        rows, benches = [], arguments.what or BENCHES
        with Progress("bench", len(benches)) as bar:
            for bench in benches:
                bar.what = f"bench {bench}"
                rows += RUN[bench](group, arguments)
                bar.advance()
        result = BenchReport(*report.opening(group), where(group), arguments.dtype, arguments.hidden_size,
                             arguments.ffn_hidden_size, arguments.seq_length, arguments.rounds, rows,
                             fits(rows) if group.size > 1 else [])
        if group.rank == 0:
            report.publish(lines(result), result, "mpitp.bench/1", arguments.json)
            if arguments.csv:
                write_csv(arguments.csv, rows)
            if arguments.plot:
                draw(arguments.plot, [tables.plain(result)])
    return 0


def check_arguments(arguments: argparse.Namespace) -> None:
    """Fill in --ffn-hidden-size; raise InputError for what cannot be timed or drawn."""
    unknown = [name for name in arguments.what if name not in BENCHES]
    if unknown:
        raise InputError(f"found bench {unknown[0]!r}, expected {', '.join(BENCHES)}")
    require_positive(hidden_size=arguments.hidden_size, seq_length=arguments.seq_length, rounds=arguments.rounds,
                     max_bytes=arguments.max_bytes, num_attention_heads=arguments.num_attention_heads)
    if arguments.ffn_hidden_size is None:
        arguments.ffn_hidden_size = 4 * arguments.hidden_size
    require_positive(ffn_hidden_size=arguments.ffn_hidden_size)
    if arguments.hidden_size % arguments.num_attention_heads and {"block", "decode"} & set(arguments.what or BENCHES):
        raise InputError(f"found num_attention_heads = {arguments.num_attention_heads}, expected a divisor of "
                         f"hidden_size = {arguments.hidden_size}")
    compute_dtype(arguments.dtype, arguments.device)
    if arguments.reports and not arguments.plot:
        raise InputError("found --from without --plot, expected the file to draw")
    if arguments.plot and not {"allreduce", "ffn", "block"} & set(arguments.what or BENCHES):
        raise InputError(f"found --plot of {' and '.join(arguments.what)} alone, expected allreduce, ffn or block, "
                         f"which are drawn")
    if arguments.plot:
        try:
            import matplotlib       # noqa: F401
        except ImportError:
            raise InputError("found no matplotlib, expected it for --plot: pip install 'mpitp[plot]'") from None


def where(group: TensorParallelGroup) -> str:
    """Return the device of the group, and on GPUs how they add up."""
    return "cpu" if group.gpu is None else f"{group.gpu.name}, transport {group.transport.name}"


# --- what is measured ----------------------------------------------------------------------------------------

def timed(group: TensorParallelGroup, cases: dict[str, Callable], arguments: argparse.Namespace,
          least_seconds: float) -> dict[str, list[float]]:
    """Time the cases; {name: seconds of each round}, from an idle GPU to an idle GPU where there is one."""
    cases = {name: measure.finished(group, function) for name, function in cases.items()}
    return measure.interleave(group, cases, arguments.rounds, least_seconds)


def row(bench: str, case: str, seconds: list[float], size: int | None = None, work: int | None = None,
        limit: list[float] | None = None) -> Row:
    """Return the Row of a case.

    Parameters
    ----------
    bench, case : str
    seconds : list of float
        One time a round.
    size, work : int or None
        The bytes that were moved, the flops that were done.
    limit : list of float or None
        The times of what it cannot beat, in the same rounds.
    """
    time = measure.timing(seconds)
    return Row(bench, case, size, work, time.median, time.least, time.most, size and size / time.median,
               work and work / time.median, 1 / measure.ratio(seconds, limit) if limit else None)


def collectives(group: TensorParallelGroup, arguments: argparse.Namespace) -> list[Row]:
    """Time the four collectives for arrays of 8 bytes up to --max-bytes, beside what neighbours exchange meanwhile.

    The limit of a collective is the time in which the slowest of the links between rank p and p + 1 carries as many
    bytes, both ways at once, as a rank sends at least.
    """
    cases: dict[str, Callable] = {}
    sizes: dict[str, int] = {}
    shares = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "broadcast": 1}    # times (P-1)/P of the array
    size = 8
    while size <= arguments.max_bytes:
        x = group.xp.ones(size // 8)
        partition = group.partition(x.size)
        part = group.xp.ones(partition.lengths[group.rank])
        cases |= {f"all_reduce {size}": partial(group.all_reduce, x, out=x),
                  f"all_gather {size}": partial(group.all_gather, part, partition),
                  f"reduce_scatter {size}": partial(group.reduce_scatter, x, partition),
                  f"broadcast {size}": partial(group.broadcast, x)}
        sizes |= {name: size for name in list(cases)[-4:]}
        if group.size > 1 and group.device == "cpu" and size >= BANDWIDTH_BYTES:
            cases[f"neighbours {size}"] = measure.exchange_case(group, size)
        size *= 8
    times = timed(group, cases, arguments, 2e-4)
    by_operation = sorted(sizes, key=lambda name: (name.split()[0], sizes[name]))
    rows = []
    for name in by_operation:
        operation, limit = name.split()[0], times.get(f"neighbours {sizes[name]}")
        if limit:
            limit = [seconds * shares[operation] * (group.size - 1) / group.size for seconds in limit]
        rows.append(row("allreduce", operation, times[name], sizes[name], None, limit))
    return rows


def fits(rows: list[Row]) -> list[Fit]:
    """Return alpha and beta of each collective that was timed for small and for large messages."""
    found = []
    for operation in dict.fromkeys(r.case for r in rows if r.bench == "allreduce"):
        times = {r.bytes: r.median_seconds for r in rows if r.bench == "allreduce" and r.case == operation and r.bytes}
        if min(times) < BANDWIDTH_BYTES <= max(times):
            found.append(Fit(operation, *measure.latency_and_rate(times)))
    return found


def products(group: TensorParallelGroup, arguments: argparse.Namespace) -> list[Row]:
    """Time the bare products of a rank's share of the block, and a read of its weights."""
    D, F, tokens = arguments.hidden_size, arguments.ffn_hidden_size, arguments.seq_length
    cases = measure.product_cases(group, tokens, D, F, arguments.dtype)
    cases |= measure.read_case(group, D, F, arguments.dtype)
    times = timed(group, cases, arguments, 1e-3)
    weight_bytes = 2 * D * F * compute_dtype(arguments.dtype, group.device).itemsize
    return [row("matmul", name, times[name], weight_bytes) if name == "read" else
            row("matmul", name, times[name], None, measure.flops(tokens, D, F, "backward" in name)) for name in cases]


def feed_forward(group: TensorParallelGroup, arguments: argparse.Namespace) -> list[Row]:
    """Time the feed-forward block, in reproducible mode too where that was asked for."""
    D, F, tokens = arguments.hidden_size, arguments.ffn_hidden_size, arguments.seq_length
    weight_bytes = 2 * D * F * compute_dtype(arguments.dtype, group.device).itemsize
    cases, layer = measure.mlp_cases(group, tokens, D, F, dtype=arguments.dtype)
    one, _ = measure.mlp_cases(group, 1, D, F, dtype=arguments.dtype, prefix="one token ")
    cases = measure.product_cases(group, tokens, D, F, arguments.dtype) | cases
    cases |= measure.read_case(group, D, F, arguments.dtype) | {"one token forward": one["one token forward"]}
    times = timed(group, cases, arguments, 1e-3)
    rows = [row("ffn", name, times[name], None, measure.flops(tokens, D, F, "backward" in name),
                times[f"products {name}"]) for name in ("forward", "forward+backward")]
    rows.append(row("ffn", "one token forward", times["one token forward"], weight_bytes, None, times["read"]))
    if arguments.reproducible:
        with device.group_of(arguments, comm=group.comm, transport=group.transport.name, share_gpu=True) as fixed:
            again, _ = measure.mlp_cases(fixed, tokens, D, F, dtype=arguments.dtype, prefix="reproducible ")
            cases = measure.product_cases(group, tokens, D, F, arguments.dtype) | again
            times = timed(group, cases, arguments, 1e-3)
        rows += [row("ffn", name, times[name], None, measure.flops(tokens, D, F, "backward" in name),
                     times[name.replace("reproducible", "products")]) for name in again]
    return rows


def decoder_block(group: TensorParallelGroup, arguments: argparse.Namespace) -> list[Row]:
    """Time a decoder block."""
    sizes = arguments.seq_length, arguments.hidden_size, arguments.num_attention_heads
    cases = measure.block_product_cases(group, *sizes, arguments.dtype)
    cases |= measure.block_cases(group, *sizes, arguments.dtype)
    times = timed(group, cases, arguments, 1e-3)
    tile = measure.tile_of(group)
    return [row("block", name, times[name], None, measure.block_flops(*sizes[:2], "backward" in name, tile),
                times[f"products {name}"]) for name in ("forward", "forward+backward")]


def one_token(group: TensorParallelGroup, arguments: argparse.Namespace) -> list[Row]:
    """Time one token of a small decoder, after a prompt."""
    sizes = arguments.seq_length, arguments.hidden_size, arguments.num_attention_heads
    cases, model = measure.decode_cases(group, *sizes, arguments.dtype)
    times = timed(group, cases, arguments, 1e-3)
    weight_bytes = sum(w.nbytes for w in model.weights.values()) * group.size
    return [row("decode", name, times[name], weight_bytes, None, times["matrix-vector products"]) for name in cases]


RUN = {"allreduce": collectives, "matmul": products, "ffn": feed_forward, "block": decoder_block, "decode": one_token}
