"""Loss and perplexity of a text under the model of a Hugging Face checkpoint folder.

A window of --window tokens moves by --stride. Each token but the first counts once, in the first window that sees the
one before it: so all but those of the first window are predicted from at least window - stride others. The loss is the
mean of -log p over the tokens that count, the perplexity e^loss. Text needs `tokenizers` (pip install 'mpitp[text]').
A file may have any length: a rank holds 4 bytes for each of its tokens, and what one window needs.
"""
from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .. import tables
from ..checkpoints.loading import load_model
from ..comm.patience import on_root_asleep
from ..errors import require, require_positive
from ..layers.decoder import Decoder
from . import ask_plan, device, model, prompts, report, text
from .progress import Progress
from .tokenizer import tokenizer_of
from .tokenizer_process import Tokenizer

WINDOW = 1024
LOGITS = 1 << 24        # that are made at a time: a long window's would take gigabytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model.add_arguments(parser)
    parser.add_argument("--text", metavar="FILE", help="a UTF-8 text")
    parser.add_argument("--ids-file", metavar="FILE", help="token ids, with commas, spaces or lines between")
    parser.add_argument("--window", type=int, metavar="W", help=f"tokens seen at once ({WINDOW}, or fewer where the "
                        "model has fewer positions)")
    prompts.add_no_bos(parser)
    parser.add_argument("--stride", type=int, metavar="S", help="by which the window moves, up to W (W / 2)")
    model.add_weights(parser)
    device.add_group_arguments(parser, dtypes=f"to compute in: {device.DTYPES}")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")


@dataclass
class ScoreReport(report.Report):
    """Everything that is printed and written."""
    model: str
    dtype: str
    weights: str
    activations: str
    reproducible: bool
    tokens: int                     # of the text
    counted: int                    # all but the first
    utf8_bytes: int | None          # of the text
    window: int
    stride: int
    windows: int
    loss: float                     # nats a token
    perplexity: float | None        # null beyond what a float holds
    bits_per_byte: float | None
    bits_per_token: float
    seconds: float
    bytes_read_of_ranks: list


@dataclass
class Given:
    """What is to be scored, on rank 0: token ids, or a text, whose tokenizer loads meanwhile."""
    ids: np.ndarray | None
    content: str | None = None
    tokenizer: Tokenizer | None = None


