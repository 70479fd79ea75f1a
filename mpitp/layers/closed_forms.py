"""What sequence parallelism and recomputation send and keep, by formula: collectives, elements, bytes.

Korthikanti et al., arXiv 2205.05198: sections 4.2.2 (collectives), 4.1 and 5 (activations). n = N D, the elements of a
complete activation. Elements that a rank sends in a block, forward and backward, where P divides the rows:

    whole x on every rank                       8 n (P-1)/P         4 all-reduces
    rows, gathered inputs kept                  8 n (P-1)/P         4 all-gathers, 4 reduce-scatters
    rows, gathered again                       10 n (P-1)/P         6 all-gathers, 4 reduce-scatters
    whole x, block recomputed                  10 n (P-1)/P         5 all-reduces
    rows, block recomputed                     11 n (P-1)/P         6 all-gathers, 5 reduce-scatters

Dimension key: N rows (tokens), n of one rank, D hidden, F feed-forward, P ranks.
"""
from collections import Counter
from typing import Any

from ..comm.ledger import Collective


class Ways:
    """The ways f and g between a rank's activations and complete ones, as closed forms over `elements` of `dtype`."""

    def __init__(self, elements: int, dtype: str, by_rows: bool):
        self.elements, self.dtype, self.by_rows = elements, dtype, by_rows

    def to_all(self, times: int = 1) -> Counter:
        """Return f forward, or g backward: one all-gather each by rows, else nothing."""
        return self.count("all_gather", times) if self.by_rows else Counter()

    def summed(self, width: int = 1) -> Counter:
        """Return g forward, or f backward, of `width` such arrays at once: one reduce-scatter, else one all-reduce."""
        return self.count("reduce_scatter" if self.by_rows else "all_reduce", 1, width)

    def count(self, operation: str, times: int, width: int = 1) -> Counter:
        """Return a Counter of one collective."""
        return +Counter({Collective(operation, width * self.elements, self.dtype): times})


def block_collectives(block: Any, tokens: int, gather_again: bool, with_norms: bool = True) -> tuple[Counter, Counter]:
    """Return the collectives of a block's forward and backward, as ParallelBlock.collectives.

    with_norms : whether this backward adds up its norms' gradients by rows, which a decoder's backward does for all
        blocks, and a training step for all its backwards
    """
    config, recompute, by_rows = block.config, block.recompute, block.sequence_parallel
    ways = Ways(tokens * config.hidden_size, block.dtype.name, by_rows)
    inner_forward, inner_backward = inner_collectives(block, tokens)
    if by_rows and block.attention.shared_norms:                # among the other norms
        inner_backward -= head_norms([block])
    is_parallel, has_post_norm = config.parallel_residual, "mlp_post_norm" in block.norms
    inputs = 1 if config.shared_norm else 2
    if is_parallel:
        forward = ways.to_all(inputs) + ways.summed()
        backward = ways.to_all() + ways.summed(inputs) + inner_backward
        again = ways.to_all(inputs)                             # a block's or attention's: both products' inputs
    else:
        forward = ways.to_all(2) + ways.summed() + ways.summed() + inner_forward
        backward = ways.to_all(2) + ways.summed() + ways.summed() + inner_backward
        again = ways.to_all(2) + ways.summed() + (ways.summed() if has_post_norm else Counter()) + inner_forward
    if recompute == "block":
        backward += again
    elif recompute == "attention" and not is_parallel:
        backward += ways.to_all() + inner_forward + (ways.to_all() if gather_again else Counter())
    elif gather_again:
        backward += ways.to_all(inputs)
    return forward, backward + (norm_collectives([block]) if with_norms and by_rows else Counter())


def inner_collectives(block: Any, tokens: int) -> tuple[Counter, Counter]:
    """Return the collectives inside attention's forward and backward: those that are neither f nor g."""
    forward, backward = block.attention.collectives(tokens)
    whole = Counter({Collective("all_reduce", tokens * block.config.hidden_size, block.dtype.name): 1})
    return forward - whole, backward - whole


def head_norms(blocks: list[Any], pieces: int = 1) -> Counter:
    """Return the all-reduce of the gradients of the query and key norms of some blocks."""
    elements = sum(len(block.attention.shared_norms) * block.attention.kv_channels for block in blocks)
    return +Counter({Collective("all_reduce", pieces * elements, blocks[0].sum_dtype.name): min(1, elements)})


