"""Text, a token at a time: the prompts in one pass, then one new token of every sequence a step.

Dimension key: B sequences, S positions, V vocabulary, C candidates; p marks the axis that is split over the ranks.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import numpy as np

from ..arrays import Array, on_host
from ..errors import is_integer, require, require_positive
from ..layers.decoder import Decoder
from ..ops.greatest import greatest_of_rank, greatest_of_ranks
from ..sharding import rng
from ..sharding.partition import Partition
from .graph import CapturedChoice, CapturedToken, can_record
from .kv import KeyValues

RECORD_FROM = 16    # new tokens, from which recording one on a GPU costs less than it saves (3 calls of about 10)
ENDED = -1      # generate yields it for a sequence that has come to its end; no vocabulary has such an id


def generate(model: Decoder, ids: Array | Sequence, *, max_new_tokens: int, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, seed: int = 0, stop: int | Sequence[int] = (),
             lengths: Array | Sequence[int] | None = None, logprobs: list | None = None) -> Iterator[np.ndarray]:
    """Continue the prompts: iterate over the new tokens, one of every sequence a step.

    Parameters
    ----------
    model : Decoder
        What gives the logits of the next token.
    ids : (B, S) integers
        The prompts, the same on every rank.
    max_new_tokens : int
        How many steps at most.
    temperature : float, optional
        0: the token of the largest logit, of equal ones the lowest id. Above: one drawn from
        softmax(logits / temperature).
    top_k : int, optional
        Draw from the k most probable tokens (of equally probable ones, the lowest ids). None: all.
    top_p : float, optional
        Draw from the fewest most probable tokens (of those top_k) whose probabilities sum up to p (Holtzman et al.,
        arXiv 1904.09751). None: all.
    seed : int, optional
        Of the draws: token t of sequence b takes number t of the stream (seed, "generate/b"), so that equal logits give
        equal text on any number of ranks.
    stop : int or sequence of int, optional
        The ids that end a sequence.
    lengths : (B,) integers, optional
        How many tokens of each row are the prompt. None: all.
    logprobs : list, optional
        Where given, gets one more (B,) float64 array before each step is yielded: the natural logarithms of the
        probabilities that softmax(logits) gives to its tokens, whatever temperature, top_k and top_p are.

    Returns
    -------
    iterator of (B,) int64 arrays
        The new tokens of a step, the same on every rank. A sequence yields its end token too, and then ENDED (-1). The
        iteration ends when every sequence has ended.

    Raises
    ------
    InputError
        On every rank: before the first step, for prompts, numbers and choices that do not fit; in any step, for logits
        that are not finite.

    Notes
    -----
    Collectives of a step beside those of Decoder.extend: temperature 0 one all-gather of P x B x 2 float64 (the
    largest logit of each rank, and its id); else one gather on rank 0, of B x V logits or, with top_k, of
    P x B x k x 2 float64, and one broadcast of B int64, the tokens that rank 0 drew. With logprobs those of
    Decoder.loss for one token, B times.
    On GPUs a step of one sequence, or of a few in float32, is a CUDA graph, unless MPI carries what the ranks add up:
    recorded once, then replayed; with temperature 0 the choice is in it, and the token goes on without the host.
    Keys and values: 2 x layers x B x (S + max_new_tokens - 1) x (key/value heads of the rank) x (features of a head).
    """
    prompts, counts = as_prompts(model, ids, lengths)
    require_positive(max_new_tokens=max_new_tokens)
    capacity = prompts.shape[1] + max_new_tokens - 1            # the last new token is not continued
    if model.position:
        most = model.position.max_positions
        require(capacity <= most, f"{prompts.shape[1]} tokens of a prompt and {max_new_tokens} new ones",
                f"at most {most + 1} together, of the model's {most} learned positions")
    ends = np.atleast_1d(np.asarray(stop, None if np.size(stop) else np.int64))
    require(ends.ndim == 1 and ends.dtype.kind in "iu", f"stop {ends.tolist()}", "token ids")
    choose = Choice(model, len(prompts), temperature, top_k, top_p, seed)
    choose = choose if logprobs is None else ScoredChoice(choose, model, logprobs)
    return steps(model, prompts, counts, choose, KeyValues(model, len(prompts), capacity), max_new_tokens, ends)


def steps(model: Decoder, ids: Array, lengths: Array, choose: Choice, kv: KeyValues, max_new_tokens: int,
          stop: Array) -> Iterator[np.ndarray]:
    """Yield the tokens of generate, whose arguments have been checked."""
    tokens_B, running_B, following = choose(model.extend(ids, kv, lengths), 0), np.ones(len(ids), bool), None
    for step in range(1, max_new_tokens + 1):
        yield np.where(running_B, tokens_B, ENDED)
        running_B &= ~np.isin(tokens_B, stop)
        if not running_B.any() or step == max_new_tokens:
            return
        following = following or next_tokens(model, kv, choose, max_new_tokens)
        tokens_B = following(tokens_B, step)


def next_tokens(model: Decoder, kv: KeyValues, choose: Choice, tokens: int) -> Callable[[Array, int], Array]:
    """Return the function that continues each sequence by a token, and chooses the one of the next step.

    Where the token is recorded and the choice is the largest logit, the graph holds that too.
    """
    if not choose.temperature and not isinstance(choose, ScoredChoice) and records(model, kv, tokens):
        return CapturedChoice(model, kv, choose)
    extend = one_token(model, kv, tokens)
    return lambda tokens_B, step: choose(extend(tokens_B[:, None]), step)


def one_token(model: Decoder, kv: KeyValues, tokens: int) -> Callable[[Array], Array]:
    """Return the function that continues each sequence by a token: a recorded graph where that can be and pays."""
    return CapturedToken(model, kv) if records(model, kv, tokens) else lambda ids_B1: model.extend(ids_B1, kv)


def records(model: Decoder, kv: KeyValues, tokens: int) -> bool:
    """Return whether a token can be recorded, and whether that pays for so many new ones."""
    return tokens >= RECORD_FROM and can_record(model, len(kv.lengths))


def as_prompts(model: Decoder, prompts: Array | Sequence,
               counts: Array | Sequence[int] | None) -> tuple[np.ndarray, np.ndarray]:
    """Return ids (B, S) and lengths (B,), int64, 0 behind the end of a prompt; S is the longest. Raises InputError."""
    require(not hasattr(prompts, "mask"), "ids that are a masked array", "lengths, where prompts differ in theirs")
    try:
        ids = np.asarray(prompts)
    except ValueError:                                      # rows of unequal length
        ids = np.empty(0, object)
    require(ids.ndim == 2 and ids.size and ids.dtype.kind in "iu", f"ids {ids.dtype} of shape {ids.shape}",
            "integers (batch, tokens), at least one of each, with lengths where prompts differ")
    B, S = ids.shape
    lengths = np.full(B, S) if counts is None else np.asarray(counts)
    good = lengths.shape == (B,) and lengths.dtype.kind in "iu" and (lengths >= 1).all() and (lengths <= S).all()
    require(good, f"lengths {lengths.tolist()}", f"{B} integers from 1 to {S}")
    ids = np.where(np.arange(S) < lengths[:, None], ids, 0)[:, :lengths.max()]
    V = model.config.vocab_size
    for b, position in np.argwhere((ids < 0) | (ids >= V))[:1]:
        require(False, f"token id {ids[b, position]} in prompt {b}", f"0 to {V - 1}")
    return ids.astype(np.int64), lengths.astype(np.int64)


class Choice:
    """How the next token of each sequence is chosen from logits that are split over the ranks.

    The arguments are generate's; batch : B, how many sequences.
    """

    def __init__(self, model: Decoder, batch: int, temperature: float, top_k: int | None, top_p: float | None,
                 seed: int):
        require(is_number(temperature) and 0 <= temperature < np.inf, f"temperature {temperature!r}",
                "a number, at least 0")
        require(top_k is None or is_integer(top_k) and top_k > 0, f"top_k {top_k!r}", "a positive integer, or None")
        require(top_p is None or is_number(top_p) and 0 < top_p <= 1, f"top_p {top_p!r}",
                "a number above 0, up to 1, or None")
        require(temperature > 0 or top_k is None and top_p is None, "top_k or top_p with temperature 0",
                "a temperature above 0, to draw with")
        require(is_integer(seed), f"seed {seed!r}", "an integer")
        self.group, self.partition = model.group, model.partition
        self.ranks = Partition(model.group.size, model.group.size, model.group.size)    # one row a rank
        self.temperature, self.top_p = temperature, None if top_p == 1 else top_p
        self.top_k = top_k if top_k is not None and top_k < model.config.vocab_size else None
        self.keys = [rng.key(seed, f"generate/{b}") for b in range(batch)]

    def __call__(self, logits_BVp: Array, step: int) -> np.ndarray:
        """Choose the (B,) tokens of a step. Collective; see generate."""
        if self.temperature:
            return self.checked(self.drawn(logits_BVp, step))
        return self.checked(on_host(self.greatest(logits_BVp)))

    def greatest(self, logits_BVp: Array) -> Array:
        """Return the ids (B,) of the largest logits, -1 where they are not finite. Collective; it asks no host."""
        best_1B2 = greatest_of_rank(logits_BVp, self.partition.bounds[self.group.rank])[None]
        return greatest_of_ranks(self.group.all_gather(best_1B2, self.ranks, axis=0))

    def checked(self, tokens_B: np.ndarray) -> np.ndarray:
        """Return the tokens. Raises InputError where the logits of one were not finite."""
        require((tokens_B >= 0).all(), "logits that are not finite", "finite ones: a weight is damaged, or float32 "
                                                                    "overflows")
        return tokens_B

    def drawn(self, logits_BVp: Array, step: int) -> np.ndarray:
        """Return the ids that rank 0 draws; -1 where the largest logit is not finite."""
        group, tokens_B = self.group, np.empty(len(logits_BVp), np.int64)
        if self.top_k is None:
            values_BC = group.gather(logits_BVp, self.partition, axis=-1)
            ids_BC = np.broadcast_to(np.arange(self.partition.size), (len(logits_BVp), self.partition.size))
        else:
            found = group.gather(self.best(logits_BVp, self.top_k), self.ranks, axis=0)
            if found is not None:                           # (P, B, k, 2) -> for each sequence rank after rank
                found = found.transpose(3, 1, 0, 2).reshape(2, len(logits_BVp), -1)
                values_BC, ids_BC = found[0], on_host(found[1]).astype(np.int64)
        if group.rank == 0:
            assert values_BC is not None                    # rank 0 is the root of both gathers
            for b, values_C in enumerate(on_host(values_BC)):
                number = (int(rng.words(self.keys[b], step, step + 1)[0]) >> 11) * 2.0 ** -53
                tokens_B[b] = draw(values_C, ids_BC[b], number, self.temperature, self.top_k, self.top_p)
        return on_host(group.broadcast(group.xp.asarray(tokens_B)))

    def best(self, logits_BVp: Array, k: int) -> Array:
        """Return the k largest logits of this rank and their ids (1, B, k, 2), both float64; -inf beyond its own."""
        xp, (B, Vp) = self.group.xp, logits_BVp.shape
        best_BC2 = xp.zeros((1, B, k, 2))
        best_BC2[..., 0] = -np.inf
        first, k = self.partition.bounds[self.group.rank], min(k, Vp)
        for b, logits_V in enumerate(logits_BVp if Vp else ()):
            local_C = logits_V.argmax().reshape(1) if k == 1 else largest(xp, logits_V, k)
            best_BC2[0, b, :k, 0], best_BC2[0, b, :k, 1] = logits_V[local_C], local_C + first
        return best_BC2


class ScoredChoice(Choice):
    """A ScoredChoice chooses as another one does, and keeps the log-probabilities of the chosen tokens.

    Parameters
    ----------
    choice : Choice
    model : Decoder
    logprobs : list
        Gets the (B,) float64 log-probabilities of each step.
    """

    def __init__(self, choice: Choice, model: Decoder, logprobs: list):
        vars(self).update(vars(choice))
        self.model, self.logprobs = model, logprobs

    def __call__(self, logits_BVp: Array, step: int) -> np.ndarray:
        """Choose the (B,) tokens of a step. Collective; see generate."""
        tokens_B = super().__call__(logits_BVp, step)
        self.logprobs.append(np.array([0.0 - self.model.loss(logits_BVp[b:b + 1], tokens_B[b:b + 1])[0]
                                       for b in range(len(tokens_B))]))
        return tokens_B


def largest(xp: ModuleType, x: Array, k: int) -> Array:
    """Return the positions of the k largest numbers in falling order, equal ones by position.

    Where x holds a NaN, that one position alone.
    """
    if xp.isnan(x.max()):
        return x.argmax().reshape(1)
    least = xp.partition(x, len(x) - k)[len(x) - k]
    found = xp.flatnonzero(x >= least)                      # more than k where several are equal to it
    return found[xp.argsort(-x[found], kind="stable")][:k]


def draw(values_C: Array, ids_C: Array, number: float, temperature: float, top_k: int | None = None,
         top_p: float | None = None) -> int:
    """Return the id at which the cumulative distribution of softmax(values / temperature), in float64, passes `number`.

    values_C, ids_C : the candidates; candidates of equal value are in the order of their ids
    number : in [0, 1)
    top_k, top_p : as generate's
    """
    values_C = values_C.astype(np.float64)
    if not np.isfinite(values_C.max()):
        return ENDED
    with np.errstate(under="ignore", over="ignore"):        # what vanishes beside the largest is 0
        weight_C = np.exp((values_C - values_C.max()) / temperature)
    total = weight_C.sum()
    if top_k is None and top_p is not None:
        # The last token of the nucleus and those behind it, fewer than C, sum up to more than 1 - p. So that token has
        # more than (1 - p) / C, and most of a large vocabulary need not be sorted.
        kept = np.flatnonzero(weight_C * len(weight_C) >= (1 - top_p) * total)
        values_C, weight_C, ids_C = values_C[kept], weight_C[kept], ids_C[kept]
    if top_k is not None or top_p is not None:
        order = np.argsort(-values_C, kind="stable")[:top_k]
        weight_C, ids_C = weight_C[order], ids_C[order]
    cumulative_C = np.cumsum(weight_C)
    if top_p is not None:
        total = total if top_k is None else cumulative_C[-1]
        cumulative_C = cumulative_C[:np.searchsorted(cumulative_C, top_p * total) + 1]
    at = np.searchsorted(cumulative_C, number * cumulative_C[-1], side="right")
    # number * total may round up to the total; then the last candidate that has a probability at all is taken.
    last = np.searchsorted(cumulative_C, cumulative_C[-1])
    return int(ids_C[min(at, last)])


def is_number(value: object) -> bool:
    """Return whether value is an int or a float; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
