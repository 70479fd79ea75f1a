"""Continue prompts with the model of a Hugging Face checkpoint folder, each rank holding and reading its slices only.

Text needs `tokenizers` (pip install 'mpitp[text]'); --ids works without. One prompt streams; several (--prompt or --ids
more than once, --batch-file) are continued together and printed at the end. Greedy unless --temperature says otherwise.
--chat answers by the folder's chat template (pip install 'mpitp[chat]'); without a prompt, what is typed.
Then the figures: a share of communication is the mean of the ranks, waiting for each other included.
"""
from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .. import tables
from ..arrays import on_host
from ..checkpoints.loading import LoadedDecoder, load_model
from ..comm.patience import on_root_asleep
from ..errors import require, require_positive
from ..inference.generation import ENDED, generate
from . import ask_plan, device, model, prompts, report, stops, text
from .continuations import Continuations, Row, Stops
from .progress import Progress, progress
from .step_times import DECODE, PREFILL, StepTimes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model.add_arguments(parser)
    prompts.add_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="at most (64)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="draw from softmax(logits / T); 0: "
                        "take the most probable token (the default)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the most probable tokens that make up P")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    parser.add_argument("--ignore-eos", action="store_true", help="go on behind an end token")
    parser.add_argument("--stop", metavar="TEXT|ID", action="append", default=[], help=stops.HELP)
    parser.add_argument("--logprobs", action="store_true", help="print the natural logarithm of each new token's "
                        "probability, before --temperature, --top-k and --top-p")
    model.add_weights(parser)
    device.add_group_arguments(parser, dtypes=f"to compute in: {device.DTYPES}")
    parser.add_argument("--json", metavar="FILE", help="write text, ids and figures there")


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
    prompts.check_arguments(arguments)
    require_positive(max_new_tokens=arguments.max_new_tokens)
    stops.parse(arguments.stop, not arguments.ids)
    text.print_any_character()
    with device.group_of(arguments) as group:
        given = group.on_root(lambda: prompts.Prompts(arguments))
        ask_plan.generation(group, arguments, given)
        ends = group.root_first(lambda: text.end_tokens(arguments.model))
        started = time.perf_counter()
        with Progress(f"loading {arguments.model}"):
            decoder = load_model(arguments.model, group, arguments.dtype, strict=arguments.strict,
                                 verify_weights=arguments.verify_weights, weights=arguments.weights,
                                 activations=arguments.activations)
        load_seconds = time.perf_counter() - started
        generation = Generation(arguments, decoder, ends, given)
        if prompts.is_typed(arguments):
            generation.answer_what_is_typed()
        else:
            generation.continue_prompts()
        opening = report.opening(group)
        of_ranks = group.report((decoder.bytes_read, generation.times.shares()))
        if of_ranks is not None:                    # on rank 0
            result = summary(arguments, generation, opening, load_seconds, of_ranks)
            tables_of_logprobs = logprob_lines(generation) if arguments.logprobs else ()
            report.publish([*tables_of_logprobs, "", *lines(result)], result, "mpitp.generate/1", arguments.json)
    return 0


