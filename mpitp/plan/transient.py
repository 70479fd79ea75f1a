"""The memory that a rank needs for a time: what forward keeps for backward, and what is made on the way.

Counted as the arrays of layers/ and ops/ live and die on a CPU. What a norm, an activation or a softmax makes in
pieces that stay in cache counts as one constant.

Dimension key: N rows (tokens) of a forward, n those of this rank, which are all but in sequence parallelism, D hidden;
of this rank: Q features of its query heads and U of the key/value heads that they need, H and G those heads, F
feed-forward features, V columns of the vocabulary.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

from ..arrays import compute_dtype
from ..config import DecoderConfig
from ..sharding.decoder_specs import block_specs
from ..sharding.specs import column_parallel_specs
from .job import Job, Layout, own_rows, pieces
from .tensors import held_lengths

PIECES = 3 << 16            # numbers of a norm's pieces
OF_LOSS = 3 << 15           # of a loss's
SCORES = 1 << 17            # numbers of attention's buffers, or one tile of one head where that is more
TILE = 64                   # queries of a tile
SCORED = 1 << 24            # logits that `score` makes at a time


@dataclass(frozen=True)
class Sizes:
    """The sizes of a rank's part of a decoder, by the dimension key."""
    D: int
    Q: int
    U: int
    H: int
    G: int
    F: int
    V: int


def sizes(config: DecoderConfig, layout: Layout) -> list[Sizes]:
    """Return the sizes of what each rank of a tensor group has, out of its parameters' shapes."""
    D, K = config.hidden_size, config.head_dim
    lengths = {spec.name: held_lengths(spec, layout) for spec in block_specs(config, 0, "") if spec.axis is not None}
    head = column_parallel_specs(config.vocab_size, D, False, None, "head")[0]
    return [Sizes(D, Q, U, Q // K, U // K, F, V) for Q, U, F, V in zip(
        lengths["attention.query.weight"], lengths["attention.key.weight"], lengths["mlp.up.weight"],
        held_lengths(head, layout))]


def peaks(job: Job, layout: Layout) -> list[int]:
    """Return the bytes that each rank of a tensor group needs at most beside what stays."""
    batch = max(pieces(job, layout))
    of_ranks = list(zip(sizes(job.config, layout), own_rows(job, layout, batch * job.tokens)))
    found = {of: peak(job, *of, batch) for of in set(of_ranks)}
    return [found[of] for of in of_ranks]


def peak(job: Job, s: Sizes, own: int, batch: int) -> int:
    """Return the bytes that a rank of these sizes needs at most beside what stays, with so many sequences at once."""
    size = compute_dtype(job.dtype, job.device).itemsize
    if job.kind == "load":
        return 0
    job = replace(job, batch=batch)
    if job.kind != "train":
        return most_of_forward(job, s) * size
    return (kept_by_forward(job, s, own) + most_of_backward(job, s, own)) * size


# --- training: everything that forward keeps, and the largest moment of backward ------------------------------------

def kept_by_forward(job: Job, s: Sizes, n: int) -> int:
    """Return the numbers that the loss and all layers keep until backward has come to its end."""
    config, N = job.config, job.batch * job.tokens
    at_ends = n * (s.D + 1) * (config.final_norm + config.embedding_norm)           # xhat and rstd
    at_ends += n * s.D * (config.embedding_norm + bool(config.hidden_dropout))      # and y; the embedding's scales
    at_ends += kept_inputs(job, n) * s.D                                            # the head's x
    ids_and_loss = 10 * 8 // compute_dtype(job.dtype, job.device).itemsize
    of_block = n * s.D if job.recompute == "block" else kept_by_block(job, s, n, kept_inputs(job, n))
    return config.num_layers * of_block + at_ends + N * (2 * s.V + ids_and_loss)


def kept_inputs(job: Job, n: int) -> int:
    """Return the rows of a product's input that are kept: those of all ranks, unless they are gathered again."""
    return n if job.gather_again else job.batch * job.tokens


def kept_by_block(job: Job, s: Sizes, n: int, inputs: int) -> int:
    """Return the numbers that one block keeps, and of the inputs of its products so many rows."""
    config, N, D = job.config, job.batch * job.tokens, s.D
    branches = 1 if config.shared_norm else 2
    kept = branches * n * (D + 1) * (2 if config.norm_placement == "both" else 1)   # of a norm xhat and rstd
    if job.recompute == "attention" and not config.parallel_residual:
        kept += (n + inputs) * D
    else:
        kept += branches * inputs * D
    kept += kept_by_heads(job, s) if job.recompute != "attention" else 0
    kept += N * (4 if config.gated else 2) * s.F            # activation and slope; of a gate its factors, too
    if config.hidden_dropout:
        kept += (1 if config.parallel_residual else 2) * n * D
    return kept


def kept_by_heads(job: Job, s: Sizes) -> int:
    """Return the numbers that attention keeps beside its input: queries, heads' outputs, keys, values, log-sums."""
    config, kept = job.config, 2 * s.Q + 2 * s.U + s.H
    if config.qk_norm:
        kept += s.Q + s.U + (2 if config.qk_norm_over_heads else s.H + s.G)
    return job.batch * job.tokens * kept


def kept_again(job: Job, s: Sizes, n: int) -> int:
    """Return the numbers that a recomputation makes, which live as long as one block's backward."""
    N = job.batch * job.tokens
    if job.recompute == "block":
        return kept_by_block(replace(job, recompute=None), s, n, N)
    if job.recompute != "attention":
        return 0
    if job.config.parallel_residual:
        gathered = (1 if job.config.shared_norm else 2) * job.gather_again
    else:
        gathered = int(job.sequence_parallel)
    return kept_by_heads(job, s) + gathered * N * s.D


