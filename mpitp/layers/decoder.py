"""The decoder: embeddings, blocks, final norm, head, over ranks.

Dimension key: B sequences, S positions, D hidden, V vocabulary; p marks the axis that is split over the ranks.
"""
from collections import Counter
from math import prod
from typing import Any

import numpy as np

from ..arrays import Array, scaled
from ..comm.group import TensorParallelGroup
from ..config import DecoderConfig
from ..errors import require
from .base import require_saved
from .block import ParallelBlock, hidden_dropout
from .composite import Composite
from .embedding import PositionEmbedding, VocabParallelEmbedding
from .heads import require_mask
from .linear import ColumnParallelLinear
from .loss import vocab_parallel_cross_entropy_backward, vocab_parallel_cross_entropy_forward
from .norm import hidden_norm
from .products import reduce_from_ranks_backward


class Decoder(Composite):
    """A Decoder is a decoder-only transformer over ranks: ids in, logits of the rank's part of the vocabulary out.

    Parameters
    ----------
    group : TensorParallelGroup
        The ranks.
    config : DecoderConfig
        Sizes and choices.
    dtype : str
        "float32" or "float64"; on a GPU "float16" and "bfloat16" too.
    seed : int or None
        Of the initial weights and of dropout, the same for any number of ranks; None for zeros.
    sequence_parallel : bool
        Between its products each rank has some rows (tokens) only; ids, targets and logits are as without.
    gather_again : bool
        With sequence_parallel: what enters a product is gathered again in backward instead of being kept.
    recompute : str or None
        "block" or "attention": what backward computes again, see ParallelBlock.

    Attributes
    ----------
    specs, weights : dict
        Of all parameters: "embedding.weight" [V, D], "position.weight", "embedding_norm.*",
        "layers.0.attention_norm.*", "layers.0.attention.query.weight" ..., "final_norm.*", "head.weight" [V, D].
    partition : Partition
        Of the vocabulary.

    Raises
    ------
    InputError
        For a config that is none, an unknown dtype; forward: for ids that are no integers or outside the vocabulary,
        a mask of another shape, more positions than learned ones.

    Notes
    -----
    Collectives of forward: one all-reduce of N x D of the embedding, and those of the blocks; of backward: those of the
    blocks, and one of N x D of the head. See collectives(). Sequence parallelism: Korthikanti et al., arXiv 2205.05198.
    """

    def __init__(self, group: TensorParallelGroup, config: DecoderConfig, *, dtype: str = "float32",
                 seed: int | None = 0, sequence_parallel: bool = False, gather_again: bool = False,
                 recompute: str | None = None):
        require(isinstance(config, DecoderConfig), f"config {type(config).__name__}", "a DecoderConfig")
        require(sequence_parallel or not gather_again, "gather_again without sequence_parallel", "both")
        common: dict[str, Any] = dict(dtype=dtype, seed=seed)
        self.config, self.seed = config, 0 if seed is None else seed
        self.sequence_parallel, self.gather_again = bool(sequence_parallel), bool(gather_again)
        V, D, std = config.vocab_size, config.hidden_size, config.init_method_std
        self.embedding = VocabParallelEmbedding(group, V, D, config.embedding_multiplier, init_std=std,
                                                name="embedding", **common)
        self.position = PositionEmbedding(group, config.max_position_embeddings or 0, D, config.position_offset,
                                          init_std=std, name="position", **common) \
            if config.position_embedding == "learned" else None
        self.embedding_norm = hidden_norm(group, config, dtype, "embedding_norm") if config.embedding_norm else None
        of_blocks = dict(common, sequence_parallel=sequence_parallel, recompute=recompute)
        self.blocks = [ParallelBlock(group, config, i, name=f"layers.{i}", **of_blocks)
                       for i in range(config.num_layers)]
        self.final_norm = hidden_norm(group, config, dtype, "final_norm") if config.final_norm else None
        common.update(tied_to=self.embedding if config.tie_word_embeddings else None, name="head")
        if config.logits_multiplier == 1 and config.logits_softcap is None:
            self.head = ColumnParallelLinear(group, D, V, config.head_bias, init_std=std, **common)
        else:
            from .scaled_head import ScaledHead             # where it is used: most models have none
            self.head = ScaledHead(group, config, **common)
        parts = [self.embedding, self.position, self.embedding_norm, *self.blocks, self.final_norm, self.head]
        super().__init__(group, [part for part in parts if part], dtype, "")
        self.partition = group.partition(V)

    def forward(self, ids: Any, *, mask: Array | None = None, step: int | None = None,
                save: bool = True) -> tuple[Array, Any]:
        """Return logits (..., S, V p) of ids (..., S), integers, the same on every rank; and what backward needs.

        mask : bool, True where a key may be attended, beside the causal mask: (B, S) or (B, S, S)
        step : the training step, which the dropout masks depend on. None: no dropout
        save : False: None in place of what backward needs
        """
        x, of_hidden = self.hidden(ids, mask=mask, step=step, save=save)
        logits, of_head = self.head.forward(x, rows=of_hidden[-1], save=save)
        return logits, ((self, of_hidden, of_head) if save else None)

    def hidden(self, ids: Any, *, mask: Array | None = None, step: int | None = None,
               save: bool = True) -> tuple[Array, Any]:
        """Return x (..., S, D), complete, of ids (..., S), forward without the head; and what backward needs.

        In sequence parallelism x (n, D) is this rank's rows.
        """
        ids = ids if hasattr(ids, "ndim") else np.asarray(ids)      # token_ids checks them where they are
        require(ids.ndim > 0, "ids without an axis", "(..., positions)")
        require_mask(mask, prod(ids.shape[:-1]), ids.shape[-1])
        mask = mask if mask is None else self.group.xp.asarray(mask)        # here, not once a layer
        of_position, of_blocks, rows = None, [], None
        if self.sequence_parallel:
            from ..comm.rows import Rows
            rows = Rows(self.group, (prod(ids.shape[:-1]), ids.shape[-1]), self.gather_again)
        if self.position:                                   # first, as it may refuse
            positions, of_position = self.position.forward(ids.shape[-1], save=save)
        x, of_embedding = self.embedding.forward(ids, rows=rows, save=save)
        if self.position:
            x += positions if rows is None else positions[rows.positions]
        x, of_embedding_norm = self.embedding_norm.forward(x, rows=rows, save=save) if self.embedding_norm \
            else (x, None)
        scale = hidden_dropout(self.group, self.seed, "embedding.dropout", step, self.config.hidden_dropout, x.shape,
                               self.sum_dtype, rows)
        x = scaled(x, scale, out=x)
        for block in self.blocks:
            x, of_block = block.forward(x, mask=mask, step=step, rows=rows, save=save)
            of_blocks.append(of_block)
        x, of_final_norm = self.final_norm.forward(x, rows=rows, save=save) if self.final_norm else (x, None)
        return x, (of_embedding, of_position, of_embedding_norm, scale, of_blocks, of_final_norm, rows)

    def extend(self, ids: Any, kv: Any, counts: Any = None) -> Array:
        """Continue the sequences of kv by ids (B, S); returns logits (B, V p) after the last new token of each.

        Parameters
        ----------
        ids : (B, S) array of int
            The new tokens.
        kv : KeyValues
            What the new tokens' keys and values are added to.
        counts : (B,) array of int, optional
            How many of the S tokens belong to each sequence; what follows them in a row is padding, which changes
            nothing. None: all. So prompts of unequal length go in at once.
        """
        kv.require_room(ids.shape)
        counts = np.full(len(ids), ids.shape[1]) if counts is None else np.asarray(counts)
        ids = self.embedding.checked(ids)
        if self.position:
            most, longest = self.position.max_positions, int((kv.lengths + counts).max())
            require(longest <= most, f"{longest} positions", f"at most {most}, of the learned ones")
        logits = self.continued(ids, kv, counts)
        kv.advance(counts)
        return logits

    def continued(self, ids: Array, kv: Any, counts: Any = None) -> Array:
        """Return the logits of extend() for ids that were checked; kv.advance() is left to the caller.

        counts None: one token of each sequence. Then the host decides nothing that depends on the position, so that a
        recorded call can be replayed at later positions.
        """
        xp, S = self.group.xp, ids.shape[1]
        x = self.embedding.look_up(ids)
        if self.position:                                   # padding may stand at any position
            positions = xp.minimum(kv.starts[:, None] + xp.arange(S), self.position.max_positions - 1)
            x += self.position.own["weight"][self.position.offset:][positions]
        if self.embedding_norm:
            x, _ = self.embedding_norm.forward(x, save=False)
        for block, of_layer in zip(self.blocks, kv.layers):
            x, _ = block.forward(x, kv=of_layer, save=False)
        x = x[:, 0] if S == 1 else x[np.arange(len(ids)), counts - 1]
        if self.final_norm:
            x, _ = self.final_norm.forward(x, save=False)
        return self.head.forward(x, save=False)[0]

    def backward(self, d_logits: Array, saved: Any, *, out: Any = None, step_sums: Any = None,
                 beside: Any = None) -> dict[str, Array]:
        """Return {name: gradient} of this rank's slices, of d_logits (..., S, V p).

        out : an earlier backward's gradients, whose arrays are used again
        step_sums : NormSumsOfStep of a caller who adds up norms' gradients once for several backwards, or None
        beside : GradientBuckets of a caller who adds up over data ranks meanwhile, or None
        """
        of_hidden, of_head = require_saved(saved, self)
        of_embedding, of_position, of_embedding_norm, scale, of_blocks, of_final_norm, rows = of_hidden
        gradients, sums = self.gradients(out), None
        if rows is not None:
            from .norm_sums import NormSums
            sums = NormSums(rows)
        dx = self.layer_backward(self.head, d_logits, of_head, gradients)
        if self.final_norm:
            dx = self.layer_backward(self.final_norm, dx, of_final_norm, gradients, sums)
        for block, of_block in zip(reversed(self.blocks), reversed(of_blocks)):
            dx, _ = block.backward(dx, of_block, out=self.gradients_of(block, gradients), norm_sums=sums)
            if beside is not None:
                beside.complete(block)
        dx = scaled(dx, scale)
        if self.embedding_norm:
            dx = self.layer_backward(self.embedding_norm, dx, of_embedding_norm, gradients, sums)
        if sums is not None:
            sums.end(gradients, step_sums)                      # of every norm: not before the last of them
            dx = reduce_from_ranks_backward(dx, rows).reshape(*rows.shape, dx.shape[-1])        # g* of the embedding
        if self.position:
            self.layer_backward(self.position, dx, of_position, gradients)
        if self.config.tie_word_embeddings:                     # where the head has written its gradient
            gradients["embedding.weight"] += self.embedding.backward(dx, of_embedding)[1]["embedding.weight"]
        else:
            self.layer_backward(self.embedding, dx, of_embedding, gradients)
        return gradients

    def layer_backward(self, layer: Any, dy: Array, saved: Any, gradients: dict[str, Array], sums: Any = None) -> Any:
        """Return dx of one of the layers, and write its gradients, or leave a norm's to `sums`."""
        if sums is not None:
            return sums.backward(layer, dy, saved)
        return layer.backward(dy, saved, out=self.gradients_of(layer, gradients))[0]

    def loss(self, logits: Array, targets: Any, *, label_smoothing: float = 0.0, z_loss: float = 0.0,
             ignore_index: int = -100) -> tuple[float, Any]:
        """Return the mean cross entropy of targets (..., S), global ids; and what loss_backward needs."""
        return vocab_parallel_cross_entropy_forward(logits, targets, self.group, self.partition,
                                                    label_smoothing=label_smoothing, z_loss=z_loss,
                                                    ignore_index=ignore_index)

    def loss_backward(self, saved: Any, d_loss: float = 1.0) -> Array:
        """Return the gradient of the loss with respect to this rank's logits."""
        return vocab_parallel_cross_entropy_backward(saved, d_loss)

    def gather_logits(self, logits: Array) -> Array:
        """Return logits (..., V) of the whole vocabulary on every rank. Collective: one all-gather of N x V."""
        return self.group.all_gather(logits, self.partition, axis=-1)

    def collectives(self, tokens: int) -> tuple[Counter, Counter]:
        """Return how many collectives forward and backward do, without the loss: two Counters of Collective."""
        if self.sequence_parallel or self.blocks[0].recompute:
            from .closed_forms import decoder_collectives
            return decoder_collectives(self, tokens)
        layers: Any = (self.embedding, *self.blocks, self.head)
        forward, backward = zip(*(layer.collectives(tokens) for layer in layers))
        return sum(forward, Counter()), sum(backward, Counter())