class Generation:
    """A Generation continues prompts on all ranks; rank 0 prints what continues them.

    Parameters
    ----------
    arguments : argparse.Namespace
    model : LoadedDecoder
    ends : list of int
        The tokens that end a text, by the folder.
    given : Prompts or None
        On rank 0, what is to be continued.
    """

    def __init__(self, arguments: argparse.Namespace, model: LoadedDecoder, ends: list[int],
                 given: prompts.Prompts | None):
        self.arguments, self.model, self.group, self.given = arguments, model, model.group, given
        ids, texts = stops.parse(arguments.stop, not arguments.ids)
        most = model.config.vocab_size - 1
        for token in ids:
            require(token <= most, f"--stop {token}", f"a token id, 0 to {most}, or a text")
        self.stops = Stops(ids, texts)
        self.ends = [*(() if arguments.ignore_eos else ends), *ids]
        self.times = StepTimes(model.group)
        self.done: list[Continuations] = []         # on rank 0

    def continue_prompts(self) -> None:
        """Continue the prompts that the options give. Collective."""
        texts = None if self.given is None else self.given.texts
        self.run(on_root_asleep(self.group, lambda: continuations_of(self.arguments, self.given, texts, self.stops)))

    def answer_what_is_typed(self) -> None:
        """Answer what is typed, a line a turn, until the input ends. Collective."""
        while True:
            continued = on_root_asleep(self.group, self.typed, in_its_time=True)
            if not self.group.any(continued is not None):
                return
            self.run(continued)
            if continued is not None and self.given is not None and self.given.conversation is not None:
                self.given.conversation.answered(continued.rows[0].text())

    def typed(self) -> Continuations | None:
        """Read what is typed next, on rank 0; return None where nothing more is."""
        assert self.given is not None and self.given.conversation is not None
        said = self.given.conversation.next_text()
        return None if said is None else continuations_of(self.arguments, self.given, [said], self.stops)

    def run(self, continued: Continuations | None) -> None:
        """Continue all rows, which rank 0 has, until each has ended. Collective."""
        arguments, group = self.arguments, self.group
        ids, lengths = text.give_to_all(group, None if continued is None else continued.prompts)
        logprobs: list | None = [] if arguments.logprobs else None
        steps = generate(self.model, ids, max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature,
                         top_k=arguments.top_k, top_p=arguments.top_p, seed=arguments.seed, stop=self.ends,
                         lengths=lengths, logprobs=logprobs)
        if continued is not None and not continued.alone:       # one prompt shows its tokens itself
            steps = progress(steps, arguments.max_new_tokens, "tokens")
        self.times.begin(int(lengths.sum()))
        running_B = np.ones(len(ids), bool)
        for tokens_B in steps:
            tokens_B = np.where(running_B, tokens_B, ENDED)
            self.times.add(tokens_B)
            if continued is not None:               # on rank 0
                continued.push(tokens_B, logprobs[-1] if logprobs else None)
            if self.stops.texts:                    # which rank 0 alone sees
                running_B &= ~self.from_root(None if continued is None else continued.stopped(), len(ids))
                if not (running_B & (tokens_B != ENDED) & ~np.isin(tokens_B, self.ends)).any():
                    break
        del steps                                   # and with it the bar
        if continued is not None:
            continued.finish()
            self.done.append(continued)

    def from_root(self, flags_B: np.ndarray | None, batch: int) -> np.ndarray:
        """Return rank 0's flags. Collective: a broadcast of B int64."""
        mine_B = np.zeros(batch, np.int64) if flags_B is None else flags_B.astype(np.int64)
        return on_host(self.group.broadcast(self.group.xp.asarray(mine_B))).astype(bool)


def continuations_of(arguments: argparse.Namespace, given: prompts.Prompts | None, texts: list[str] | None,
                     stops: Stops) -> Continuations:
    """Return a row for each prompt: for these texts, or for the ids that were given."""
    assert given is not None
    if texts is None:
        return Continuations([Row(ids, None, None, stops) for ids in given.ids or ()], False)
    tokenizer = given.tokenizer
    assert tokenizer is not None
    # Special tokens have no text in what is decoded: a stop that is the text of one is an id.
    special = {stop: tokenizer.find(stop) for stop in stops.texts}
    stops = Stops([*stops.ids, *(id for id in special.values() if id is not None)],
                  [stop for stop, id in special.items() if id is None])
    rows = [Row(ids, said, tokenizer.decode, stops) for said, ids in zip(texts, given.encode(texts))]
    return Continuations(rows, not arguments.chat)


def summary(arguments: argparse.Namespace, generation: Generation, opening: report.Opening, load_seconds: float,
            of_ranks: list) -> GenerateReport:
    """Return the Report, from each rank's (bytes read, shares of communication)."""
    times, rows = generation.times, [row for continued in generation.done for row in continued.rows]
    return GenerateReport(
        *opening, arguments.model, arguments.dtype, arguments.weights, arguments.activations,
        generation.group.reproducible, [row.report() for row in rows], times.first_token_seconds,
        load_seconds, [bytes_read for bytes_read, _ in of_ranks], times.prompt_tokens, times.seconds[PREFILL],
        times.decode_tokens, times.seconds[DECODE],
        *(mean([shares[part] for _, shares in of_ranks]) for part in (PREFILL, DECODE)))


def logprob_lines(generation: Generation) -> Iterator[str]:
    """Yield the tables of log-probabilities of everything that was generated, on rank 0."""
    tokenizer = generation.given and generation.given.tokenizer
    for continued in generation.done:
        yield from continued.logprob_lines(tokenizer.decode if tokenizer else None)


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