def run(arguments: argparse.Namespace) -> int:
    """Run the command on this rank; return 0."""
    check_arguments(arguments)
    text.print_any_character()
    with device.group_of(arguments) as group:
        given = group.on_root(lambda: look_first(arguments))
        ask_plan.scoring(group, arguments, given, WINDOW)
        with Progress(f"loading {arguments.model}"):
            decoder = load_model(arguments.model, group, arguments.dtype, strict=arguments.strict,
                                 verify_weights=arguments.verify_weights, weights=arguments.weights,
                                 activations=arguments.activations)
        ids = text.give_ids(group, on_root_asleep(group, lambda: tokens_of(arguments, given)))
        require(decoder.config.causal, f"attention in both directions in {arguments.model}",
                "a causal model, whose tokens do not see those that they are to predict")
        window, stride = sizes(arguments, decoder)
        started = time.perf_counter()
        with Progress("windows", 1 + max(0, -(-(len(ids) - 1 - window) // stride))) as bar:
            loss, counted, windows = score(decoder, ids, window, stride, bar)
        seconds = time.perf_counter() - started
        opening, bytes_read = report.opening(group), group.report(decoder.bytes_read)
        if given is not None and bytes_read is not None:        # on rank 0
            utf8 = None if given.content is None else len(given.content.encode())
            bits = loss / math.log(2)
            result = ScoreReport(*opening, arguments.model, arguments.dtype, arguments.weights, arguments.activations,
                                 group.reproducible, len(ids), counted, utf8, window, stride, windows, loss,
                                 math.exp(loss) if loss < 700 else None, bits * counted / utf8 if utf8 else None, bits,
                                 seconds, bytes_read)
            report.publish(lines(result), result, "mpitp.score/1", arguments.json)
    return 0


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise InputError unless there is one kind of text, and for a window or stride that is no size."""
    require((arguments.text is None) != (arguments.ids_file is None),
            "neither --text nor --ids-file" if arguments.text is None else "--text and --ids-file", "one of them")
    require(not arguments.no_bos or arguments.text is not None, "--no-bos with --ids-file", "--text: a tokenizer's "
            "tokens are left out")
    if arguments.window is not None:
        require_positive(window=arguments.window)
    if arguments.stride is not None:
        require_positive(stride=arguments.stride)


def look_first(arguments: argparse.Namespace) -> Given:
    """Read the text, or the ids, before anything is loaded."""
    if arguments.json:
        tables.require_writable(arguments.json)
    if arguments.text is None:
        return Given(text.read_ids(arguments.ids_file))
    return Given(None, text.read_text(arguments.text), tokenizer_of(arguments.model))


def tokens_of(arguments: argparse.Namespace, given: Given | None) -> np.ndarray:
    """Return the ids of the text, on rank 0. Raises InputError for fewer than two."""
    assert given is not None
    ids = given.ids
    if given.tokenizer is not None and given.content is not None:
        ids = np.array(text.encode(given.tokenizer, given.content, arguments.no_bos, arguments.text), np.int32)
        given.tokenizer.close()                 # and its memory is free
    assert ids is not None
    require(len(ids) > 1, f"{len(ids)} tokens in {arguments.text or arguments.ids_file}", "at least 2: the first has "
            "nothing before it")
    return ids


def sizes(arguments: argparse.Namespace, model: Decoder) -> tuple[int, int]:
    """Return window and stride. Raises InputError for a window of more positions than the model has."""
    most = model.position.max_positions if model.position else None
    window = arguments.window or min(WINDOW, most or WINDOW)
    require(most is None or window <= most, f"window = {window}", f"at most {most}, the model's learned positions")
    stride = arguments.stride or max(1, window // 2)
    require(stride <= window, f"stride = {stride}", f"at most {window}, the window: every token counts")
    return window, stride


def score(model: Decoder, ids: np.ndarray, window: int, stride: int,
          bar: Progress | None = None) -> tuple[float, int, int]:
    """Return (mean of -log p over all tokens but the first, how many those are, how many windows). Collective.

    Window w sees ids[w stride : w stride + window] and predicts the one behind each.
    """
    rows = max(1, LOGITS // model.config.vocab_size)        # whatever the number of ranks: part of the bits
    total, done, start, windows = 0.0, 1, 0, 0              # ids[:done] have counted, or have nothing before them
    while done < len(ids):
        seen = ids[start:min(start + window, len(ids) - 1)]
        targets = ids[start + 1:start + 1 + len(seen)]
        x, _ = model.hidden(seen[None], save=False)
        for first in range(max(0, done - start - 1), len(seen), rows):
            piece = slice(first, first + rows)
            logits, _ = model.head.forward(x[:, piece], save=False)
            total += model.loss(logits, targets[None, piece])[0] * len(targets[piece])
        done, start, windows = start + 1 + len(seen), start + stride, windows + 1
        if bar is not None:
            bar.advance()
    return total / (len(ids) - 1), len(ids) - 1, windows


def lines(result: ScoreReport) -> Iterator[str]:
    """Yield the lines that are printed."""
    found = [f"loss {result.loss:.6f} nats a token",
             f"perplexity {result.perplexity:.6g}" if result.perplexity else "a perplexity beyond any number"]
    if result.bits_per_byte is not None:
        found.append(f"{result.bits_per_byte:.4f} bits a byte")
    yield ", ".join(found)
    windows = tables.count(result.windows, "window")
    yield f"  {result.counted} tokens count, in {windows} of up to {result.window}, every {result.stride}"
    read = ", ".join(map(tables.size, result.bytes_read_of_ranks))
    rate = f"{result.counted / result.seconds:.0f} tokens/s"
    yield f"  {tables.seconds(result.seconds)}, {rate}; {read} read by the ranks"
    yield report.ranks_line(result)
