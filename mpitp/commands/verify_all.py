"""`verify --all`: the table of every layer, and its JSON."""
from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .. import tables
from ..comm.group import TensorParallelGroup
from ..errors import InputError
from ..verification.every_layer import BATCH, HIDDEN, SEQUENCE, VOCABULARY, EveryLayerCheck, LayerResult
from .verify_report import VerifyReport, json_of, opening, run_checks, take_steps

COLUMNS = ("error", "dense_error", "normwise", "dense_normwise")       # of a Comparison
OF_ONE_BLOCK = ("hidden_size", "ffn_hidden_size", "activation", "gated", "bias", "model", "layer",
                "verify_weights")


@dataclass
class LayersReport(VerifyReport):
    """A LayersReport holds what was found of every layer.

    Parameters
    ----------
    layers : list of LayerResult
    """
    layers: list[LayerResult]

    def as_json(self) -> dict[str, Any]:
        """Return the fields by the keys of the JSON."""
        return {**vars(self), "layers": [json_of(layer) for layer in self.layers]}


def run(arguments: Namespace) -> int:
    """Run the command on this rank, and return 0 when every check holds, else 1."""
    given = [f"--{name.replace('_', '-')}" for name in OF_ONE_BLOCK if getattr(arguments, name) not in (None, False)]
    if given:
        raise InputError(f"found {', '.join(given)} beside --all, whose sizes are fixed, expected one or the other")
    return run_checks(arguments, check_layers, lines, "mpitp.verify_all/1")


def check_layers(group: TensorParallelGroup, arguments: Namespace) -> LayersReport | None:
    """Check every layer. Collective; the report on rank 0, else None."""
    start = opening(group, arguments.dtype)
    layers = take_steps(EveryLayerCheck(group, arguments.dtype, arguments.seed).steps())
    if group.rank != 0:
        return None
    return LayersReport(*start, all(layer.good for layer in layers), layers)


def lines(found: LayersReport) -> Iterator[str]:
    """Yield the lines of the report."""
    yield f"mpitp {found.mpitp}: {tables.count(found.ranks, 'rank')}, {found.mpi}, {found.device}"
    yield f"{found.machine}"
    yield ""
    yield f"Every layer, forward and backward, {BATCH} x {SEQUENCE} tokens, hidden {HIDDEN}, vocabulary " \
          f"{VOCABULARY}, {found.dtype}"
    yield "error: largest |found - exact| / (eps * magnitude); limit: 4, or twice the dense float32 one"
    yield "of norm: |found - exact| / (eps * |exact|), Euclidean; limit: 128, or 32 times dense float32's"
    yield "Look at the last column: ok is a layer that differs from the dense one by rounding alone."
    yield from tables.table(("layer", "results", "error", "dense", "of norm", "dense", "collectives", ""),
                            [row(layer) for layer in found.layers])
    for layer in found.layers:
        if not layer.as_closed_form:
            yield f"  FAILED  {layer.title}: {layer.collectives} collectives, not those of the closed form"
        yield from (f"  FAILED  {layer.title}: {comparison}" for comparison in layer.comparisons
                    if not (comparison.good and comparison.near))
    if found.reproducible:
        yield ""
        yield "SHA-256 of the results of each layer, the same for any number of ranks:"
        yield from (f"{layer.sha256} {layer.title}" for layer in found.layers)
    yield ""
    yield "every check holds, and every count of collectives is the closed form's" if found.good else \
        "FAILED: see the lines marked FAILED"


def row(layer: LayerResult) -> tuple:
    """Return a layer's row of the table: the largest of each ratio over its results."""
    largest = [max(getattr(comparison, column) for comparison in layer.comparisons) for column in COLUMNS]
    return (layer.title, len(layer.comparisons), *map(ratio_text, largest), layer.collectives,
            "ok" if layer.good else "FAILED")


def ratio_text(ratio: float) -> str:
    """Return two digits or so, without an exponent where that is readable."""
    return f"{ratio:.2f}" if ratio >= 0.1 or ratio == 0 else f"{ratio:.1g}"
