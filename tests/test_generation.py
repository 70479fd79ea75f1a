"""Generation: greedy is the argmax of the whole forward pass, what is drawn follows its distribution, on any ranks."""
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpitp
from decoder_cases import KINDS, config
from mpitp.inference import generation
from mpitp.commands.score import score
from mpitp.comm.ledger import Collective
from mpitp.config import DecoderConfig
from spmd import everywhere, job
from test_kv import decoder, whole

PROMPTS = [3, 1, 4, 1], [26, 5]
PADDED = np.array([[3, 1, 4, 1], [26, 5, 0, 0]])


def texts(model, steps=5, ids=PADDED, lengths=(4, 2), **options):
    """The new tokens of each sequence, as lists."""
    return np.array(list(mpitp.generate(model, ids, max_new_tokens=steps, lengths=lengths, **options))).T.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_the_argmax_of_the_whole_pass(group, kind):
    model = decoder(group, kind)
    found = texts(model)
    for prompt, new in zip(PROMPTS, found):
        for step in range(5):
            assert new[step] == whole(model, [prompt + new[:step]])[0].argmax()


def test_equal_logits_give_the_lowest_id(group):
    model = mpitp.Decoder(group, config("gemma3"), seed=None)  # all weights 0, so all logits
    assert texts(model) == [[0] * 5] * 2


def test_yields_integers_alike_on_every_rank(group):
    model = decoder(group, "olmo2")
    for options in ({}, {"temperature": 2.0, "top_k": 9}, {"temperature": 2.0}):
        for tokens in mpitp.generate(model, PADDED, max_new_tokens=3, **options):
            assert tokens.dtype == np.int64 and tokens.shape == (2,)
            assert everywhere(tokens.tolist() == group.comm.bcast(tokens.tolist()))


def test_prompts_are_not_changed_and_may_be_lists(group):
    model, ids = decoder(group, "olmo2"), PADDED.copy()
    assert texts(model, ids=ids) == texts(model, ids=ids.tolist(), lengths=[4, 2])
    assert (ids == PADDED).all()


@pytest.mark.parametrize("kind, options", [("gemma3", {}), ("olmo2", {}), ("gpt2", dict(temperature=2.0, top_k=9)),
                                           ("gemma2", dict(temperature=0.5, top_p=0.9))])
def test_log_probabilities_are_those_of_the_whole_pass(group, kind, options):
    """Whatever the tokens are drawn by; and the tokens are the same ones. score() of the text sums up to them."""
    model, logprobs = decoder(group, kind), []
    found = texts(model, logprobs=logprobs, **options)
    assert found == texts(model, **options) and len(logprobs) == 5 and logprobs[0].dtype == np.float64
    for b, (prompt, new) in enumerate(zip(PROMPTS, found)):
        for step in range(5):
            logits = whole(model, [prompt + new[:step]])[0]
            expected = logits[new[step]] - np.log(np.exp(logits).sum())
            assert logprobs[step][b] == pytest.approx(expected, rel=1e-12)
        both, counted, _ = score(model, np.array(prompt + new), 100, 1)
        before = score(model, np.array(prompt), 100, 1)[0] * (len(prompt) - 1)
        assert -sum(step[b] for step in logprobs) == pytest.approx(both * counted - before, rel=1e-12)
    assert everywhere(np.array(logprobs).tobytes() == group.comm.bcast(np.array(logprobs).tobytes()))


def test_stop(group):
    """A sequence yields its end token, then ENDED; when all have ended, it is over."""
    model = decoder(group, "gpt_neox")
    free = texts(model, 8)
    stop = [free[0][2], free[1][5]]
    expected = []
    for new in free:
        end = min([i for i, token in enumerate(new) if token in stop], default=7)
        expected.append(new[:end + 1])
    most = max(map(len, expected))
    found = texts(model, 8, stop=stop)
    assert found == [new + [generation.ENDED] * (most - len(new)) for new in expected] and most < 8
    assert texts(model, 8, stop=free[0][0], lengths=(4, 2))[0][0] == free[0][0]


def test_a_sequence_does_not_depend_on_its_neighbours(group):
    model = decoder(group, "bloom")
    together = texts(model, temperature=0.0)
    assert [texts(model, ids=np.array([prompt]), lengths=None)[0] for prompt in PROMPTS] == together


# --- drawing ---------------------------------------------------------------------------------------------------

def probabilities(logits_V, temperature, top_k, top_p):
    """What each token should be drawn with, by sorting all of them: the definition."""
    order = sorted(range(len(logits_V)), key=lambda i: (-logits_V[i], i))[:top_k]
    p = np.exp((np.asarray(logits_V, np.float64)[order] - max(logits_V)) / temperature)
    p /= p.sum()
    if top_p is not None:
        count = next(i for i in range(1, len(p) + 1) if i == len(p) or p[:i].sum() >= top_p)
        order, p = order[:count], p[:count] / p[:count].sum()
    found = np.zeros(len(logits_V))
    found[order] = p
    return found