def most_of_backward(job: Job, s: Sizes, n: int) -> int:
    """Return the numbers that are alive beside that at the largest moment of backward."""
    N, D, config, rows = job.batch * job.tokens, s.D, job.config, job.sequence_parallel
    # dy behind the branch's norm, and times what the branch is multiplied by.
    scaled = D * bool(config.norm_placement != "before" or config.hidden_dropout or config.residual_multiplier != 1)
    norm = n * (4 * D + scaled + rows * D) + PIECES
    tied = (N + n) * D + s.V * D if config.tie_word_embeddings else 0
    block = most_of_parallel_block if config.parallel_residual else most_of_block
    return max(kept_again(job, s, n) + block(job, s, n, scaled), norm, tied)


def most_of_block(job: Job, s: Sizes, n: int, scaled: int) -> int:
    """Return the numbers that are alive at the largest moment of the backward of branches one after the other."""
    N, D = job.batch * job.tokens, s.D
    gathered = N * D * job.sequence_parallel                                    # dy of all ranks
    again = N * D * (job.gather_again and job.recompute != "block")             # a product's input
    of_heads, of_units = projected(job.config, s)
    attention = n * (2 * D + scaled) + gathered + again * (job.recompute != "attention")
    return max(n * (D + scaled) + gathered + again + N * most_of_mlp(job.config, s),
               attention + N * (2 * s.Q + 2 * s.U) + numbers_of_scores(job, s),
               attention + N * (of_heads + of_units + 2 * D))


def most_of_parallel_block(job: Job, s: Sizes, n: int, scaled: int) -> int:
    """Return the numbers that are alive at the largest moment of the backward of branches side by side."""
    N, D, rows = job.batch * job.tokens, s.D, job.sequence_parallel
    both = 1 if job.config.shared_norm else 2                       # gradients of the branches' inputs
    gathered = N * D * rows + N * D * both * (job.gather_again and job.recompute is None)
    of_heads, of_units = projected(job.config, s)
    d_scores = N * (of_units + s.Q)
    sent = 2 * both * N * D * (rows and both > 1)                   # each rank's rows of both, put together
    return max(n * (D + scaled) + gathered + N * (2 * s.Q + 2 * s.U) + numbers_of_scores(job, s),
               n * (D + scaled) + gathered + d_scores + N * (both * D + max(of_heads - s.Q + 2 * D,
                                                                            D + most_of_mlp(job.config, s))),
               n * (D + scaled) + gathered + d_scores + N * both * D + sent + n * both * D * rows,
               n * (D + 2 * D + rows * (both + 1) * D) + gathered + d_scores + N * both * D + PIECES)


def most_of_mlp(config: DecoderConfig, s: Sizes) -> int:
    """Return the numbers of a row at the largest moment of the feed-forward block's backward."""
    return 2 * s.F + 2 * s.D if config.gated else s.F + s.D


def projected(config: DecoderConfig, s: Sizes) -> tuple[int, int]:
    """Return the numbers of a row of dq, and of dk and dv: those of queries and keys before norm or rotary are new."""
    new = bool(config.qk_norm or config.position_embedding == "rotary")
    return (1 + new) * s.Q, (2 + new) * s.U


def numbers_of_scores(job: Job, s: Sizes) -> int:
    """Return the numbers that attention's backward makes of one sequence: two buffers of scores, dk and dv, parts of
    these by one tile, and the tile's queries."""
    heads = min(s.H, max(1, SCORES // (min(TILE, job.tokens) * job.tokens)))
    of_tile = heads * s.Q // max(1, s.H) * (job.tokens + 5 * min(TILE, job.tokens))
    return 2 * score_buffer(job.tokens, s.H) + 2 * job.tokens * s.U + of_tile


def score_buffer(tokens: int, heads: int) -> int:
    """Return the numbers of attention's buffer of scores: of as many heads as fit in it, but of one at least.

    A later tile sees more keys. Where it needs a larger buffer, the one before is still held by the tile before.
    """
    held = most = 0
    for stop in range(TILE, tokens + TILE, TILE):
        seen = min(TILE, tokens) * min(stop, tokens)
        size = min(heads, max(1, SCORES // seen)) * seen
        if size > held:
            most, held = max(most, held + size), size
    return most


# --- generation: forward alone, which keeps nothing -----------------------------------------------------------------

def most_of_forward(job: Job, s: Sizes) -> int:
    """Return the numbers that are alive at the largest moment of a forward that keeps nothing."""
    N, D, config = job.batch * job.tokens, s.D, job.config
    norms = (config.norm_placement in ("before", "both")) + (config.parallel_residual and not config.shared_norm)
    before = D * norms                                              # the branches' x, where it is not that of the block
    rotary = config.position_embedding == "rotary"
    keys = 2 * s.U if job.kind == "score" else 0                    # which KeyValues holds otherwise
    normed = bool(config.qk_norm)                                   # xhat of keys and of queries
    keys += normed * s.U
    queries = max(rotary * (5 * s.Q // 2), D + 2 * s.Q) + normed * s.Q         # and turned; y, queries, heads' outputs
    attention = N * (D + before + queries + keys) + score_buffer(job.tokens, s.H)
    mlp = N * (3 * D + before + (2 if config.gated else 1) * s.F + keys * config.parallel_residual)
    logits = 2 * job.batch * s.V
    if job.kind == "score":
        positions = job.tokens * D * (config.position_embedding == "learned")
        attention, mlp = attention + positions, mlp + positions
        rows = min(N, max(1, SCORED // config.vocab_size))
        logits = N * D + (1 if rows == N else 2) * rows * s.V + OF_LOSS
    return max(attention, mlp, logits)