def row_norms(layers: list[Any], pieces: int = 1) -> Counter:
    """Return the all-reduce of the gradients of the norms over the hidden features of some blocks, and some norms."""
    norms = [norm for layer in layers for norm in getattr(layer, "norms", {"": layer}).values()]
    elements = sum(w.size for norm in norms for w in norm.weights.values())
    return +Counter({Collective("all_reduce", pieces * elements, layers[0].sum_dtype.name): min(1, elements)})


def norm_collectives(layers: list[Any], pieces: int = 1) -> Counter:
    """Return the all-reduces of the gradients of all norms by rows, of a backward or of a step of so many pieces.

    In ordinary mode one of all, whatever the number of pieces; in reproducible mode, where each piece is a leaf of a
    tree, one over rows and one over heads.

    layers : blocks, and norms beside them
    """
    blocks = [layer for layer in layers if hasattr(layer, "norms")]
    if not pieces:
        return Counter()
    if layers[0].group.reproducible:
        return row_norms(layers, pieces) + (head_norms(blocks, pieces) if blocks else Counter())
    together = row_norms(layers) + (head_norms(blocks) if blocks else Counter())
    elements = sum(key.elements * calls for key, calls in together.items())
    return +Counter({Collective("all_reduce", elements, layers[0].sum_dtype.name): min(1, elements)})


def step_norm_collectives(model: Any, pieces: int) -> Counter:
    """Return the all-reduces of the gradients of a decoder's norms that end a training step of so many pieces.

    None without sequence parallelism, where every rank has all rows; and a query or key norm adds up in each backward.
    """
    norms = [norm for norm in (model.embedding_norm, model.final_norm) if norm]
    return norm_collectives([*model.blocks, *norms], pieces) if model.sequence_parallel else Counter()


def decoder_collectives(model: Any, tokens: int, with_norms: bool = True) -> tuple[Counter, Counter]:
    """Return the collectives of a decoder's forward and backward, without the loss, as Decoder.collectives.

    with_norms : as block_collectives's
    """
    ways = Ways(tokens * model.config.hidden_size, model.dtype.name, model.sequence_parallel)
    forward = ways.summed() + ways.to_all()                     # of the embedding, to the head
    backward = ways.summed() + ways.to_all(2 if model.gather_again else 1)
    for block in model.blocks:
        of_forward, of_backward = block_collectives(block, tokens, model.gather_again, with_norms=False)
        forward, backward = forward + of_forward, backward + of_backward
    return forward, backward + (step_norm_collectives(model, 1) if with_norms else Counter())


def activation_bytes(block: Any, tokens: int, gather_again: bool = False) -> int:
    """Return the bytes that a rank keeps of a block for backward, in arrays of activations.

    Of a block whose norms stand before the branches, without dropout and query and key norms, each of which keeps some
    more. In elements, with n rows of this rank in sequence parallelism, else n = N, F = 4 D, no gate:

        norms                   2 n D           the normalised x, of which the gradients are made
        inputs of products      2 N D           n in place of N where they are gathered again
        attention               4 N D / P       queries, keys, values, heads
        feed-forward            8 N D / P       activation and derivative

    So 16 N D / P with rows that are gathered again: in 16 bits 32 N D / P bytes. Section 4.2.2 of the paper has
    34 N D / P beside attention's scores, which are never kept here: 32 of them for the same arrays (with the GELU's
    input in place of its derivative), and 2 for the masks of dropout.
    """
    config, group, attention, mlp = block.config, block.group, block.attention, block.mlp
    D, itemsize = config.hidden_size, block.dtype.itemsize
    own = group.partition(tokens).lengths[group.rank] if block.sequence_parallel else tokens
    if block.recompute == "block":
        return own * D * itemsize
    inputs = own if gather_again or not block.sequence_parallel else tokens
    queries, keys = attention.partition.lengths[group.rank], sum(u.stop - u.start for u in attention.heads.held_units)
    of_norms = len(block.norms) * own * (D + 1)                 # and 1 / rms of each row
    of_inputs = (1 if config.shared_norm else 2) * inputs * D
    of_attention = tokens * (2 * (queries + keys) * attention.kv_channels + queries)        # and its logarithms of sums
    if block.recompute == "attention":
        of_attention = 0
        of_inputs = of_inputs if config.parallel_residual else (inputs + own) * D
    of_mlp = (4 if mlp.gated else 2) * tokens * mlp.partition.lengths[group.rank]
    return itemsize * (of_norms + of_inputs + of_attention + of_mlp)
