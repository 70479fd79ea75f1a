"""What a rank does in one step, prefill or token: products, passes over memory, messages, and Python around them.

In sequence parallelism norms and residuals work on this rank's n rows, products on all N; a recomputation repeats a
block's forward but for its last product.

Dimension key: as in transient.py.
"""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from ..arrays import compute_dtype
from ..config import DecoderConfig
from .job import Job, Layout, own_rows, pieces
from .messages import messages
from .tensors import is_matrix, local_elements, specs_of
from .transient import Sizes, peaks, sizes


@dataclass(frozen=True)
class Item:
    """An Item is one kind of work, done `count` times.

    Attributes
    ----------
    kind : str
        "product", "scores" (of attention), "pass" (over memory), "message" or "python".
    what : str
        Which: "forward", "dx" or "dw" of a product; the operation of a pass; the layer that Python runs.
    size : tuple of int
        Of a product rows, out and in features; of scores heads, queries, keys and features of a head; of a pass the
        elements; of a message the bytes, the ranks, and how many ranks of a host send another one meanwhile.
    count : int
    """
    kind: str
    what: str
    size: tuple[int, ...]
    count: int = 1


def times(items: list[Item], count: int) -> list[Item]:
    """Return the same items so many times."""
    return [replace(item, count=item.count * count) for item in items]


