"""Times of things that all ranks do together: interleaved rounds, so that a machine that slows down slows all alike."""
import gc
import statistics
import time
from dataclasses import dataclass

import numpy as np

from .arrays import compute_dtype, module_of, sum_dtype
from .config import DecoderConfig
from .layers.decoder import Decoder
from .inference.generation import RECORD_FROM, one_token
from .layers.block import ParallelBlock
from .inference.kv import KeyValues
from .layers.mlp import ParallelMLP
from .ops import attention
from .ops.linear import linear_backward, linear_forward, product
from .ops.twin import twin

BLOCK_HEADS = 8


@dataclass
class Timing:
    """Seconds of one call, the slowest rank's: median, least and most over the rounds."""
    median: float
    least: float
    most: float
    rounds: int


def interleave(group, cases, rounds, least_seconds=0.0):
    """Time each of {name: function} once a round, A B C A B C ...; {name: [seconds of the slowest rank]} on every rank.

    least_seconds : a faster function is called several times a round, and the mean counts
    """
    repeats = {}
    for name, function in cases.items():            # warm up, and find out how often to call
        function()
        start = time.perf_counter()
        function()
        repeats[name] = max(1, round(least_seconds / max(1e-9, time.perf_counter() - start)))
    repeats = group.comm.bcast(repeats)
    seconds = {name: [] for name in cases}
    gc.disable()
    for _ in range(rounds):
        for name, function in cases.items():
            group.comm.Barrier()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    gc.enable()
    of_ranks = group.comm.allgather(seconds)
    return {name: [max(times) for times in zip(*(rank[name] for rank in of_ranks))] for name in cases}


def finished(group, function):
    """The function, and on a GPU the wait until it has done what it was told."""
    if group.device == "cpu":
        return function

    def call():
        function()
        group.xp.cuda.get_current_stream().synchronize()
    return call


def draws(group, seed, dtype):
    """A function of a shape: the next standard normals of this seed, where the group's arrays are."""
    numbers = np.random.default_rng(seed)
    return lambda *shape: group.xp.asarray(numbers.standard_normal(shape).astype(compute_dtype(dtype, group.device)))


