"""Continue prompts with the model of a Hugging Face checkpoint folder, each rank holding and reading its slices only.

Text needs `tokenizers` (pip install 'mpitp[text]'); --ids works without. One prompt streams; several (--prompt or --ids
more than once, --batch-file) are continued together and printed at the end. Greedy unless --temperature says otherwise.
Then the figures: a share of communication is the mean of the ranks, waiting for each other included.
"""
from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from .. import tables
from ..checkpoints.loading import load_model
from ..comm.group import TensorParallelGroup
from ..errors import require, require_positive
from ..inference.generation import ENDED, generate
from . import device, model, report, text
from .progress import Progress, progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model.add_arguments(parser)
    parser.add_argument("--prompt", metavar="TEXT", action="append", help="a text to continue")
    parser.add_argument("--ids", metavar="1,2,3", action="append", help="token ids to continue; prints ids")
    parser.add_argument("--batch-file", metavar="FILE", help="texts to continue, one a line")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="at most (64)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="draw from softmax(logits / T); 0: "
                        "take the most probable token (the default)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the most probable tokens that make up P")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    parser.add_argument("--ignore-eos", action="store_true", help="go on behind an end token")
    model.add_weights(parser)
    device.add_group_arguments(parser, dtypes=f"to compute in: {device.DTYPES}")
    parser.add_argument("--json", metavar="FILE", help="write text, ids and figures there")


@dataclass
class Sequence:
    prompt_ids: list
    new_ids: list
    prompt: str | None          # None where ids were given
    text: str | None


@dataclass
class GenerateReport(report.Report):
    """Everything that is printed and written."""
    model: str
    dtype: str
    weights: str
    activations: str
    reproducible: bool
    sequences: list
    first_token_seconds: float | None       # since the process started
    load_seconds: float
    bytes_read_of_ranks: list
    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float
    communication_share_of_prefill: float | None
    communication_share_of_decode: float | None


def run(arguments: argparse.Namespace) -> int:
    """Run the command on this rank; return 0."""
    check_arguments(arguments)
    text.print_any_character()
    with device.group_of(arguments) as group:
        given = group.on_root(lambda: look_first(arguments))
        stop = group.root_first(lambda: text.end_tokens(arguments.model))
        started = time.perf_counter()
        with Progress(f"loading {arguments.model}"):
            decoder = load_model(arguments.model, group, arguments.dtype, strict=arguments.strict,
                                 verify_weights=arguments.verify_weights, weights=arguments.weights,
                                 activations=arguments.activations)
        load_seconds = time.perf_counter() - started
        continued = group.root_first(lambda: None if given is None else Continuations(arguments, *given))
        ids, lengths = text.give_to_all(group, None if continued is None else continued.prompts)
        steps = generate(decoder, ids, max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature,
                         top_k=arguments.top_k, top_p=arguments.top_p, seed=arguments.seed,
                         stop=() if arguments.ignore_eos else stop, lengths=lengths)
        if continued is not None and not continued.alone:       # one prompt shows its tokens itself
            steps = progress(steps, arguments.max_new_tokens, "tokens")
        run = Run(group)
        for tokens in steps:
            run.add(tokens)
            if continued is not None:               # on rank 0
                continued.push(tokens)
        run.end()
        opening, of_ranks = report.opening(group), group.report((decoder.bytes_read, run.shares))
        if continued is not None and of_ranks is not None:      # on rank 0
            continued.finish()
            result = summary(arguments, group, opening, continued, run, load_seconds, of_ranks)
            report.publish(["", *lines(result)], result, "mpitp.generate/1", arguments.json)
    return 0


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise InputError unless there is one kind of prompt."""
    kinds = {"--prompt": arguments.prompt, "--ids": arguments.ids, "--batch-file": arguments.batch_file}
    given = [flag for flag, value in kinds.items() if value is not None]
    require(len(given) == 1, " and ".join(given) or "no prompt", f"one of {', '.join(kinds)}")
    require_positive(max_new_tokens=arguments.max_new_tokens)


def look_first(arguments: argparse.Namespace) -> tuple[list[str] | None, list[list[int]] | None]:
    """Read the prompts before anything is loaded: (texts, ids) as they were given, one of them None."""
    if arguments.json:
        tables.require_writable(arguments.json)
    if arguments.ids:
        found = [text.parse_ids(ids) for ids in arguments.ids]
        require(all(found), f"--ids {arguments.ids}", "at least one token id in each")
        return None, found
    if arguments.batch_file is None:
        return [text.text_of_argument(prompt, "--prompt") for prompt in arguments.prompt], None
    texts = [line for line in text.lines_of(text.read_text(arguments.batch_file)) if line.strip()]
    require(texts, f"no text in {arguments.batch_file}", "a text a line")
    return texts, None


class Continuations:
    """Continuations holds prompts and what continues them, on rank 0: one is printed as it comes, others at the end."""

    def __init__(self, arguments: argparse.Namespace, texts: list[str] | None, ids: list[list[int]] | None):
        self.texts, self.prompts = texts, ids or []
        self.streams: list[text.TextStream] = []
        if texts is not None:
            tokenizer = text.load_tokenizer(arguments.model)
            self.prompts = [text.encode(tokenizer, prompt) for prompt in texts]
            empty = [prompt for prompt, ids in zip(texts, self.prompts) if not ids]
            require(not empty, f"prompt {empty[:1]}, which is no token", "text")
            decode = partial(tokenizer.decode, skip_special_tokens=True)
            self.streams = [text.TextStream(decode, prompt) for prompt in self.prompts]
        self.new_ids: list[list[int]] = [[] for _ in self.prompts]
        self.new_texts: list[list[str]] = [[] for _ in self.prompts]
        self.alone, self.begun = len(self.prompts) == 1, False

    def push(self, tokens: np.ndarray) -> None:
        """Add the tokens of a step."""
        for b, token in enumerate(tokens.tolist()):
            if token != ENDED:
                self.new_ids[b].append(token)
                self.add(b, str(token) if self.texts is None else self.streams[b].push(token))

    def add(self, b: int, new_text: str) -> None:
        """Add the text of a token, or its id, to sequence b."""
        self.new_texts[b].append(new_text)
        if self.alone:
            between = "," if self.texts is None and self.begun else "" if self.begun or self.texts is None else \
                self.texts[0]
            print(between + new_text, end="", flush=True)
            self.begun = True

    def text(self, b: int) -> str | None:
        """Return the new text, None where ids were given."""
        return None if self.texts is None else "".join(self.new_texts[b])

    def finish(self) -> None:
        """Print the rest."""
        if self.texts is not None:
            for b, stream in enumerate(self.streams):
                self.add(b, stream.rest())
        if self.alone:
            print()
        else:
            for b, texts in enumerate(self.new_texts):
                print(f"[{b}] " + (",".join(texts) if self.texts is None else self.texts[b] + "".join(texts)))


class Run:
    """The times of the steps on this rank, and the share of them that was communication: [prefill, decode]."""

    def __init__(self, group: TensorParallelGroup):
        self.group, self.times, self.tokens = group, [time.perf_counter()], 0
        self.shares: list[float | None] = []
        self.first_token_seconds: float | None = None
        group.ledger.clear()

    def add(self, tokens: np.ndarray) -> None:
        """Note that a step is done."""
        self.times.append(time.perf_counter())
        if len(self.times) == 2:
            self.first_token_seconds = age_of_process()
            self.part(self.prefill_seconds)
        else:
            self.tokens += int((tokens != ENDED).sum())

    def end(self) -> None:
        """Note that the last step is done."""
        self.part(self.decode_seconds)

    def part(self, seconds: float) -> None:
        """Note the share of communication since the last call."""
        self.shares.append(self.group.ledger.seconds() / seconds if seconds else None)
        self.group.ledger.clear()

    @property
    def prefill_seconds(self) -> float:
        """The time of the first step, which takes the prompts in."""
        return self.times[1] - self.times[0]

    @property
    def decode_seconds(self) -> float:
        """Return the time of all other steps."""
        return self.times[-1] - self.times[1]


def age_of_process() -> float | None:
    """Seconds since this process started, its interpreter's start included; None where the system does not say."""
    try:
        with open("/proc/self/stat") as file:           # field 22, after the name, which may hold spaces
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError, IndexError):
        return None


