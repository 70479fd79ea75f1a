"""Attention whose query and key norms run over the features of all heads, and so of all ranks (OLMo 2).

Dimension key: B sequences, S positions, N = B S rows (tokens), D hidden, H heads of a block or unit, K features of a
head, F features of some heads.
"""
from collections import Counter
from typing import Any

import numpy as np

from ..arrays import Array
from ..comm.ledger import Collective
from ..comm.sums import Sum
from ..ops.norm import overflow_text, overflows
from ..ops.rotary import rotary_backward
from ..sharding.heads import KeyValueUnit
from ..sharding.partition import Block
from ..sharding.specs import join
from .attention import ParallelAttention, Units
from .heads import AttentionCall, as_heads, as_rows
from .norm import NormOverflow
from .products import rows_of


class CallOverHeads(AttentionCall):
    """An AttentionCall that holds what the norm needs between its two halves, the sum over the ranks between them.

    Attributes
    ----------
    held : {(part, first row): array}
        Projections (N, features) until they are normalised, then x / rms, which backward needs.
    rstd : {"query" or "key": (N, 1) array}
        1 / rms of each token.
    """

    def __init__(self, *of_call: Any):
        self.held: dict[tuple[str, int], Array] = {}
        self.rstd: dict[str, Array] = {}


class AttentionNormedOverHeads(ParallelAttention):
    """ParallelAttention with q = g x / sqrt(mean(x^2) + epsilon), the mean over the features of all query heads; k too.

    Each rank squares what it projected; one all-reduce of 2 x N adds the squares up before any score is computed, and
    one does the same to the products dq x of backward. Weights g are split as the heads are, and so are complete.

    Parameters and errors are ParallelAttention's, for a config with qk_norm_over_heads.

    Notes
    -----
    Collectives, N = tokens: those of ParallelAttention, and forward and backward one all-reduce of 2 x N each.
    Source: OLMo 2 (arXiv 2501.00656), section 3.
    """
    norms_of = "all heads as one"

    def call(self, x: Array, mask: Array | None, step: int | None, kv: Any = None, rows: Any = None) -> CallOverHeads:
        """Return what one forward and its backward share."""
        return CallOverHeads(*super().call(x, mask, step, kv, rows))

    # --- forward ----------------------------------------------------------------------------------------------------

    def keys_and_values(self, x_ND: Array, call: AttentionCall) -> Units:
        """Return keys and values of every unit; queries are projected, too. Collective: one all-reduce of 2 x N."""
        assert isinstance(call, CallOverHeads)
        for unit in self.heads.held_units:
            self.project_ahead("key", x_ND, self.heads.unit_rows(unit), call)
        total = self.group.sum(self.partition, (2, len(x_ND)), self.sum_dtype)
        for block, squares_2N in self.group.each(self.squares, self.own_blocks, x_ND, call):
            total.add(block, squares_2N)
        for part, squares_N in zip(("query", "key"), total.all_reduce()):
            mean_N1 = squares_N[:, None] / self.features(part)
            call.rstd[part] = rstd_N1 = 1 / np.sqrt(mean_N1 + self.config.norm_epsilon)
            if overflows(rstd_N1):                      # on every rank
                raise NormOverflow(overflow_text(join(self.name, f"{part}_norm"), rstd_N1, self.sum_dtype))
            if self.group.device == "gpu":
                rstd_N1 /= rstd_N1 != 0                 # NaN where it overflows, which is seen later
        return super().keys_and_values(x_ND, call)

    def features(self, part: str) -> int:
        """Return how many features all query heads have, or all key/value heads."""
        return self.specs[join(self.name, f"{part}_norm.weight")].shape[0]

    def project_ahead(self, part: str, x_ND: Array, rows: slice, call: CallOverHeads) -> Array:
        """Return x times these rows of a projection, plus its bias, as (N, features), and hold it for project()."""
        held = call.held[part, rows.start] = as_rows(super().project(part, x_ND, rows, call))
        return held

    def squares(self, block: Block, x_ND: Array, call: CallOverHeads) -> Array:
        """Return the sum of squares (2, N) of a block's query heads, and of the key/value heads that belong to it."""
        found = self.group.xp.zeros((2, len(x_ND)), self.sum_dtype)
        found[0] = self.dot(*[self.project_ahead("query", x_ND, self.heads.block_rows(block), call)] * 2)
        for unit in self.heads.owned_units(block):
            found[1] += self.dot(*[call.held["key", self.heads.unit_rows(unit).start]] * 2)
        return found

    def dot(self, a_NF: Array, b_NF: Array) -> Array:
        """Return the sum of a b over the features of each row, (N,)."""
        return (a_NF * b_NF).sum(axis=1, dtype=self.sum_dtype)

    def project_key_value(self, x_ND: Array, rows: slice, call: AttentionCall) -> tuple[Array, Array]:
        """Return both projections: keys were projected before, to be normalised."""
        return self.project("key", x_ND, rows, call), super().project("value", x_ND, rows, call)

    def project(self, part: str, x_ND: Array, rows: slice, call: AttentionCall) -> Array:
        """Return query or key heads as (B, S, heads, K): the projection that is held, normalised."""
        assert isinstance(call, CallOverHeads)
        xhat_NF = call.held[part, rows.start] = (call.held[part, rows.start] * call.rstd[part]).astype(self.dtype)
        return as_heads(xhat_NF * self.gain(part, rows), call.B, call.S, self.kv_channels)

    def gain(self, part: str, rows: slice) -> Array:
        """Return g of these features."""
        w_F = rows_of(self.own[f"{part}_norm.weight"], rows)
        return 1 + w_F if self.config.zero_centered_gamma else w_F

    # --- backward ---------------------------------------------------------------------------------------------------

    def keys_and_values_backward(self, d_scores: tuple[dict, dict], x_ND: Array, units: Units, call: AttentionCall,
                                 gradients: dict[str, Array], total: Sum) -> dict[KeyValueUnit, tuple]:
        """Take dq and dk back through rotary and norm, in place; then as ParallelAttention's.

        dx = rstd (dy g - xhat mean(dy g xhat)). Collective: one all-reduce of 2 x N.
        """
        assert isinstance(call, CallOverHeads)
        (dq_of, dkv_of), dk_of = d_scores, {}
        for unit in units:
            dk_of[unit] = self.gain_backward("key", dkv_of[unit][0], self.heads.unit_rows(unit), call, gradients)
        dots = self.group.sum(self.partition, (2, len(x_ND)), self.sum_dtype)
        for block in self.own_blocks:
            found, rows = self.group.xp.zeros((2, len(x_ND)), self.sum_dtype), self.heads.block_rows(block)
            dq_of[block.index] = self.gain_backward("query", dq_of[block.index], rows, call, gradients)
            found[0] = self.dot(dq_of[block.index], call.held["query", rows.start])
            for unit in self.heads.owned_units(block):
                found[1] += self.dot(dk_of[unit], call.held["key", self.heads.unit_rows(unit).start])
            dots.add(block, found)
        of_queries_N, of_keys_N = dots.all_reduce()
        for block in self.own_blocks:
            rows = self.heads.block_rows(block)
            dq_of[block.index] = self.norm_backward("query", dq_of[block.index], of_queries_N, rows, call)
        for unit, d_NF in dk_of.items():
            dkv_of[unit][0] = self.norm_backward("key", d_NF, of_keys_N, self.heads.unit_rows(unit), call)
        return super().keys_and_values_backward(d_scores, x_ND, units, call, gradients, total)

    def gain_backward(self, part: str, dy_BSHK: Array, rows: slice, call: CallOverHeads,
                      gradients: dict[str, Array]) -> Array:
        """Return dy g (N, features), dy before rotary; and write the gradient of g."""
        dy_BSHK = dy_BSHK.astype(self.dtype, copy=False)
        if self.rotary:
            cos, sin = call.tables
            dy_BSHK = rotary_backward(dy_BSHK, cos, sin, self.rotary.interleaved)
        dy_NF = as_rows(dy_BSHK)
        dg_F = rows_of(gradients[join(self.name, f"{part}_norm.weight")], rows)
        dg_F[...] = (dy_NF * call.held[part, rows.start]).sum(axis=0, dtype=self.sum_dtype)
        return dy_NF * self.gain(part, rows)

    def norm_backward(self, part: str, d_NF: Array, dots_N: Array, rows: slice, call: CallOverHeads) -> Array:
        """Return dx as (B, S, heads, K) of d = dy g."""
        mean_N1 = dots_N[:, None] / self.features(part)
        dx_NF = (d_NF - call.held[part, rows.start] * mean_N1) * call.rstd[part]
        return as_heads(dx_NF.astype(self.dtype, copy=False), call.B, call.S, self.kv_channels)

    def norm_and_rotate_backward(self, part: str, dx_BSHK: Array, of_norm: Any,
                                 call: AttentionCall) -> tuple[Array, None]:
        """Return the gradient as (N, heads K): it has been taken back through both."""
        return as_rows(dx_BSHK), None

    def collectives(self, tokens: int) -> tuple[Counter, Counter]:
        """Return how many collectives forward and backward do, by the formula: two Counters of Collective."""
        forward, backward = super().collectives(tokens)
        of_norm = Counter({Collective("all_reduce", 2 * tokens, self.sum_dtype.name): 1})
        return forward + of_norm, backward + of_norm