LOGITS = st.lists(st.integers(-12, 12).map(lambda i: i / 4), min_size=1, max_size=40)


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(logits=LOGITS, temperature=st.sampled_from([0.3, 1.0, 4.0]), top_k=st.sampled_from([None, 1, 2, 5, 39]),
       top_p=st.sampled_from([None, 0.1, 0.37, 0.731, 0.97, 1.0]))
def test_draws_by_the_definition(logits, temperature, top_k, top_p):
    """Every number k / n of n equally spaced ones: each token as often as its probability says, to one more or less."""
    n, values = 500, np.array(logits, np.float32)
    model = SimpleNamespace(group=SimpleNamespace(size=1), partition=None,
                            config=SimpleNamespace(vocab_size=len(logits)))
    choice = generation.Choice(model, 1, temperature, top_k, top_p, 0)
    drawn = Counter(generation.draw(values, np.arange(len(logits)), k / n, temperature, choice.top_k, choice.top_p)
                    for k in range(n))
    expected = probabilities(logits, temperature, top_k, top_p)
    assert everywhere(all(abs(drawn[i] - n * p) <= 1 and (p > 0 or not drawn[i]) for i, p in enumerate(expected)))


@pytest.fixture
def model(group):
    return SimpleNamespace(group=group, partition=group.partition(11), config=SimpleNamespace(vocab_size=11))


def split(model, logits_BV):
    return np.ascontiguousarray(logits_BV[:, model.partition.range(model.group.rank)])


OPTIONS = [{}, {"top_k": 1}, {"top_k": 3}, {"top_k": 10}, {"top_k": 99}, {"top_p": 0.6}, {"top_k": 5, "top_p": 0.6}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_split_logits_draw_as_whole_ones(model, options):
    """Many equal logits: which of them are among the k is the lowest ids, wherever they lie."""
    top_k, top_p = options.get("top_k"), options.get("top_p")
    choice = generation.Choice(model, 2, 0.8, top_k, top_p, 5)
    for step in range(20):
        logits_BV = np.random.default_rng(step).integers(0, 3, (2, 11)).astype(np.float32)
        found = choice(split(model, logits_BV), step)
        for b, logits_V in enumerate(logits_BV):
            number = (int(mpitp.sharding.rng.words(choice.keys[b], step, step + 1)[0]) >> 11) / 2 ** 53
            cumulative = np.cumsum(probabilities(logits_V, 0.8, top_k, top_p)[by_definition(logits_V, top_k, top_p)])
            at = int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))
            assert found[b] == by_definition(logits_V, top_k, top_p)[at]