def summary(arguments: argparse.Namespace, group: TensorParallelGroup, opening: report.Opening,
            continued: Continuations, run: Run, load_seconds: float, of_ranks: list) -> GenerateReport:
    """Return the Report, from each rank's (bytes read, shares of communication)."""
    sequences = [Sequence(prompt, new, continued.texts[b] if continued.texts else None, continued.text(b))
                 for b, (prompt, new) in enumerate(zip(continued.prompts, continued.new_ids))]
    return GenerateReport(
        *opening, arguments.model, arguments.dtype, arguments.weights, arguments.activations, group.reproducible,
        sequences, run.first_token_seconds, load_seconds, [bytes_read for bytes_read, _ in of_ranks],
        sum(map(len, continued.prompts)), run.prefill_seconds, run.tokens, run.decode_seconds,
        *(mean([shares[part] for _, shares in of_ranks]) for part in (0, 1)))


def mean(shares: list[float | None]) -> float | None:
    """Return the mean of the ranks' shares, None where one has none."""
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if len(known) == len(shares) else None


def lines(result: GenerateReport) -> Iterator[str]:
    """Yield the lines of the table."""
    rows = [(name, count, tables.seconds(seconds), f"{count / seconds:.1f}", f"{share:.1%}")
            for name, count, seconds, share in (
                ("prefill", result.prefill_tokens, result.prefill_seconds, result.communication_share_of_prefill),
                ("decode", result.decode_tokens, result.decode_seconds, result.communication_share_of_decode))
            if count]
    if result.decode_tokens:
        yield "Look at `decode`: each of its tokens reads all weights of a rank once."
    yield from tables.table(("", "tokens", "time", "tokens/s", "communication"), rows)
    if result.first_token_seconds is not None:
        yield f"  first token  {tables.seconds(result.first_token_seconds)} after the process started"
    read = ", ".join(map(tables.size, result.bytes_read_of_ranks))
    yield f"  loading      {tables.seconds(result.load_seconds)}; {read} read by the ranks"
    yield report.ranks_line(result)