def timing(seconds):
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def ratio(seconds, base):
    """Median over the rounds of one case's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds, base))


def mlp_cases(group, tokens, hidden, ffn, activation="gelu_tanh", dtype="float32", prefix=""):
    """{"forward", "forward+backward"} of a ParallelMLP without bias; gradients go into the same buffers again."""
    layer = ParallelMLP(group, hidden, ffn, activation, bias=False, dtype=dtype)
    x, dy = (draws(group, seed, dtype)(tokens, hidden) for seed in (1, 2))
    gradients = layer.backward(dy, layer.forward(x)[1])[1]

    def both():
        _, saved = layer.forward(x)
        layer.backward(dy, saved, out=gradients)

    return {f"{prefix}forward": lambda: layer.forward(x, save=False), f"{prefix}forward+backward": both}, layer


def product_cases(group, tokens, hidden, ffn, dtype="float32"):
    """The bare matrix products of one rank's share, nothing else: the limit of what the block can reach.

    Operands are distinct buffers: one buffer as both operands would take the slower syrk kernel.
    """
    part, draw = group.partition(ffn).lengths[group.rank], draws(group, 3, dtype)
    x, dy, h, dh = draw(tokens, hidden), draw(tokens, hidden), draw(tokens, part), draw(tokens, part)
    up, down = draw(part, hidden), draw(hidden, part)
    dup, ddown = (group.xp.empty(w.shape, sum_dtype(w.dtype)) for w in (up, down))

    def forward():
        linear_forward(x, up)
        linear_forward(h, down)

    def both():
        forward()
        linear_backward(dy, (h, down), ddown)
        linear_backward(dh, (x, up), dup)

    return {"products forward": forward, "products forward+backward": both}


def read_case(group, hidden, ffn, dtype="float32"):
    """A plain read of one rank's two weights by BLAS dot products of 1 MiB, the fastest reader that NumPy has.

    On a GPU a copy of half of them, which reads and writes as many bytes.
    """
    part, dtype = group.partition(ffn).lengths[group.rank], compute_dtype(dtype, group.device)
    if group.device == "gpu":
        source = group.xp.zeros(part * hidden, dtype)
        target = group.xp.empty_like(source)
        return {"read": lambda: group.xp.copyto(target, source)}
    data = np.ones(2 * part * hidden, dtype)
    other = np.ones(1 << 12, dtype)                 # stays in the first-level cache
    rows = data[:data.size // other.size * other.size].reshape(-1, other.size)
    return {"read": lambda: rows @ other}


def flops(tokens, hidden, ffn, backward):
    """Of the products of all ranks: 2 a multiply-add, two products forward, four more backward."""
    return 2 * tokens * hidden * ffn * (6 if backward else 2)


# --- a decoder block: layer norm, causal attention, layer norm, tanh-GELU feed-forward, biases, residuals ---------

def block_config(hidden, heads=BLOCK_HEADS):
    return DecoderConfig(vocab_size=1, hidden_size=hidden, num_layers=1, num_attention_heads=heads,
                         position_embedding="none")


def block_data(tokens, hidden, dtype="float32"):
    """x and dy (1, S, D), the same on every rank."""
    return (np.random.default_rng(seed).standard_normal((1, tokens, hidden)).astype(dtype) for seed in (1, 2))


def block_cases(group, tokens, hidden, heads=BLOCK_HEADS, dtype="float32", prefix=""):
    """{"forward", "forward+backward"} of a ParallelBlock; gradients go into the same buffers again."""
    block = ParallelBlock(group, block_config(hidden, heads), dtype=dtype)
    x, dy = (group.xp.asarray(a) for a in block_data(tokens, hidden, compute_dtype(dtype, group.device)))
    gradients = block.backward(dy, block.forward(x)[1])[1]

    def both():
        _, saved = block.forward(x)
        block.backward(dy, saved, out=gradients)

    return {f"{prefix}forward": lambda: block.forward(x, save=False), f"{prefix}forward+backward": both}


def block_product_cases(group, tokens, hidden, heads=BLOCK_HEADS, dtype="float32"):
    """The bare products of one rank: six linears, and attention's in tiles of queries against the keys that they see.

    Backward of attention: the scores again, and the gradients of weights, value, query and key.
    """
    xp, draw = group.xp, draws(group, 3, dtype)
    K, mine = hidden // heads, group.partition(heads).lengths[group.rank]
    F = group.partition(4 * hidden).lengths[group.rank]
    shapes = 3 * [(hidden, mine * K)] + [(mine * K, hidden), (hidden, F), (F, hidden)]
    of_gradients = sum_dtype(compute_dtype(dtype, group.device))
    linears = [(draw(tokens, i), draw(o, i), draw(tokens, o), xp.empty((o, i), of_gradients)) for i, o in shapes]
    q, k, v, da = (draw(mine, tokens, K) for _ in range(4))
    tile = tile_of(group)
    p, ds = (xp.empty(mine * min(tile, tokens) * tokens, q.dtype) for _ in range(2))

    def scores(a, b, buffer, queries, keys):
        shape = mine, queries.stop - queries.start, keys.stop
        out = buffer[:mine * shape[1] * shape[2]].reshape(shape)
        return stacked_product(a[:, queries], b[:, keys].swapaxes(1, 2), out)

    def forward():
        for x, w, _, _ in linears:
            linear_forward(x, w)
        for queries, keys in causal_tiles(tokens, tile):
            stacked_product(scores(q, k, p, queries, keys), v[:, keys])

    def both():
        forward()
        for x, w, dy, dw in linears:
            linear_backward(dy, (x, w), dw)
        for queries, keys in causal_tiles(tokens, tile):
            weights, d_scores = scores(q, k, p, queries, keys), scores(da, v, ds, queries, keys)
            stacked_product(weights.swapaxes(1, 2), da[:, queries])
            stacked_product(d_scores, k[:, keys])
            stacked_product(d_scores.swapaxes(1, 2), q[:, queries])

    return {"products forward": forward, "products forward+backward": both}


def tile_of(group):
    """How many queries attention takes at once."""
    return (attention if group.device == "cpu" else twin("attention")).TILE


def stacked_product(a, b, out=None):
    return np.matmul(a, b, out=out) if module_of(a) is np else product(a, b, out)


def causal_tiles(tokens, tile):
    """The queries of each tile, and the keys that it sees."""
    return [(slice(first, min(first + tile, tokens)), slice(0, min(first + tile, tokens)))
            for first in range(0, tokens, tile)]


def block_flops(tokens, hidden, backward, tile):
    """Of the products of all ranks: 12 D^2 weights; attention's two products forward, seven with backward."""
    scores = sum((queries.stop - queries.start) * keys.stop for queries, keys in causal_tiles(tokens, tile))
    return 2 * (12 * tokens * hidden ** 2 * (3 if backward else 1) + scores * hidden * (7 if backward else 2))


# --- one token after the other ----------------------------------------------------------------------------------

def decode_cases(group, tokens, hidden, heads=BLOCK_HEADS, dtype="float32"):
    """{"decode", "matrix-vector products"} of a decoder of Llama's kind, 2 layers, 8,192 tokens, behind a prompt.

    Returns them and the model. A call decodes one token in the same place, behind `tokens` of them.
    """
    config = DecoderConfig(8192, hidden, 2, heads, normalization="rmsnorm", activation="silu", gated=True,
                           qkv_bias=False, attention_bias=False, mlp_bias=False, tie_word_embeddings=True)
    model = Decoder(group, config, dtype=dtype)
    kv = KeyValues(model, 1, tokens + 1)
    model.extend(np.arange(tokens)[None] % 8192, kv)

    extend = one_token(model, kv, RECORD_FROM)              # as generation does it

    def decode():
        extend(np.array([[1]]))
        kv.advance(-1)
    return {"decode": decode, "matrix-vector products": matrix_vector_products(model)}, model


def matrix_vector_products(model):
    """A function that multiplies every matrix of this rank by a vector, the head's once: the limit of decoding."""
    weights = [w for name, w in model.weights.items() if w.ndim == 2 and not name.startswith("position")]
    if not model.config.tie_word_embeddings:                # a lookup reads one row of it
        weights = [w for w in weights if w is not model.weights["embedding.weight"]]
    xp = model.group.xp
    x = {w.shape[1]: xp.ones((1, w.shape[1]), w.dtype) for w in weights}
    y = {w.shape[0]: xp.empty((1, w.shape[0]), w.dtype) for w in weights}
    multiply = (lambda x, w, y: np.matmul(x, w.T, out=y)) if xp is np else linear_forward

    def products():
        for w in weights:
            multiply(x[w.shape[1]], w, y[w.shape[0]])
    return products
