"""The decoder: embeddings, blocks, final norm, head, over ranks.

Dimension key: B sequences, S positions, D hidden, V vocabulary; p marks the axis that is split over the ranks.
"""
from collections import Counter
from math import prod

import numpy as np

from ..arrays import scaled
from ..config import DecoderConfig
from ..errors import require
from .base import Composite, require_saved
from .block import ParallelBlock, hidden_dropout, make_norm
from .embedding import PositionEmbedding, VocabParallelEmbedding
from .heads import require_mask
from .linear import ColumnParallelLinear
from .loss import vocab_parallel_cross_entropy_backward, vocab_parallel_cross_entropy_forward


class Decoder(Composite):
    """A decoder-only transformer over ranks: token ids in, logits out, each rank with its part of the vocabulary.

    Parameters
    ----------
    group : TensorParallelGroup
    config : DecoderConfig
    dtype : "float32" or "float64"
    seed : of the initial weights and of dropout, the same for any number of ranks; None for zeros

    Attributes
    ----------
    specs, weights : of all parameters: "embedding.weight" [V, D], "position.weight", "embedding_norm.*",
        "layers.0.attention_norm.*", "layers.0.attention.query.weight" ..., "final_norm.*", "head.weight" [V, D]
    partition : of the vocabulary

    Notes
    -----
    Collectives of forward: one all-reduce of N x D of the embedding, and those of the blocks; of backward: those of the
    blocks, and one of N x D of the head. See collectives().
    """

    def __init__(self, group, config, *, dtype="float32", seed=0):
        require(isinstance(config, DecoderConfig), f"config {type(config).__name__}", "a DecoderConfig")
        common = dict(dtype=dtype, seed=seed)
        self.config, self.seed = config, 0 if seed is None else seed
        V, D, std = config.vocab_size, config.hidden_size, config.init_method_std
        self.embedding = VocabParallelEmbedding(group, V, D, config.embedding_multiplier, init_std=std,
                                                name="embedding", **common)
        self.position = PositionEmbedding(group, config.max_position_embeddings, D, init_std=std, name="position",
                                          **common) if config.position_embedding == "learned" else None
        self.embedding_norm = make_norm(group, config, dtype, "embedding_norm") if config.embedding_norm else None
        self.blocks = [ParallelBlock(group, config, i, name=f"layers.{i}", **common) for i in range(config.num_layers)]
        self.final_norm = make_norm(group, config, dtype, "final_norm") if config.final_norm else None
        self.head = ColumnParallelLinear(group, D, V, config.head_bias, init_std=std, name="head",
                                         tied_to=self.embedding if config.tie_word_embeddings else None, **common)
        parts = [self.embedding, self.position, self.embedding_norm, *self.blocks, self.final_norm, self.head]
        super().__init__(group, [part for part in parts if part], dtype, "")
        self.partition = group.partition(V)

    def forward(self, ids, *, mask=None, step=None, saved=True):
        """ids (..., S) integers, the same on every rank -> logits (..., S, V p); and what backward needs.

        mask : bool, True where a key may be attended, beside the causal mask: (B, S) or (B, S, S)
        step : of training, which the dropout masks belong to. None: no dropout
        saved : False: None in place of what backward needs
        """
        x, of_hidden = self.hidden(ids, mask=mask, step=step, saved=saved)
        logits, of_head = self.head.forward(x, saved=saved)
        return logits, ((of_hidden, of_head) if saved else None)

    def hidden(self, ids, *, mask=None, step=None, saved=True):
        """All of forward but the head: ids (..., S) -> x (..., S, D), complete; and what backward needs."""
        ids = ids if hasattr(ids, "ndim") else np.asarray(ids)      # token_ids looks at them where they are
        require(ids.ndim > 0, "ids without an axis", "(..., positions)")
        require_mask(mask, prod(ids.shape[:-1]), ids.shape[-1])
        mask = mask if mask is None else self.group.xp.asarray(mask)        # here, not once a layer
        of_position, of_blocks = None, []
        if self.position:                                   # first, as it may refuse
            positions, of_position = self.position.forward(ids.shape[-1], saved=saved)
        x, of_embedding = self.embedding.forward(ids, saved=saved)
        if self.position:
            x += positions
        x, of_embedding_norm = self.embedding_norm.forward(x, saved=saved) if self.embedding_norm else (x, None)
        scale = hidden_dropout(self.group, self.seed, "embedding.dropout", step, self.config.hidden_dropout, x.shape,
                               self.sum_dtype)
        x = scaled(x, scale, out=x)
        for block in self.blocks:
            x, of_block = block.forward(x, mask=mask, step=step, saved=saved)
            of_blocks.append(of_block)
        x, of_final_norm = self.final_norm.forward(x, saved=saved) if self.final_norm else (x, None)
        return x, (of_embedding, of_position, of_embedding_norm, scale, of_blocks, of_final_norm)

    def extend(self, ids, kv, counts=None):
        """Continue the sequences of kv by ids (B, S) -> logits (B, V p) after the last new token of each.

        kv : KeyValues, which the new tokens' are added to
        counts : (B,) how many of the S tokens belong to each sequence; what follows them in a row is not looked at.
            None: all. So prompts of unequal length go in at once.
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

    def continued(self, ids, kv, counts=None):
        """extend() of ids that are known to be good, without counting them. Where all counts are 1, hence None, nothing
        is decided on the host: a recorded call may be replayed at later positions.
        """
        xp, S = self.group.xp, ids.shape[1]
        x = self.embedding.look_up(ids)
        if self.position:                                   # of what is not looked at: any
            positions = xp.minimum(kv.starts[:, None] + xp.arange(S), self.position.max_positions - 1)
            x += self.position.parameter("weight")[positions]
        if self.embedding_norm:
            x, _ = self.embedding_norm.forward(x, saved=False)
        for block, of_layer in zip(self.blocks, kv.layers):
            x, _ = block.forward(x, kv=of_layer, saved=False)
        x = x[:, 0] if S == 1 else x[np.arange(len(ids)), counts - 1]
        if self.final_norm:
            x, _ = self.final_norm.forward(x, saved=False)
        return self.head.forward(x, saved=False)[0]

    def backward(self, d_logits, saved, *, out=None):
        """d_logits (..., S, V p) -> {name: gradient} of this rank's slices.

        out : an earlier backward's gradients, whose arrays are used again
        """
        require_saved(saved)
        (of_embedding, of_position, of_embedding_norm, scale, of_blocks, of_final_norm), of_head = saved
        gradients = self.gradients(out)

        def through(layer, dy, kept):
            return layer.backward(dy, kept, out=self.of(layer, gradients))[0]

        dx = through(self.head, d_logits, of_head)
        if self.final_norm:
            dx = through(self.final_norm, dx, of_final_norm)
        for block, of_block in zip(reversed(self.blocks), reversed(of_blocks)):
            dx = through(block, dx, of_block)
        dx = scaled(dx, scale)
        if self.embedding_norm:
            dx = through(self.embedding_norm, dx, of_embedding_norm)
        if self.position:
            through(self.position, dx, of_position)
        if self.config.tie_word_embeddings:                     # the head has left its gradient there
            gradients["embedding.weight"] += self.embedding.backward(dx, of_embedding)[1]["embedding.weight"]
        else:
            through(self.embedding, dx, of_embedding)
        return gradients

    def loss(self, logits, targets, *, label_smoothing=0.0, ignore_index=-100):
        """The mean cross entropy of the next tokens, and what loss_backward needs. targets (..., S), global ids."""
        return vocab_parallel_cross_entropy_forward(logits, targets, self.group, self.partition,
                                                    label_smoothing=label_smoothing, ignore_index=ignore_index)

    def loss_backward(self, saved, d_loss=1.0):
        """The gradient of the loss with respect to this rank's logits."""
        return vocab_parallel_cross_entropy_backward(saved, d_loss)

    def gather_logits(self, logits):
        """Logits (..., V) of the whole vocabulary on every rank. Collective: one all-gather of N x V."""
        return self.group.all_gather(logits, self.partition, axis=-1)

    def collectives(self, tokens):
        """The closed form of forward and backward without the loss: each a Counter of logical data collectives."""
        forward, backward = Counter(), Counter()
        for layer in (self.embedding, *self.blocks, self.head):
            of_forward, of_backward = layer.collectives(tokens)
            forward, backward = forward + of_forward, backward + of_backward
        return forward, backward
