"""What each of P ranks would hold and read of a Hugging Face checkpoint folder, or of a step folder. Needs no mpirun.

All that loading checks is checked: headers, names, shapes, config.json. Weights are not read, but for a head that is
stored beside tied embeddings and stored buffers, which are compared. Exits with 2 where a fault is found.
"""
from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from .. import tables
from ..checkpoints.model_folder import open_folder
from ..checkpoints.safetensors import STORED
from ..comm.launch import is_first_rank
from ..config import DecoderConfig
from ..errors import printable, require, require_positive
from ..plan.tensors import kept_in
from ..sharding.parameters import Place
from . import device, model, text

MOST = 1 << 14


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help="checkpoint folder: config.json, model.safetensors or its shards; "
                        "or a step folder of train")
    parser.add_argument("-n", "--ranks", type=int, default=1, metavar="P", help="how many ranks (1)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"), help="computed in (float32)")
    parser.add_argument("--weights", default="float32", choices=("float32", "bfloat16"), help="kept as generate's")
    parser.add_argument("--reproducible", action="store_true", help="as it would be split in reproducible mode")
    device.add_blocks(parser)
    model.add_strict(parser)
    parser.add_argument("--json", metavar="FILE", help="write the report there, too")


@dataclass
class Rank:
    rank: int
    query_heads: int
    key_value_heads: int        # held: several ranks may have a copy of one
    ffn_features: int
    vocabulary: int
    hold_bytes: int
    read_bytes: int


@dataclass
class Parameter:
    """A Parameter is one of the model, or those of one name in all layers."""
    name: str
    stored_as: str
    shape: tuple
    count: int
    split: str
    stored_dtype: str
    stored_bytes: int
    hold_bytes_of_ranks: list


@dataclass
class InspectReport:
    """Everything that is printed and written of one checkpoint."""
    model: str
    family: str
    config: DecoderConfig
    dtype: str
    weights: str
    reproducible: bool
    files: int
    parameters: int             # numbers, in all
    stored_bytes: int
    ranks: list
    tensors: list
    other_keys: list


def run(arguments: argparse.Namespace) -> int:
    """Run the command on this rank; return 0."""
    require_positive(ranks=arguments.ranks)
    blocks = device.blocks_of(arguments)
    require(max(arguments.ranks, blocks) <= MOST, f"{arguments.ranks} ranks, {blocks} blocks", f"at most {MOST}")
    text.print_any_character()
    if arguments.json:
        tables.require_writable(arguments.json)
    if is_first_rank():
        found = inspect(arguments)
        print("\n".join(lines(found)), flush=True)
        if arguments.json:
            tables.write_json(arguments.json, "mpitp.inspect/1", found)
    return 0


def inspect(arguments: argparse.Namespace) -> InspectReport:
    """Open the folder and count what each rank would hold and read."""
    folder, ranks = open_folder(arguments.model, strict=arguments.strict), arguments.ranks
    folder.warn()
    blocks = device.blocks_of(arguments) if arguments.reproducible else ranks
    places = [Place(rank, ranks, blocks) for rank in range(ranks)]
    require("float32" in (arguments.weights, arguments.dtype),
            f"--weights {arguments.weights} with --dtype {arguments.dtype}", "--dtype float32")
    kinds: dict[str, Parameter] = {}
    held, read = [0] * ranks, [0] * ranks
    for name, spec in folder.specs.items():
        stored = folder.views[name].dtype
        size = np.dtype(kept_in(name, spec, arguments.dtype, arguments.weights)).itemsize
        elements = [prod(spec.local_shape(place)) for place in places]
        for rank, n in enumerate(elements):
            held[rank] += n * size
            read[rank] += n * np.dtype(STORED[stored]).itemsize
        kind = re.sub(r"\d+", "*", name, count=1)
        of_kind = kinds.get(kind)
        if of_kind is None:
            of_kind = kinds[kind] = Parameter(kind, re.sub(r"\.\d+\.", ".*.", folder.layouts[name].name, count=1),
                                              spec.shape, 0, {None: "no", 0: "rows", 1: "columns"}[spec.axis],
                                              stored, 0, [0] * ranks)
        of_kind.count += 1
        of_kind.stored_bytes += prod(spec.shape) * np.dtype(STORED[stored]).itemsize
        of_kind.hold_bytes_of_ranks = [a + n * size for a, n in zip(of_kind.hold_bytes_of_ranks, elements)]
    config, specs = folder.config, folder.specs
    of_ranks = []
    for rank in range(ranks):
        rows = {part: specs[name].local_shape(places[rank])[0] for part, name in (
            ("query", "layers.0.attention.query.weight"), ("key", "layers.0.attention.key.weight"),
            ("up", "layers.0.mlp.up.weight"), ("vocabulary", "embedding.weight"))}
        of_ranks.append(Rank(rank, rows["query"] // config.head_dim, rows["key"] // config.head_dim, rows["up"],
                             rows["vocabulary"], held[rank], read[rank]))
    return InspectReport(
        folder.checkpoint.folder, folder.checkpoint.kind, config, arguments.dtype, arguments.weights,
        arguments.reproducible, len(folder.checkpoint.files), sum(prod(spec.shape) for spec in specs.values()),
        sum(kind.stored_bytes for kind in kinds.values()), of_ranks, list(kinds.values()), folder.other_keys)


