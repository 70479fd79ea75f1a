"""Self-attention, its heads split over the ranks.

Dimension key: B sequences, S positions, N = B S rows (tokens), D hidden, H query heads, G key/value heads, K features
of a head; p marks an axis split over the ranks, b the part of it in one block, u the key/value heads of one unit.
"""
from collections import Counter
from math import prod
from typing import Any

from ..arrays import Array
from ..comm.group import TensorParallelGroup
from ..comm.ledger import Collective
from ..comm.sums import Sum
from ..attention_config import AttentionConfig
from ..errors import require
from ..ops.alibi import alibi_slopes
from ..ops.attention import attention_backward, attention_forward
from ..ops.keys_values import last_query_forward
from ..ops.linear import add_bias, bias_backward, linear_weight_backward, product
from ..ops.rotary import rotary_tables
from ..sharding.decoder_specs import attention_specs
from ..sharding.heads import KeyValueUnit
from ..sharding.partition import Block
from ..sharding.specs import join
from .base import require_saved
from .heads import AttentionCall, Heads, as_heads, as_rows, by_group, require_mask
from .normed_heads import NormedHeads
from .products import (column_parallel_backward, column_parallel_forward, copy_to_ranks_backward, copy_to_ranks_forward,
                       reduce_from_ranks_backward, reduce_from_ranks_forward, row_parallel_backward,
                       row_parallel_forward, rows_of, two_column_parallel_forward)

Units = dict[KeyValueUnit, tuple]           # keys, values (B, S, u, K) of each unit, and what the norm's backward needs


