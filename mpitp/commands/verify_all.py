"""`verify --all`: the table of every layer, and its JSON."""
from dataclasses import dataclass

from .. import __version__
from ..comm import launch
from ..errors import InputError
from . import device, report
from .layers import BATCH, HIDDEN, SEQUENCE, VOCABULARY, Checks

NUMBERS = ("parallel", "dense", "parallel_of_norm", "dense_of_norm")
OF_ONE_BLOCK = ("hidden_size", "ffn_hidden_size", "activation", "gated", "bias", "model", "layer")


@dataclass
class Report:
    mpitp: str
    machine: str
    mpi: str
    ranks: int
    device: str
    dtype: str
    reproducible: bool
    layers: list
    good: bool


def run(arguments):
    """The command on this rank: 0 when every check holds, else 1."""
    given = [f"--{name.replace('_', '-')}" for name in OF_ONE_BLOCK if getattr(arguments, name) not in (None, False)]
    if given:
        raise InputError(f"found {', '.join(given)} beside --all, whose sizes are fixed, expected one or the other")
    with device.group_of(arguments, reproducible=arguments.reproducible, blocks=arguments.blocks,
                         check=True) as group:
        if arguments.json:
            group.root_first(lambda: report.require_writable(arguments.json) if group.rank == 0 else None)
        layers = list(Checks(group, arguments.dtype, arguments.seed).all())
        good = True
        if group.rank == 0:
            good = all(layer.good for layer in layers)
            result = Report(__version__, launch.machine(), launch.library_name(), group.size, arguments.device,
                            str(arguments.dtype), group.reproducible, layers, good)
            print("\n".join(lines(result)), flush=True)
            if arguments.json:
                report.write_json(arguments.json, "mpitp.verify_all/1", result)
        return 0 if all(group.comm.allgather(good)) else 1


def lines(result):
    ranks = f"{result.ranks} rank{'' if result.ranks == 1 else 's'}"
    yield f"mpitp {result.mpitp}: {ranks}, {result.mpi}, {result.device}"
    yield f"{result.machine}"
    yield ""
    yield f"Every layer, forward and backward, {BATCH} x {SEQUENCE} tokens, hidden {HIDDEN}, vocabulary " \
          f"{VOCABULARY}, {result.dtype}"
    yield "error: largest |found - exact| / (eps * magnitude); limit: 4, or twice the dense one"
    yield "of norm: |found - exact| / (eps * |exact|), Euclidean; limit: 128, or 32 times the dense float32 one"
    yield from report.table(
        ("layer", "results", "error", "dense", "of norm", "dense", "collectives", ""),
        [(layer.title, len(layer.ratios), *(number(layer.most(what)) for what in NUMBERS), layer.collectives,
          "ok" if layer.good else "FAILED") for layer in result.layers])
    for layer in result.layers:
        if not layer.as_closed_form:
            yield f"  FAILED  {layer.title}: {layer.collectives} collectives, not those of the closed form"
        for ratio in layer.ratios:
            if not ratio.good:
                yield f"  FAILED  {layer.title}: {ratio.name} {ratio.shape}: error {number(ratio.parallel)}, limit " \
                      f"{number(ratio.limit)}"
            if not ratio.near:
                yield f"  FAILED  {layer.title}: {ratio.name} {ratio.shape}: {number(ratio.parallel_of_norm)} eps of " \
                      f"the norm, limit {number(ratio.limit_of_norm)}"
    if result.reproducible:
        yield ""
        yield "SHA-256 of the results of each layer, the same for any number of ranks:"
        yield from (f"{layer.sha256} {layer.title}" for layer in result.layers)
    yield ""
    yield "every check holds, and every count of collectives is the closed form's" if result.good else \
        "FAILED: see the lines marked FAILED"


def number(value):
    """Two digits or so, without an exponent where that is readable."""
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.1g}"