def by_definition(logits_V, top_k, top_p):
    """The order of the cumulative distribution: by id, or by probability where something is left out."""
    everything = (top_k is None or top_k >= len(logits_V)) and top_p is None
    return sorted(range(len(logits_V)), key=(lambda i: i) if everything else (lambda i: (-logits_V[i], i)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_frequencies(model, options):
    """300 draws: each token within 5 standard deviations of what its probability says."""
    if model.group.size > 1 and model.group.reproducible:
        return                                              # nothing is added up
    logits_BV = np.linspace(-2, 2, 11, dtype=np.float32)[None, np.random.default_rng(1).permutation(11)]
    choice = generation.Choice(model, 1, 1.0, options.get("top_k"), options.get("top_p"), 3)
    drawn = Counter(int(choice(split(model, logits_BV), step)[0]) for step in range(300))
    for i, p in enumerate(probabilities(logits_BV[0], 1.0, options.get("top_k"), options.get("top_p"))):
        assert abs(drawn[i] - 300 * p) <= 5 * (300 * p * (1 - p)) ** 0.5 + 1e-9


def test_seed(group):
    model = decoder(group, "olmo2")
    first, again, other = (texts(model, 12, temperature=5.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    same_prompt = texts(model, 12, ids=[[1, 2]] * 2, lengths=None, temperature=5.0)
    assert same_prompt[0] != same_prompt[1]
    assert texts(model, 4, temperature=5.0, top_k=1) == texts(model, 4, temperature=1e-9) == texts(model, 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}], ids=str)
def test_logits_that_are_not_finite(model, options, bad):
    """InputError on every rank, wherever the number is."""
    for at in (0, 10):
        logits_BV = np.zeros((2, 11), np.float32)
        logits_BV[1, at] = bad
        choice = generation.Choice(model, 2, options.get("temperature", 0), options.get("top_k"), None, 0)
        with pytest.raises(mpitp.InputError, match="found logits that are not finite"):
            choice(split(model, logits_BV), 0)


@pytest.mark.host
def test_tokens_that_cannot_be(model):
    """-inf is a logit: of a token that never comes."""
    logits_BV = np.full((1, 11), -np.inf, np.float32)
    logits_BV[0, 7] = -3
    for options in OPTIONS:
        choice = generation.Choice(model, 1, 1.0, options.get("top_k"), options.get("top_p"), 0)
        assert choice(split(model, logits_BV), 0).tolist() == [7]


# --- collectives, and the same text on any number of ranks -----------------------------------------------------------

@pytest.mark.parametrize("options, expected", [
    ({}, {("all_gather", 4, "float64"): 3}),
    ({"temperature": 1.0}, {("gather", 54, "float64"): 3, ("broadcast", 2, "int64"): 3}),
    ({"temperature": 1.0, "top_k": 5}, {("gather", 20, "float64"): 3, ("broadcast", 2, "int64"): 3}),
], ids=["greedy", "all", "top-k"])
def test_collectives(group, options, expected):
    model = decoder(group, "gemma3")
    group.ledger.clear()
    texts(model, 3, **options)
    expected = Counter({Collective(name, n if name == "broadcast" or n == 54 else n * group.size, dtype): times
                        for (name, n, dtype), times in expected.items()})
    for tokens in (8, 2, 2):                                    # the prompts, then one of each sequence
        expected += model.collectives(tokens)[0]
    assert group.ledger.counts() == expected


PROGRAM = """
import sys, hashlib; sys.path.insert(0, "tests")
import numpy as np, mpitp
from decoder_cases import KINDS
from test_kv import IDS, decoder, extend
from mpitp.inference.kv import KeyValues
with mpitp.TensorParallelGroup(reproducible=True) as group:
    for kind in KINDS:
        model = decoder(group, kind, "float32")
        kv = KeyValues(model, 2, 9)
        logits = [extend(model, IDS, kv, [7, 4]), extend(model, [[1], [2]], kv), extend(model, [[0], [5]], kv)]
        drawn = list(mpitp.generate(model, IDS, max_new_tokens=3, lengths=[7, 4], temperature=1.3, top_p=0.9, seed=4))
        if group.rank == 0:
            print(kind, hashlib.sha256(b"".join(x.tobytes() for x in logits)).hexdigest(), np.array(drawn).tolist())
"""


@pytest.mark.launcher
def test_same_logits_and_same_text_on_any_number_of_ranks():
    found = [job(ranks, "-c", PROGRAM) for ranks in (1, 2, 3, 4)]
    assert [done.returncode for done in found] == [0] * 4, found[0].stderr
    assert len({done.stdout for done in found}) == 1
    assert len(re.findall("[0-9a-f]{64}", found[0].stdout)) == len(KINDS)


# --- bad input -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ids, more, message", [
    ([1, 2], {}, r"found ids int64 of shape \(2,\), expected integers \(batch, tokens\)"),
    ([[]], {}, r"found ids float64 of shape \(1, 0\)"),
    ([[1.0]], {}, "found ids float64"),
    ([[1], [1, 2]], {}, "found ids object"),
    ([[1, 27]], {}, "found token id 27 in prompt 0, expected 0 to 26"),
    ([[1], [-1]], {}, "found token id -1 in prompt 1, expected 0 to 26"),
    ([[1, 2]], {"lengths": [3]}, r"found lengths \[3\], expected 1 integers from 1 to 2"),
    ([[1, 2]], {"lengths": [0]}, "found lengths"),
    ([[1, 2]], {"lengths": [1, 1]}, "found lengths"),
    ([[1, 2], [3, 4]], {"lengths": [1, 99]}, r"found lengths \[1, 99\], expected 2 integers from 1 to 2"),
    ([[1, 2], [3, 4]], {"lengths": [[1, 2]]}, "found lengths"),
    ([[1]], {"max_new_tokens": 0}, "found max_new_tokens = 0, expected a positive integer"),
    ([[1]], {"temperature": -1}, "found temperature -1"),
    ([[1]], {"temperature": float("nan")}, "found temperature nan"),
    ([[1]], {"temperature": 1, "top_k": 0}, "found top_k 0"),
    ([[1]], {"temperature": 1, "top_p": 0}, "found top_p 0"),
    ([[1]], {"temperature": 1, "top_p": 1.5}, "found top_p 1.5"),
    ([[1]], {"top_k": 3}, "found top_k or top_p with temperature 0"),
    ([[1]], {"seed": "x"}, "found seed 'x'"),
    ([[1]], {"stop": "x"}, r"found stop \['x'\], expected token ids"),
    ([[1, 2, 3]], {"max_new_tokens": 8}, "found 3 tokens of a prompt and 8 new ones, expected at most 10 together"),
])
def test_bad_input(group, ids, more, message):
    """Found before the first step."""
    model = mpitp.Decoder(group, config("gpt2"), seed=None)
    with pytest.raises(mpitp.InputError, match=message):
        mpitp.generate(model, ids, **{"max_new_tokens": 3, **more})


def test_as_many_as_there_are_positions(group):
    """Nine learned positions: the token that the ninth gives is not looked at, so it may be the tenth."""
    model = decoder(group, "gpt2")
    assert len(texts(model, 7, ids=[[1, 2, 3]], lengths=None)[0]) == 7


def test_a_vocabulary_of_fewer_tokens_than_ranks(group):
    model = mpitp.Decoder(group, DecoderConfig(2, 4, 1, 1), seed=3)
    for options in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 1}):
        assert set(texts(model, ids=[[0, 1]], lengths=None, **options)[0]) <= {0, 1}