class ParallelAttention(NormedHeads):
    """y = sum over heads h of softmax(scale q_h k_g^T + bias) v_g W_h^T, g = the key/value head of query head h.

    q_h = x Wq_h^T and so on. The query heads are dealt over the ranks. Rank p computes its heads from all of x and
    multiplies them by its columns of the output projection, so that only the partial results of that are added up.
    A key/value head that several ranks need is held, and projected, by each of them; its gradient is summed over their
    query heads first, and carried on into x by its owner alone.

    Parameters
    ----------
    group : TensorParallelGroup
        The ranks.
    config : AttentionConfig
        Sizes and choices.
    dtype : str
        "float32" or "float64"; on a GPU "float16" and "bfloat16" too.
    seed : int or None
        Of the initial weights N(0, 1/in) and of dropout; None for zeros.
    init_std, output_init_std : float, optional
        Of the initial weights of query, key and value, and of out, in place of in^-0.5.
    name : str
        Prefix of the parameters' names: "query.weight" [H K, D], "key.weight" and "value.weight" [G K, D],
        "out.weight" [D, H K], their biases, "query_norm.weight" and "key_norm.weight" [K].

    Raises
    ------
    InputError
        For an unknown dtype; forward: for an x of another size, dtype or device, a mask of another shape.

    Notes
    -----
    Collectives, N = tokens: forward one all-reduce of N x D (g); backward one of 2 x N x K for each key/value head that
    several ranks hold, one of N x D (f, which query, key and value share), and with qk_norm one of 2 x K.
    Megatron-LM (arXiv 1909.08053, section 3); grouped queries: Ainslie et al. (arXiv 2305.13245).
    """
    attend = staticmethod(attention_forward)

    def __init__(self, group: TensorParallelGroup, config: AttentionConfig, *, dtype: str = "float32",
                 seed: int | None = 0, init_std: float | None = None, output_init_std: float | None = None,
                 name: str = ""):
        require(isinstance(config, AttentionConfig), f"config {type(config).__name__}", "an AttentionConfig")
        super().__init__(group, attention_specs(config, init_std, output_init_std, name), dtype, seed, name)
        self.config, self.hidden_size, self.kv_channels = config, int(config.hidden_size), int(config.head_dim)
        self.num_attention_heads = int(config.num_attention_heads)
        self.causal, self.sliding_window, self.rotary = config.causal, config.sliding_window, config.rotary
        self.scale, self.dropout, self.seed = config.scale, config.dropout, 0 if seed is None else seed
        self.slopes = group.xp.asarray(alibi_slopes(self.num_attention_heads), self.sum_dtype) if config.alibi else None
        self.set_norms(config)
        self.heads = Heads(group, self.num_attention_heads, int(config.query_groups), self.kv_channels)
        self.set_partition(self.heads.partition)
        self.tables: tuple = ()

    # --- forward ----------------------------------------------------------------------------------------------------

    def forward(self, x: Array, *, mask: Array | None = None, step: int | None = None, kv: Any = None,
                rows: Any = None, save: bool = True) -> tuple[Array, Any]:
        """Return y, shaped as x and complete, of x (..., S, D), the same on every rank; and what backward needs.

        What backward needs includes x itself, not a copy: do not change x until then.

        Parameters
        ----------
        x : (..., S, D) array
            S positions of each sequence.
        mask : array of bool, optional
            True where a key may be attended, beside causal and sliding_window: (B, S) for each key or (B, S, S) for
            each query and key. A query that may attend to nothing gets 0.
        step : int, optional
            The training step, which the dropout masks depend on. None: no dropout.
        kv : LayerKeyValues, optional
            Keys and values of earlier positions, behind which those of x are written. It needs save=False.
        rows : Rows, optional
            Sequence parallelism: x and y are this rank's rows (n, D). mask is that of all positions still.
        save : bool
            False: None in place of what backward needs.
        """
        call = self.call(x, mask, step, kv, rows)
        x_ND = self.rows(copy_to_ranks_forward(x, rows), self.hidden_size)                          # f
        units, kept = self.keys_and_values(x_ND, call), {}
        total = self.group.sum(self.partition, x_ND.shape, self.dtype)
        for block, (y_ND, of_block) in self.group.each(
                self.block_forward, self.own_blocks, x_ND, units, call, total, save):
            total.add(block, y_ND)
            kept[block.index] = of_block
        y_ND = reduce_from_ranks_forward(total, rows)                                               # g
        self.add_bias(y_ND)
        return y_ND.reshape(x.shape), \
            ((self, rows.kept(x, x_ND) if rows else x_ND, units, kept, call) if save else None)

    def call(self, x: Array, mask: Array | None, step: int | None, kv: Any = None, rows: Any = None) -> AttentionCall:
        """Return what one forward and its backward share. Raises InputError for shapes that do not fit."""
        require(x.ndim > 1, f"x of shape {x.shape}", "(..., positions, hidden)")
        B, S = (prod(x.shape[:-2]), x.shape[-2]) if rows is None else rows.shape
        require_mask(mask, B, S)
        mask = mask if mask is None else self.group.xp.asarray(mask)
        if kv is not None:
            return AttentionCall(self, B, S, mask, step, kv.tables, kv, None)
        if self.rotary and not (self.tables and len(self.tables[0]) == S):      # cos and sin, kept as long as S stays
            self.tables = rotary_tables(self.rotary, self.kv_channels, range(S), self.sum_dtype, self.group.xp)
        return AttentionCall(self, B, S, mask, step, self.tables, None, rows)

    def keys_and_values(self, x_ND: Array, call: AttentionCall) -> Units:
        """Return keys and values of every unit that this rank's query heads need."""
        return dict(self.group.each(self.key_value_forward, self.heads.held_units, x_ND, call))

    def key_value_forward(self, unit: KeyValueUnit, x_ND: Array, call: AttentionCall) -> tuple:
        """Return keys and values (B, S, u, K) of a unit, earlier positions first; and what backward needs."""
        rows = self.heads.unit_rows(unit)
        k_BSuK, v_BSuK = self.project_key_value(x_ND, rows, call)
        k_BSuK, of_norm = self.norm_and_rotate("key", k_BSuK, rows, call)
        if call.kv is not None:
            k_BSuK, v_BSuK = call.kv.append(unit, k_BSuK, v_BSuK)
        return k_BSuK, v_BSuK, of_norm

    def block_forward(self, block: Block, x_ND: Array, units: Units, call: AttentionCall, total: Sum | None,
                      save: bool) -> tuple[Array, Any]:
        """Return a block's summand of y (N, D), its heads times their columns of out; and what backward needs."""
        rows = self.heads.block_rows(block)
        q_BSHK, of_norm = self.norm_and_rotate("query", self.project("query", x_ND, rows, call), rows, call)
        a_BSHK, statistics = self.group.xp.empty_like(q_BSHK), []
        for unit, heads in self.heads.heads_by_unit(block):
            if call.kv is not None and call.S == 1 and call.mask is None:
                q, a = (array[:, 0, heads.start - block.start:heads.stop - block.start] for array in (q_BSHK, a_BSHK))
                k, v, _ = units[unit]
                last_query_forward(q, k, v, call.kv.starts, self.scale, out=a, window=self.sliding_window,
                                   softcap=self.config.softcap, slopes=call.slopes(heads, unit))
                continue
            for b in range(call.B):
                q, a = (by_group(array, b, unit, heads, block) for array in (q_BSHK, a_BSHK))
                k, v = (array[b, :call.positions_of(b)].swapaxes(0, 1) for array in units[unit][:2])
                statistics.append(self.attend(q, k, v, self.scale, out=a, **call.options(heads, unit, b)))
        y_ND = row_parallel_forward(as_rows(a_BSHK), self.own["out.weight"], rows, total)
        return y_ND, ((q_BSHK, of_norm, a_BSHK, statistics) if save else None)

    # --- backward ---------------------------------------------------------------------------------------------------

    def backward(self, dy: Array, saved: Any, *, out: Any = None, norm_sums: Any = None) -> tuple[Array, dict]:
        """Return dx, complete, of dy (..., S, D), complete; and {name: gradient} of this rank's slices.

        out, norm_sums : as ParallelBlock's
        """
        x_ND, units, kept, call = require_saved(saved, self)
        x_ND = call.rows.again(x_ND) if call.rows else x_ND
        dy_ND = self.rows(reduce_from_ranks_backward(dy, call.rows), self.hidden_size, "dy", len(x_ND))         # g*
        gradients = self.gradients(out)
        d_scores = self.scores_backward(dy_ND, units, kept, call, gradients)
        total = self.group.sum(self.partition, x_ND.shape, self.dtype)
        d_units = self.keys_and_values_backward(d_scores, x_ND, units, call, gradients, total)
        norms = {}
        for block, (dx_ND, d_norms) in self.group.each(
                self.block_backward, self.own_blocks, d_scores, x_ND, kept, d_units, call, gradients, total):
            total.add(block, dx_ND)
            norms[block.index] = d_norms
        dx_ND = copy_to_ranks_backward(total, call.rows)                                            # f*
        self.end_norms(norms, gradients, norm_sums)
        return dx_ND.reshape(dy.shape), gradients

    def scores_backward(self, dy_ND: Array, units: Units, kept: dict, call: AttentionCall,
                        gradients: dict[str, Array]) -> tuple[dict, dict]:
        """Return {block index: dq (B, S, H b, K)} and {unit: dk and dv (2, B, S, u, K)}, summed over the query heads.

        Collective: for each key/value head of several ranks one all-reduce of 2 x N x K.
        """
        if "out.bias" in self.own:
            bias_backward(dy_ND, out=gradients[join(self.name, "out.bias")])    # dy is complete: so is this
        dq_of, dkv_of = {}, {}
        for block, (dq_BSHK, dkv) in self.group.each(
                self.block_scores_backward, self.own_blocks, dy_ND, units, kept, call, gradients):
            dq_of[block.index] = dq_BSHK
            dkv_of.update({(block.index, unit): d for unit, d in dkv.items()})
        return dq_of, {unit: self.sum_key_value(unit, dkv_of, call) for unit in self.heads.units
                       if unit.is_shared or unit in units}

    def block_scores_backward(self, block: Block, dy_ND: Array, units: Units, kept: dict, call: AttentionCall,
                              gradients: dict[str, Array]) -> tuple[Array, dict[KeyValueUnit, Array]]:
        """Return dq of a block's heads, and {unit: their part in dk and dv}; write the gradient of out's columns."""
        q_BSHK, _, a_BSHK, statistics = kept[block.index]
        rows, statistics = self.heads.block_rows(block), iter(statistics)
        da_NHbK = row_parallel_backward(dy_ND, as_rows(a_BSHK), self.own["out.weight"], rows,
                                        gradients[join(self.name, "out.weight")])
        da_BSHK, dq_BSHK, dkv_of = da_NHbK.reshape(a_BSHK.shape), self.group.xp.empty_like(q_BSHK), {}
        for unit, heads in self.heads.heads_by_unit(block):
            dkv = dkv_of[unit] = self.group.xp.empty((2, *units[unit][0].shape), self.sum_dtype)
            for b in range(call.B):
                q, a, da, dq = (by_group(array, b, unit, heads, block) for array in (q_BSHK, a_BSHK, da_BSHK, dq_BSHK))
                k, v = (array[b].swapaxes(0, 1) for array in units[unit][:2])
                dk, dv = (dkv[i, b].swapaxes(0, 1) for i in range(2))
                attention_backward(da, next(statistics), q, k, v, a, self.scale, dq=dq, dk=dk, dv=dv,
                                   **call.options(heads, unit, b))
        return dq_BSHK, dkv_of

    def sum_key_value(self, unit: KeyValueUnit, dkv_of: dict, call: AttentionCall) -> Array:
        """Return dk and dv of a unit (2, B, S, u, K), summed over its query heads. Collective if shared."""
        shape = 2, call.B, call.S, unit.stop - unit.start, self.kv_channels
        begin = self.group.sum if unit.is_shared else self.group.sum_of_own
        total = begin(unit.partition, shape, self.sum_dtype)
        for block in unit.partition.blocks_of(self.group.rank):
            total.add(block, dkv_of[block.index, unit])
        return total.all_reduce() if unit.is_shared else total.local_sum()

    def keys_and_values_backward(self, d_scores: tuple[dict, dict], x_ND: Array, units: Units, call: AttentionCall,
                                 gradients: dict[str, Array], total: Sum) -> dict[KeyValueUnit, tuple]:
        """Return {unit: (dk, dv, the key norm's gradient)}, dk and dv (N, u K) before norm and rotary."""
        return dict(self.group.each(self.key_value_backward, list(units), d_scores[1], x_ND, units, call, gradients,
                                    total))

    def key_value_backward(self, unit: KeyValueUnit, dkv_of: dict, x_ND: Array, units: Units, call: AttentionCall,
                           gradients: dict[str, Array], total: Sum) -> tuple:
        """Return a unit's dk, dv and key norm's gradient; write its projections' gradients, equal on every holder."""
        dk_BSuK, dv_BSuK = dkv_of[unit].astype(self.dtype, copy=False)
        dk_NuK, d_norm = self.norm_and_rotate_backward("key", dk_BSuK, units[unit][2], call)
        dv_NuK, rows = as_rows(dv_BSuK), self.heads.unit_rows(unit)
        for part, d_NuK in (("key", dk_NuK), ("value", dv_NuK)):
            dw_uKD = rows_of(gradients[join(self.name, f"{part}.weight")], rows)
            total.meanwhile(linear_weight_backward, d_NuK, x_ND, dw_uKD)
            if f"{part}.bias" in self.own:
                bias_backward(d_NuK, out=rows_of(gradients[join(self.name, f"{part}.bias")], rows))
        return dk_NuK, dv_NuK, d_norm

    def block_backward(self, block: Block, d_scores: tuple[dict, dict], x_ND: Array, kept: dict, d_units: dict,
                       call: AttentionCall, gradients: dict[str, Array], total: Sum) -> tuple[Array, Any]:
        """Return a block's summand of dx (N, D), and its part in the gradients of query and key norm."""
        rows = self.heads.block_rows(block)
        dq_NHbK, dq_norm = self.norm_and_rotate_backward("query", d_scores[0][block.index], kept[block.index][1], call)
        if "query.bias" in self.own:
            bias_backward(dq_NHbK, out=rows_of(gradients[join(self.name, "query.bias")], rows))
        dx_ND = column_parallel_backward(dq_NHbK, x_ND, self.own["query.weight"], rows,
                                         gradients[join(self.name, "query.weight")], total)
        owned = self.heads.owned_units(block)               # held ones of other owners would count in f once a holder
        for unit in owned:
            for part, d_NuK in zip(("key", "value"), d_units[unit]):
                product(d_NuK, rows_of(self.own[f"{part}.weight"], self.heads.unit_rows(unit)), dx_ND, add=True)
        return dx_ND, (dq_norm, [d_units[unit][2] for unit in owned])

    # --- what both have ---------------------------------------------------------------------------------------------

    def project(self, part: str, x_ND: Array, rows: slice, call: AttentionCall) -> Array:
        """Return x times these rows of a projection, plus its bias, as (B, S, heads, K)."""
        return self.with_bias(part, column_parallel_forward(x_ND, self.own[f"{part}.weight"], rows), rows, call)

    def project_key_value(self, x_ND: Array, rows: slice, call: AttentionCall) -> tuple[Array, Array]:
        """Return the projections of keys and of values, as project() does, but at once."""
        k_NuK, v_NuK = two_column_parallel_forward(x_ND, self.own["key.weight"], self.own["value.weight"], rows)
        return self.with_bias("key", k_NuK, rows, call), self.with_bias("value", v_NuK, rows, call)

    def with_bias(self, part: str, y_NHK: Array, rows: slice, call: AttentionCall) -> Array:
        """Return these rows of a projection plus its bias, as (B, S, heads, K)."""
        add_bias(y_NHK, rows_of(self.own.get(f"{part}.bias"), rows))
        return as_heads(y_NHK, call.B, call.S, self.kv_channels)

    def add_bias(self, y_ND: Array) -> None:
        """Add the output's bias on every rank, after the sum, so that it counts once."""
        add_bias(y_ND, self.own.get("out.bias"))

    def collectives(self, tokens: int) -> tuple[Counter, Counter]:
        """Return how many collectives forward and backward do, by the formula: two Counters of Collective."""
        whole = Counter({Collective("all_reduce", tokens * self.hidden_size, self.dtype.name): 1})
        return whole, self.inner_collectives(tokens) + whole

    def inner_collectives(self, tokens: int) -> Counter:
        """Return the collectives of backward other than f's: of shared key/value heads, and of query/key norm."""
        shared = sum(unit.is_shared for unit in self.heads.units)
        counts = Counter({Collective("all_reduce", 2 * tokens * self.kv_channels, self.sum_dtype.name): shared})
        if self.shared_norms:
            counts[Collective("all_reduce", len(self.shared_norms) * self.kv_channels, self.sum_dtype.name)] += 1
        return +counts
