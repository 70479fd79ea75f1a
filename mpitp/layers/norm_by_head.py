"""Attention whose query and key norms have weights for each head (Command R+, StableLM 2 12B), or a bias (Phi).

Dimension key: B sequences, S positions, N = B S rows (tokens), H heads of a block or unit, K features of a head.
"""
from typing import Any

from ..arrays import Array
from ..comm.sums import Sum
from ..ops.norm import norm_backward, norm_of_heads
from ..ops.rotary import rotary_backward
from ..sharding.heads import KeyValueUnit
from ..sharding.partition import Block
from ..sharding.specs import join
from .attention import ParallelAttention, Units
from .heads import AttentionCall, as_heads, as_rows


class AttentionNormedByHead(ParallelAttention):
    """ParallelAttention with q_h = g_h xhat_h for each head h, xhat of qk_norm's kind; or with q_h = g xhat_h + b.

    Weights g (H, K) lie where their heads do, so their gradients are complete; g and b (K) are replicated, and their
    gradients are summed over the heads of all ranks.

    Parameters and errors are ParallelAttention's, for a config with qk_norm_by_head or qk_norm_bias.

    Notes
    -----
    Collectives: those of ParallelAttention, but for its norms none with qk_norm_by_head, and with qk_norm_bias one
    all-reduce of 4 x K backward.
    """
    norms_of = "heads of their own"

    # --- forward ----------------------------------------------------------------------------------------------------

    def norm_and_rotate(self, part: str, x_BSHK: Array, rows: slice, call: AttentionCall) -> tuple[Array, Any]:
        """Return query or key heads after norm and rotary positions; and what norm_and_rotate_backward needs."""
        kind, epsilon = self.config.qk_norm, self.config.norm_epsilon
        assert kind is not None, "norms of their own are of a kind"
        ones_K, g = self.group.xp.ones(self.kv_channels, self.dtype), self.gain(part, rows)
        y_BSHK, kept = norm_of_heads(f"{part}_norm", x_BSHK, ones_K, kind, epsilon, False)
        y_BSHK *= g
        if self.config.qk_norm_bias:
            y_BSHK += self.own[f"{part}_norm.bias"]
        return super().norm_and_rotate(part, y_BSHK, rows, call)[0], (kept, g)

    def gain(self, part: str, rows: slice) -> Array:
        """Return g of the heads that have these rows of the projection: (H, K), or (K,) for all of them."""
        w = self.own[f"{part}_norm.weight"]
        if self.config.qk_norm_by_head:
            w = w[self.heads_of(rows)]
        return 1 + w if self.config.zero_centered_gamma else w

    def heads_of(self, rows: slice) -> slice:
        """Return the heads that have these rows of a projection."""
        return slice(rows.start // self.kv_channels, rows.stop // self.kv_channels)

    # --- backward ---------------------------------------------------------------------------------------------------

    def norm_and_rotate_backward(self, part: str, dx_BSHK: Array, of_norm: Any,
                                 call: AttentionCall) -> tuple[Array, Array]:
        """Return the gradient before rotary and norm, as (N, heads K), and those of g and b of each head (2, H, K)."""
        (xhat_NK, *of_kind), g = of_norm
        if self.rotary:
            dx_BSHK = rotary_backward(dx_BSHK, call.tables[0], call.tables[1], self.rotary.interleaved)
        d_NHK = as_rows(dx_BSHK).reshape(-1, *dx_BSHK.shape[2:])
        products_NHK = d_NHK * xhat_NK.reshape(d_NHK.shape)
        d_norm = self.group.xp.stack([d.sum(axis=0, dtype=self.sum_dtype) for d in (products_NHK, d_NHK)])
        dx_NHK, _, _ = norm_backward(d_NHK * g, (xhat_NK, *of_kind))
        return as_rows(as_heads(dx_NHK.reshape(len(d_NHK), -1), call.B, call.S, self.kv_channels)), d_norm

    def key_value_backward(self, unit: KeyValueUnit, dkv_of: dict, x_ND: Array, units: Units, call: AttentionCall,
                           gradients: dict[str, Array], total: Sum) -> tuple:
        """Return a unit's dk, dv and key norm's gradients; write those of its heads' own, equal on every holder."""
        found = super().key_value_backward(unit, dkv_of, x_ND, units, call, gradients, total)
        self.write_own("key", found[2], self.heads.unit_rows(unit), gradients)
        return found

    def block_backward(self, block: Block, d_scores: tuple[dict, dict], x_ND: Array, kept: dict, d_units: dict,
                       call: AttentionCall, gradients: dict[str, Array], total: Sum) -> tuple[Array, Any]:
        """Return a block's summand of dx (N, D), and its part in the gradients of both norms; write its heads' own."""
        dx_ND, norms = super().block_backward(block, d_scores, x_ND, kept, d_units, call, gradients, total)
        self.write_own("query", norms[0], self.heads.block_rows(block), gradients)
        return dx_ND, norms

    def write_own(self, part: str, d_norm: Array, rows: slice, gradients: dict[str, Array]) -> None:
        """Write the gradients of the weights that the heads of these rows have of their own."""
        if self.config.qk_norm_by_head:
            gradients[join(self.name, f"{part}_norm.weight")][self.heads_of(rows)] = d_norm[0]

    def norm_summands(self, dq_norm: Array, dk_norms: list[Array]) -> Array:
        """Return a block's part in the gradients of g and b of queries, and of keys (4, K)."""
        found = self.group.xp.zeros((4, self.kv_channels), self.sum_dtype)
        found[:2] = dq_norm.sum(axis=1)
        for dk_norm in dk_norms:
            found[2:] += dk_norm.sum(axis=1)
        return found