def work(job: Job, layout: Layout, phase: str, rank: int = 0) -> list[Item]:
    """Return the work of one rank in a "step" of training, a "prefill", a "token" or a "window".

    phase : as messages()'s
    """
    s, rows = sizes(job.config, layout)[rank], job.batch * (1 if phase == "token" else job.tokens)
    keys = job.positions if phase == "token" else job.tokens
    if phase == "step":
        found, sequences = [], pieces(job, layout)
        for batch, count in Counter(sequences).items():
            N = batch * job.tokens
            found += times(training_forward_backward(job, s, N, own_rows(job, layout, N)[rank]), count)
        parameters = sum(local_elements(spec, layout)[rank] for spec in specs_of(job.config).values())
        found += [Item("pass", "add", (parameters,), len(sequences) - 1)]
        count = len(specs_of(job.config))
        found += [Item("pass", "sum of squares", (parameters // count,), count),
                  Item("pass", "adamw", (parameters // count,), count), Item("python", "step", ())]
    else:
        found = [Item("pass", "embedding", (rows * s.D,))]
        found += times(block_forward(job.config, s, rows, keys, phase), job.config.num_layers)
        found += norm(job.config, rows * s.D, "forward") if job.config.final_norm else []
        of_head = rows if phase == "window" else job.batch
        found += [Item("product", "forward", (of_head, s.V, s.D)), Item("python", phase, ())]
        found += [Item("pass", "loss", (rows * s.V,))] if phase == "window" else \
            [Item("pass", "greatest", (job.batch * s.V,))]
    for message in messages(job, layout, phase):
        size, sharing = message.sent_bytes // max(1, message.calls), layout.tensor if message.over == "data" else 1
        found.append(Item("message", message.operation, (size, message.ranks, sharing), message.calls))
    return [item for item in found if item.count]


def training_forward_backward(job: Job, s: Sizes, N: int, n: int) -> list[Item]:
    """Return forward, loss and backward of N tokens, n of them this rank's rows, without messages."""
    config = job.config
    found = [Item("pass", "embedding", (N * s.D,)), Item("pass", "embedding backward", (N * s.D,)),
             Item("pass", "zero", (s.V * s.D,))]
    block = block_forward(config, s, N, job.tokens, "step", n) + block_backward(config, s, N, job.tokens, n)
    found += times(block + recomputation(job, s, N, n), config.num_layers)
    if config.final_norm:
        found += norm(config, n * s.D, "forward") + norm(config, n * s.D, "backward")
    found += [Item("product", what, (N, s.V, s.D)) for what in ("forward", "dx", "dw")]
    found += [Item("pass", "loss", (N * s.V,)), Item("pass", "loss backward", (N * s.V,))]
    if config.tie_word_embeddings:
        found.append(Item("pass", "add", (s.V * s.D,)))
    return found


def recomputation(job: Job, s: Sizes, N: int, n: int) -> list[Item]:
    """Return what backward computes again of one block, whose last product it leaves out."""
    config, python = job.config, [Item("python", "block recomputed", ())]
    if job.recompute == "attention":
        again = attention_forward(config, s, N, job.tokens, "step")
        return without(again, Item("product", "forward", (N, s.D, s.Q))) + python
    if job.recompute == "block":
        again = [item for item in block_forward(config, s, N, job.tokens, "step", n) if item.kind != "python"]
        if config.parallel_residual:
            again = without(again, Item("product", "forward", (N, s.D, s.Q)))
        if config.parallel_residual or config.norm_placement == "before":       # a norm behind it needs the product
            again = without(again, Item("product", "forward", (N, s.D, s.F)))
        return again + python
    return []


def without(items: list[Item], one: Item) -> list[Item]:
    """Return the items without one of them."""
    at = items.index(one)
    return items[:at] + items[at + 1:]


# --- a block -------------------------------------------------------------------------------------------------------

def block_forward(config: DecoderConfig, s: Sizes, N: int, keys: int, phase: str, n: int | None = None) -> list[Item]:
    """Return one block's forward of N tokens, which see up to `keys` keys; in a "step" it keeps what backward needs.

    n : this rank's rows; None for all
    """
    own = (N if n is None else n) * s.D
    found = norm(config, own, "forward") * norms(config)
    found += attention_forward(config, s, N, keys, phase)
    found += mlp_forward(config.activation, config.gated, config.mlp_bias, s, N, phase == "step")
    found += [Item("pass", "add", (own,), 2), Item("python", f"block {phase}", ())]
    return found


def block_backward(config: DecoderConfig, s: Sizes, N: int, keys: int, n: int | None = None) -> list[Item]:
    """Return one block's backward; n as block_forward's."""
    own = (N if n is None else n) * s.D
    found = norm(config, own, "backward") * norms(config)
    found += attention_backward(config, s, N, keys)
    found += mlp_backward(config.gated, config.mlp_bias, s, N)
    found += [Item("pass", "add", (own,), 2)]
    return found


def norms(config: DecoderConfig) -> int:
    """Return how many norms over the hidden features a block has."""
    return 4 if config.norm_placement == "both" else 1 if config.shared_norm else 2


def norm(config: DecoderConfig, elements: int, direction: str) -> list[Item]:
    """Return a norm over so many numbers."""
    return [Item("pass", f"{config.normalization} {direction}", (elements,))]


def mlp_forward(activation: str, gated: bool, bias: bool, s: Sizes, N: int, kept: bool) -> list[Item]:
    """Return the feed-forward block's forward."""
    of_pass = f"{activation}{' gated' if gated else ''}{' kept' if kept else ''}"
    found = [Item("product", "forward", (N, s.F, s.D), 2 if gated else 1), Item("pass", of_pass, (N * s.F,)),
             Item("product", "forward", (N, s.D, s.F))]
    if bias:
        found += [Item("pass", "bias", (N * s.F,), 2 if gated else 1), Item("pass", "bias", (N * s.D,))]
    return found


def mlp_backward(gated: bool, bias: bool, s: Sizes, N: int) -> list[Item]:
    """Return the feed-forward block's backward."""
    ways = 2 if gated else 1
    found = [Item("product", "dx", (N, s.D, s.F)), Item("product", "dw", (N, s.D, s.F)),
             Item("pass", "gated backward" if gated else "activation backward", (N * s.F,)),
             Item("product", "dx", (N, s.F, s.D), ways), Item("product", "dw", (N, s.F, s.D), ways),
             Item("pass", "add", (N * s.D,), ways - 1)]
    if bias:
        found += [Item("pass", "bias backward", (N * s.F,), ways), Item("pass", "bias backward", (N * s.D,))]
    return found


def attention_forward(config: DecoderConfig, s: Sizes, N: int, keys: int, phase: str) -> list[Item]:
    """Return attention's forward."""
    K, tokens = config.head_dim, 1 if phase == "token" else keys
    found = [Item("product", "forward", (N, s.Q, s.D)), Item("product", "forward", (N, s.U, s.D), 2),
             Item("product", "forward", (N, s.D, s.Q))]
    if config.position_embedding == "rotary":
        found += [Item("pass", "rotary", (N * s.Q,)), Item("pass", "rotary", (N * s.U,))]
    if config.qk_norm:
        found += [Item("pass", f"{config.normalization} forward", (N * size,)) for size in (s.Q, s.U)]
    if phase == "token":
        found.append(Item("scores", "token", (s.H, s.G, keys, K), N))
    else:
        found.append(Item("scores", "forward", (s.H, tokens, keys, K), N // tokens))
    if phase in ("token", "prefill"):
        found.append(Item("pass", "append", (2 * N * s.U,)))
    return found + biases(config, s, N, "bias")


def attention_backward(config: DecoderConfig, s: Sizes, N: int, keys: int) -> list[Item]:
    """Return attention's backward."""
    found = [Item("product", what, size) for what in ("dx", "dw") for size in
             ((N, s.Q, s.D), (N, s.U, s.D), (N, s.U, s.D), (N, s.D, s.Q))]
    found += [Item("pass", "add", (N * s.D,), 2), Item("scores", "backward", (s.H, keys, keys, config.head_dim),
                                                       N // keys)]
    if config.position_embedding == "rotary":
        found += [Item("pass", "rotary", (N * s.Q,)), Item("pass", "rotary", (N * s.U,))]
    if config.qk_norm:
        found += [Item("pass", f"{config.normalization} backward", (N * size,)) for size in (s.Q, s.U)]
    return found + biases(config, s, N, "bias backward")


def biases(config: DecoderConfig, s: Sizes, N: int, what: str) -> list[Item]:
    """Return the passes over what attention's biases are added to."""
    found = [Item("pass", what, (N * size,)) for size in (s.Q, s.U, s.U)] if config.qkv_bias else []
    return found + ([Item("pass", what, (N * s.D,))] if config.attention_bias else [])


def working_bytes(job: Job, layout: Layout, phase: str, rank: int = 0) -> int:
    """Return the bytes of this rank's arrays that a phase works on.

    These are weights; in a step gradients, too; keys and values of a token; and what the phase makes.
    """
    specs = [spec for name, spec in specs_of(job.config).items() if is_matrix(name, spec)
             and (name != "embedding.weight" or job.config.tie_word_embeddings)]
    itemsize = compute_dtype(job.dtype, job.device).itemsize
    weights = sum(local_elements(spec, layout)[rank] for spec in specs) * itemsize
    if phase == "token":
        held = 2 * job.batch * job.positions * sizes(job.config, layout)[rank].U
        return weights + held * job.config.num_layers * itemsize
    return weights * (2 if phase == "step" else 1) + peaks(job, layout)[rank]