def lines(found: InspectReport) -> Iterator[str]:
    """Yield the lines that are printed."""
    config = found.config
    yield printable(found.model)
    yield f"  {found.family}: {count(found.parameters)} parameters, {tables.size(found.stored_bytes)} in " \
          f"{found.files} file{'' if found.files == 1 else 's'}"
    yield f"  {tables.count(config.num_layers, 'layer')}, hidden {config.hidden_size}, " \
          f"{tables.count(config.num_attention_heads, 'query head')} and " \
          f"{tables.count(config.query_groups, 'key/value head')} of {config.head_dim}"
    yield f"  {'gated ' if config.gated else ''}{config.activation} of {config.ffn_size} features, vocabulary " \
          f"{count(config.vocab_size)}{', tied head' if config.tie_word_embeddings else ''}" \
          f"{'' if config.causal else ', attention in both directions'}"
    yield ""
    yield f"Of {tables.count(len(found.ranks), 'rank')}, in {found.dtype}" \
          f"{', matrices in bfloat16' if found.weights == 'bfloat16' else ''}" \
          f"{', reproducible mode' if found.reproducible else ''}, each would have"
    yield "Look at `holds`: the memory of a rank's weights; keys, values and what is computed come on top."
    yield from tables.table(
        ("rank", "query heads", "kv heads", "ffn features", "vocabulary", "holds", "reads"),
        [(r.rank, r.query_heads, r.key_value_heads, r.ffn_features, count(r.vocabulary), tables.size(r.hold_bytes),
          tables.size(r.read_bytes)) for r in found.ranks])
    yield ""
    yield from tables.table(
        ("parameter", "of shape", "as many", "split", "stored", "a rank holds"),
        [(kind.name, "x".join(map(str, kind.shape)), kind.count, kind.split, kind.stored_dtype,
          span(kind.hold_bytes_of_ranks)) for kind in found.tensors])
    if found.other_keys:
        yield ""
        yield from wrapped("NOTE: keys of config.json that this family does not have: ",
                           map(printable, found.other_keys))


def count(number: int) -> str:
    """Return a number with commas."""
    return f"{number:,}"


def span(sizes: list[int]) -> str:
    """Return the least and the largest of some numbers of bytes."""
    least, most = tables.size(min(sizes)), tables.size(max(sizes))
    return most if least == most else f"{least} to {most}"


def wrapped(head: str, words: Iterable[str], width: int = 98) -> Iterator[str]:
    """Yield lines of words with commas between them, behind a head."""
    words = list(words)
    line = head
    for i, word in enumerate(words):
        word += "" if i == len(words) - 1 else ","
        if len(line) + len(word) > width:
            yield line.rstrip()
            line = "  "
        line += word + " "
    yield line.rstrip()
