"""The memory that a rank needs for a time: what forward keeps for backward, and what is made on the way.

Counted as the arrays of layers/ and ops/ live and die on a CPU. What a norm, an activation or a softmax makes in
pieces that stay in cache counts as one constant.

Dimension key: N rows (tokens) of a forward, D hidden; of this rank: Q features of its query heads and U of the
key/value heads that they need, H and G those heads, F feed-forward features, V columns of the vocabulary.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

from ..arrays import compute_dtype
from ..config import DecoderConfig
from ..sharding.decoder_specs import block_specs
from ..sharding.specs import column_parallel_specs
from .job import Job, Layout, pieces
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
    of_ranks = sizes(job.config, layout)
    batch = max(pieces(job, layout))
    found = {s: peak(job, s, batch) for s in set(of_ranks)}
    return [found[s] for s in of_ranks]


def peak(job: Job, s: Sizes, batch: int) -> int:
    """Return the bytes that a rank of these sizes needs at most beside what stays, with so many sequences at once."""
    size = compute_dtype(job.dtype, job.device).itemsize
    if job.kind == "load" or not job.activations:
        return 0
    job = replace(job, batch=batch)
    numbers = kept_by_forward(job, s) + most_of_backward(job, s) if job.kind == "train" else most_of_forward(job, s)
    return numbers * size


# --- training: everything that forward keeps, and the largest moment of backward ------------------------------------

def kept_by_forward(job: Job, s: Sizes) -> int:
    """Return the numbers that the loss and all layers keep until backward has come to its end."""
    config, N, norm = job.config, job.batch * job.tokens, 2 * s.D + 1             # xhat and y, rstd
    at_ends = norm * (config.final_norm + config.embedding_norm)
    at_ends += 0 if config.final_norm else s.D                      # the head's x
    at_ends += s.D * bool(config.hidden_dropout)                    # the embedding's scales
    ids_and_loss = 10 * 8 // compute_dtype(job.dtype, job.device).itemsize
    return N * (config.num_layers * kept_by_block(config, s) + at_ends + 2 * s.V + ids_and_loss)


def kept_by_block(config: DecoderConfig, s: Sizes) -> int:
    """Return the numbers that one block keeps of a row."""
    branches = 1 if config.shared_norm else 2
    kept = branches * (2 * s.D + 1)                                 # of a norm xhat and rstd; of a branch its x
    if config.norm_placement == "both":
        kept += branches * (s.D + 1)
    kept += 2 * s.Q + 2 * s.U + s.H                                 # queries, heads' outputs, keys, values, log-sums
    if config.qk_norm:
        kept += s.Q + s.U + (2 if config.qk_norm_over_heads else s.H + s.G)
    kept += (4 if config.gated else 2) * s.F                        # activation and slope; of a gate its factors, too
    if config.hidden_dropout:
        kept += (1 if config.parallel_residual else 2) * s.D
    return kept


def most_of_backward(job: Job, s: Sizes) -> int:
    """Return the numbers that are alive beside that at the largest moment of backward."""
    N, D, config = job.batch * job.tokens, s.D, job.config
    # dy behind the branch's norm, and times what the branch is multiplied by.
    scaled = D * bool(config.norm_placement != "before" or config.hidden_dropout or config.residual_multiplier != 1)
    mlp = 2 * s.F + 2 * D if config.gated else s.F + D
    scores = N * (2 * s.Q + 2 * s.U) + numbers_of_scores(job, s)
    new = bool(config.qk_norm or config.position_embedding == "rotary")     # dq and dk before norm or rotary
    of_heads, of_units = (1 + new) * s.Q, (2 + new) * s.U
    if config.parallel_residual:
        both = 1 if config.shared_norm else 2
        block = max(N * (D + scaled) + scores,
                    N * (D + scaled + of_units + s.Q + both * D + max(new * s.Q + 2 * D, D + mlp)),
                    N * (D + of_units + s.Q + both * D + 2 * D) + PIECES)
    else:
        block = max(N * (D + scaled + mlp), N * (2 * D + scaled) + scores,
                    N * (2 * D + scaled + of_heads + of_units + 2 * D))
    norm = N * (4 * D + scaled) + PIECES
    tied = N * 2 * D + s.V * D if config.tie_word_embeddings else 0
    return max(block, norm, tied)


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
    mlp = N * (3 * D + before + (3 if config.gated else 1) * s.F + keys * config.parallel_residual)
    logits = 2 * job.batch * s.V
    if job.kind == "score":
        positions = job.tokens * D * (config.position_embedding == "learned")
        attention, mlp = attention + positions, mlp + positions
        rows = min(N, max(1, SCORED // config.vocab_size))
        logits = N * D + (1 if rows == N else 2) * rows * s.V + OF_LOSS
    return max(attention, mlp, logits)
