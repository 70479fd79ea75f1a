"""Norm and rotary positions of query and key heads, between their projections and the scores.

Dimension key: B sequences, S positions, N = B S rows (tokens), H heads of a block or unit, K features of a head.
"""
from typing import Any

from ..arrays import Array
from ..attention_config import AttentionConfig
from ..errors import require
from ..ops.norm import norm_backward, norm_of_heads
from ..ops.rotary import rotary_backward, rotary_forward
from ..sharding.partition import Block
from .base import ParallelLayer
from .heads import AttentionCall, as_rows


class NormedHeads(ParallelLayer):
    """The part of ParallelAttention that norms and rotates query and key heads, and sums the gradients of their norms.

    Each rank has its heads, of all rows. A norm's weight that all heads share is replicated, and its gradient is a sum
    over the heads of all ranks.

    Attributes
    ----------
    norm : tuple or None
        Kind, epsilon, and whether the weight is added to 1: of a norm with one weight for any head.
    shared_norms : list of str
        The norms' parameters that are replicated.
    """
    norms_of = "any head"           # one weight for all; the subclasses are in norm_over_heads.py and norm_by_head.py
    config: AttentionConfig
    kv_channels: int
    rotary: Any
    own_blocks: tuple[Block, ...]

    def set_norms(self, config: AttentionConfig) -> None:
        """Take the config's norms. Raises InputError where another class has them."""
        require(config.norms_of == self.norms_of, f"query and key norms of {config.norms_of}",
                f"those of {self.norms_of}, as {type(self).__name__} has them")
        self.norm = (config.qk_norm, config.norm_epsilon, config.zero_centered_gamma) \
            if config.qk_norm and self.norms_of == "any head" else None
        self.shared_norms = [name for name, spec in self.specs.items() if "_norm." in name and spec.axis is None]

    def norm_and_rotate(self, part: str, x_BSHK: Array, rows: slice, call: AttentionCall) -> tuple[Array, Any]:
        """Return query or key heads after norm and rotary positions, in either order; and what norm_backward needs."""
        of_norm, last = None, self.config.qk_norm_after_rotary
        if self.norm and not last:
            x_BSHK, of_norm = norm_of_heads(f"{part}_norm", x_BSHK, self.own[f"{part}_norm.weight"], *self.norm)
        if self.rotary:
            starts = None if call.kv is None else call.kv.starts
            x_BSHK = rotary_forward(x_BSHK, call.tables[0], call.tables[1], self.rotary.interleaved, starts)
        if self.norm and last:
            x_BSHK, of_norm = norm_of_heads(f"{part}_norm", x_BSHK, self.own[f"{part}_norm.weight"], *self.norm)
        return x_BSHK, of_norm

    def norm_and_rotate_backward(self, part: str, dx_BSHK: Array, of_norm: Any,
                                 call: AttentionCall) -> tuple[Array, Array | None]:
        """Return the gradient before rotary and norm, as (N, heads K), and that of the norm's weight, or None."""
        dw_K, last = None, self.config.qk_norm_after_rotary
        if self.norm and last:
            dx_BSHK, dw_K, _ = norm_backward(dx_BSHK, of_norm)
        if self.rotary:
            dx_BSHK = rotary_backward(dx_BSHK, call.tables[0], call.tables[1], self.rotary.interleaved)
        if self.norm and not last:
            dx_BSHK, dw_K, _ = norm_backward(dx_BSHK, of_norm)
        return as_rows(dx_BSHK), dw_K

    # --- the gradients of norms that all heads share ------------------------------------------------------------------

    def norm_summands(self, dq_norm: Array, dk_norms: list[Array]) -> Array:
        """Return a block's part in the gradients of the norms' parameters that all heads share, one row each."""
        return self.group.xp.stack([dq_norm, sum(dk_norms, self.group.xp.zeros(self.kv_channels, self.sum_dtype))])

    def end_norms(self, norms: dict, gradients: dict[str, Array], sums: Any) -> None:
        """Write the gradients of the norms that all heads share, or leave them to NormSums of the caller."""
        if self.shared_norms:
            self.sum_norm_gradients(norms, gradients) if sums is None else sums.add_heads(self, norms)

    def sum_norm_gradients(self, norms: dict, gradients: dict[str, Array]) -> None:
        """Write the gradients of query and key norm, summed over all heads. Collective: an all-reduce of K for each."""
        total = self.group.sum(self.partition, (len(self.shared_norms), self.kv_channels), self.sum_dtype)
        for block in self.own_blocks:
            total.add(block, self.norm_summands(*norms[block.index]))
        for name, d_K in zip(self.shared_norms, total.all_reduce()):
            gradients[name][...] = d_K
