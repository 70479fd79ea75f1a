"""Self-attention, its heads split over the ranks.

Dimension key: B sequences, S positions, N = B S rows (tokens), D hidden, H query heads, G key/value heads, K features
of a head; p marks an axis split over the ranks, b the part of it in one block, u the key/value heads of one unit.
"""
from collections import Counter
from math import prod

from ..comm.ledger import Collective
from ..config import one_of, require_heads, require_probability, require_rotary, require_window
from ..errors import require, require_positive
from ..ops.alibi import alibi_slopes
from ..ops.attention import attention_backward, attention_forward
from ..ops.keys_values import last_query_forward
from ..ops.linear import add_bias, bias_backward, linear_backward, linear_forward, linear_weight_backward, product
from ..ops.norm import norm_backward, norm_forward
from ..ops.rotary import rotary_backward, rotary_forward, rotary_tables
from ..sharding.parameters import ParameterSpec
from .base import ParallelLayer, cut, join, require_saved
from .heads import Call, Heads, as_heads, as_rows, by_group, require_mask
from .mappings import (Later, copy_to_ranks_backward, copy_to_ranks_forward, reduce_from_ranks_backward,
                       reduce_from_ranks_forward)


class ParallelAttention(ParallelLayer):
    """y = sum over heads h of softmax(scale q_h k_g^T + bias) v_g W_h^T, g = the key/value head of query head h.

    q_h = x Wq_h^T and so on. The query heads are dealt over the ranks. Rank p computes its heads from all of x and
    multiplies them by its columns of the output projection, so that only the partial results of that are added up.
    A key/value head that several ranks need is held, and projected, by each of them; its gradient is summed over their
    query heads first, and carried on into x by its owner alone.

    Parameters
    ----------
    group : TensorParallelGroup
    hidden_size, num_attention_heads : D and H, any on any number of ranks; ranks without a head are normal
    num_query_groups : G, a divisor of H. None: H (multi-head); 1: multi-query; between: grouped-query attention
    kv_channels : K. None: D / H
    causal : a query sees no later position
    sliding_window : a query sees itself and the window - 1 positions before it. None: all
    rotary : Rotary, or None
    alibi : scores have slope_h (key - query position) added, the slopes of the global head (arXiv 2108.12409)
    qk_norm : "layernorm" or "rmsnorm" over each query and key head, before rotary, without bias; None: no norm
    norm_epsilon, zero_centered_gamma : of that norm
    attention_scale : None: K^-0.5
    qkv_bias, bias : biases of query, key and value, and of the output projection
    dropout : probability, of the attention weights
    dtype : "float32" or "float64"
    seed : of the initial weights N(0, 1/in) and of dropout; None for zeros
    init_std, output_init_std : of the initial weights of query, key and value, and of out, in place of in^-0.5
    name : prefix of the parameters' names: "query.weight" [H K, D], "key.weight" and "value.weight" [G K, D],
        "out.weight" [D, H K], their biases, "query_norm.weight" and "key_norm.weight" [K]

    Notes
    -----
    Collectives, N = tokens: forward one all-reduce of N x D (g); backward one of 2 x N x K for each key/value head that
    several ranks hold, one of N x D (f, which query, key and value share), and with qk_norm one of 2 x K.
    Megatron-LM (arXiv 1909.08053, section 3); grouped queries: Ainslie et al. (arXiv 2305.13245).
    Raises InputError for sizes and choices that do not fit, an x of another size, dtype or device, a mask of another
    shape.
    """

    def __init__(self, group, hidden_size, num_attention_heads, num_query_groups=None, kv_channels=None, *, causal=True,
                 sliding_window=None, rotary=None, alibi=False, qk_norm=None, norm_epsilon=1e-5,
                 zero_centered_gamma=False, attention_scale=None, qkv_bias=True, bias=True, dropout=0.0,
                 dtype="float32", seed=0, init_std=None, output_init_std=None, name=""):
        num_query_groups = num_attention_heads if num_query_groups is None else num_query_groups
        require_positive(hidden_size=hidden_size)
        require_heads(num_attention_heads, num_query_groups)
        if kv_channels is None:
            require(hidden_size % num_attention_heads == 0, f"{num_attention_heads} heads of hidden_size {hidden_size}",
                    "a divisor of it, or kv_channels, the features of a head")
            kv_channels = hidden_size // num_attention_heads
        require_positive(kv_channels=kv_channels)
        require_window(sliding_window)
        require_rotary(rotary, kv_channels)
        if qk_norm is not None:
            one_of("qk_norm", qk_norm, ("layernorm", "rmsnorm"))
        require_probability("dropout", dropout)
        D, H, G, K = int(hidden_size), int(num_attention_heads), int(num_query_groups), int(kv_channels)
        std = D ** -0.5 if init_std is None else init_std
        specs = []
        for part, heads, share in (("query", H, 1), ("key", G, H // G), ("value", G, H // G)):
            specs.append(ParameterSpec(join(name, f"{part}.weight"), (heads * K, D), 0, std, unit=K, share=share))
            if qkv_bias:
                specs.append(ParameterSpec(join(name, f"{part}.bias"), (heads * K,), 0, decay=False, unit=K,
                                           share=share))
        if qk_norm:
            for part in ("query_norm", "key_norm"):
                specs.append(ParameterSpec(join(name, f"{part}.weight"), (K,), None, decay=False,
                                           init_value=0.0 if zero_centered_gamma else 1.0))
        specs.append(ParameterSpec(join(name, "out.weight"), (D, H * K), 1,
                                   (H * K) ** -0.5 if output_init_std is None else output_init_std, unit=K))
        if bias:
            specs.append(ParameterSpec(join(name, "out.bias"), (D,), None, decay=False))
        super().__init__(group, specs, dtype, seed, name)
        self.hidden_size, self.num_attention_heads, self.num_query_groups, self.kv_channels = D, H, G, K
        self.causal, self.sliding_window, self.rotary = causal, sliding_window, rotary
        self.slopes = group.xp.asarray(alibi_slopes(H), self.sum_dtype) if alibi else None
        self.norm = (qk_norm, norm_epsilon, zero_centered_gamma) if qk_norm else None
        self.scale = K ** -0.5 if attention_scale is None else attention_scale
        self.dropout, self.seed = dropout, 0 if seed is None else seed
        self.heads = Heads(group, H, G, K)
        self.partition = self.heads.partition
        self.tables = (), ()

    def forward(self, x, *, mask=None, step=None, kv=None, saved=True):
        """x (..., S, D), the same on every rank -> y, shaped alike and complete; and what backward needs, or None.

        mask : bool, True where a key may be attended, beside causal and sliding_window: (B, S) for each key or
            (B, S, S) for each query and key. A query that may attend to nothing gets 0.
        step : of training, which the dropout masks belong to. None: no dropout
        kv : LayerKeyValues, which x continues (its positions come behind) and which is written to; with saved=False

        What backward needs includes x itself, not a copy: do not change x until then.
        """
        call = self.look_at(x, mask, step, kv)
        x_ND = copy_to_ranks_forward(self.rows(x, self.hidden_size))
        kept = {} if saved else None
        y_ND = reduce_from_ranks_forward(self.partial_forward(x_ND, kept, call), self.partition, self.group,
                                         x_ND.shape, self.dtype)
        self.add_bias(y_ND)
        return y_ND.reshape(x.shape), ((x_ND, kept, call) if saved else None)

    def look_at(self, x, mask, step, kv=None):
        """What one forward and its backward share. Raises InputError for shapes that do not fit."""
        require(x.ndim > 1, f"x of shape {x.shape}", "(..., positions, hidden)")
        B, S = prod(x.shape[:-2]), x.shape[-2]
        require_mask(mask, B, S)
        mask = mask if mask is None else self.group.xp.asarray(mask)
        if kv is not None:
            return Call(self, B, S, mask, step, kv.tables, kv)
        if self.rotary and len(self.tables[0]) != S:            # cos and sin, kept as long as S stays
            self.tables = rotary_tables(self.rotary, self.kv_channels, range(S), self.sum_dtype, self.group.xp)
        return Call(self, B, S, mask, step, self.tables, None)

    def partial_forward(self, x_ND, kept, call):
        """The function of a block that gives its summand of y (N, D). What backward needs goes to `kept`, or None."""
        held = self.heads.held_units

        def key_value(unit):
            rows = self.heads.unit_rows(unit)
            k_BSuK, normed = self.turn("key", self.project("key", x_ND, rows, call), call)
            v_BSuK = self.project("value", x_ND, rows, call)
            if call.kv is not None:
                k_BSuK, v_BSuK = call.kv.append(unit, k_BSuK, v_BSuK)
            return k_BSuK, v_BSuK, normed

        units = dict(zip(held, self.group.each(key_value, held)))

        def partial(block):
            rows = self.heads.block_rows(block)
            q_BSHK, normed = self.turn("query", self.project("query", x_ND, rows, call), call)
            a_BSHK = self.group.xp.empty_like(q_BSHK)
            statistics = []
            for unit, heads in self.heads.pieces(block):
                if call.kv is not None and call.S == 1 and call.mask is None:
                    q, a = (array[:, 0, heads.start - block.start:heads.stop - block.start]
                            for array in (q_BSHK, a_BSHK))
                    last_query_forward(q, *units[unit][:2], call.kv.starts, self.scale, out=a,
                                       window=self.sliding_window, slopes=call.slopes(heads, unit))
                    continue
                for b in range(call.B):
                    q, a = (by_group(array, b, unit, heads, block) for array in (q_BSHK, a_BSHK))
                    k, v = (array[b, :call.seen(b)].swapaxes(0, 1) for array in units[unit][:2])
                    options = call.options(heads, unit, b)
                    statistics.append(attention_forward(q, k, v, self.scale, out=a, **options))
            if kept is not None:
                kept[block.index] = q_BSHK, normed, a_BSHK, statistics
            y_ND, _ = linear_forward(as_rows(a_BSHK), cut(self.parameter("out.weight"), rows, axis=1),
                                     dtype=self.leaf_dtype)
            return y_ND

        if kept is not None:
            kept["units"] = units
        return partial

    def backward(self, dy, saved, *, out=None):
        """dy (..., S, D), complete -> dx (..., S, D), complete, and {name: gradient} of this rank's slices.

        out : an earlier backward's gradients, whose arrays are used again
        """
        require_saved(saved)
        x_ND, kept, call = saved
        dy_ND = reduce_from_ranks_backward(self.rows(dy, self.hidden_size, "dy", len(x_ND)))
        gradients = self.gradients(out)
        later = Later(self.group)
        dx_ND = copy_to_ranks_backward(self.partial_backward(dy_ND, x_ND, kept, call, gradients, later), self.partition,
                                       self.group, x_ND.shape, self.dtype, later)
        self.sum_norm_gradients(kept, gradients)
        return dx_ND.reshape(dy.shape), gradients

    def partial_backward(self, dy_ND, x_ND, kept, call, gradients, later):
        """The function of a block that gives its summand of dx (N, D) and leaves the block's gradients.

        First, for each key/value head of several ranks, one all-reduce of 2 x N x K.
        """
        if self.parameter("out.bias") is not None:
            bias_backward(dy_ND, out=gradients[join(self.name, "out.bias")])     # dy is complete: so is this
        units, dq_of, dkv_of, norm_of = kept["units"], {}, {}, {}

        def through_attention(block):
            """dq of the block's heads, and their part in dk and dv of each unit that they need."""
            q_BSHK, _, a_BSHK, statistics = kept[block.index]
            rows, statistics = self.heads.block_rows(block), iter(statistics)
            da_NHbK, _ = linear_backward(dy_ND, (as_rows(a_BSHK), cut(self.parameter("out.weight"), rows, axis=1)),
                                         dw_out=cut(gradients[join(self.name, "out.weight")], rows, axis=1))
            da_BSHK, dq_BSHK = da_NHbK.reshape(a_BSHK.shape), self.group.xp.empty_like(q_BSHK)
            for unit, heads in self.heads.pieces(block):
                dkv = dkv_of[block.index, unit] = self.group.xp.empty((2, *units[unit][0].shape), self.sum_dtype)
                for b in range(call.B):
                    arrays = q_BSHK, a_BSHK, da_BSHK, dq_BSHK
                    q, a, da, dq = (by_group(array, b, unit, heads, block) for array in arrays)
                    k, v = (array[b].swapaxes(0, 1) for array in units[unit][:2])
                    dk, dv = (dkv[i, b].swapaxes(0, 1) for i in range(2))
                    attention_backward(da, next(statistics), q, k, v, a, self.scale, dq=dq, dk=dk, dv=dv,
                                       **call.options(heads, unit, b))
            dq_of[block.index] = dq_BSHK

        for _ in self.group.each_block(through_attention, self.partition):
            pass
        complete = {unit: self.sum_key_value(unit, dkv_of, call) for unit in self.heads.units
                    if unit.is_shared or unit in units}

        def projection_backward(part, d_NHK, rows):
            dw_HKD = cut(gradients[join(self.name, f"{part}.weight")], rows)
            later.append(lambda: linear_weight_backward(d_NHK, x_ND, out=dw_HKD))
            if self.parameter(f"{part}.bias") is not None:
                bias_backward(d_NHK, out=cut(gradients[join(self.name, f"{part}.bias")], rows))

        def key_value_backward(unit):
            """The gradients of a unit's projections, alike on every holder; dk and dv before norm and rotary."""
            dk_BSuK, dv_BSuK = complete[unit].astype(self.dtype, copy=False)
            dk_NuK, norm_of[unit] = self.turn_backward("key", dk_BSuK, units[unit][2], call)
            dv_NuK, rows = as_rows(dv_BSuK), self.heads.unit_rows(unit)
            for part, d in (("key", dk_NuK), ("value", dv_NuK)):
                projection_backward(part, d, rows)
            return dk_NuK, dv_NuK

        d_units = dict(zip(units, self.group.each(key_value_backward, list(units))))
        kept["norms"] = norm_of

        def partial(block):
            rows = self.heads.block_rows(block)
            dq_NHbK, norm_of[block.index] = self.turn_backward("query", dq_of[block.index], kept[block.index][1], call)
            projection_backward("query", dq_NHbK, rows)
            dx_ND = product(dq_NHbK, cut(self.parameter("query.weight"), rows), dtype=self.leaf_dtype)
            for unit in self.heads.owned_units(block):      # not every held one: f would count it once a holder
                for part, d in zip(("key", "value"), d_units[unit]):
                    w_uKD = cut(self.parameter(f"{part}.weight"), self.heads.unit_rows(unit))
                    product(d, w_uKD, dx_ND, add=True)
            return dx_ND

        return partial

    def sum_key_value(self, unit, dkv_of, call):
        """dk and dv of a unit (2, B, S, u, K), summed over the query heads that need it. Collective where shared."""
        def of_block(block):
            return dkv_of[block.index, unit]
        if not unit.is_shared:
            return self.group.sum_own_blocks(of_block, unit.partition)
        shape = 2, call.B, call.S, 1, self.kv_channels
        return self.group.sum_blocks(of_block, unit.partition, shape, self.sum_dtype)

    def sum_norm_gradients(self, kept, gradients):
        """The gradients of query and key norm, summed over all heads. Collective: one all-reduce of 2 x K, if any."""
        if not self.norm:
            return
        norm_of, xp = kept.pop("norms"), self.group.xp

        def of_block(block):
            owned = [norm_of[unit] for unit in self.heads.owned_units(block)]
            return xp.stack([norm_of[block.index], sum(owned, xp.zeros(self.kv_channels, self.sum_dtype))])

        d_query, d_key = self.group.sum_blocks(of_block, self.partition, (2, self.kv_channels), self.sum_dtype)
        gradients[join(self.name, "query_norm.weight")][...] = d_query
        gradients[join(self.name, "key_norm.weight")][...] = d_key

    # --- what forward and backward share ------------------------------------------------------------------------

    def project(self, part, x_ND, rows, call):
        """x times these rows of a projection, as (B, S, heads, K)."""
        y_NHK, _ = linear_forward(x_ND, cut(self.parameter(f"{part}.weight"), rows))
        b_HK = self.parameter(f"{part}.bias")
        add_bias(y_NHK, None if b_HK is None else cut(b_HK, rows))
        return as_heads(y_NHK, call.B, call.S, self.kv_channels)

    def turn(self, part, x_BSHK, call):
        """Norm and rotary of query or key heads; and what the norm's backward needs."""
        normed = None
        if self.norm:
            x_BSHK, normed = norm_forward(x_BSHK, self.parameter(f"{part}_norm.weight"), None, *self.norm)
        if self.rotary:
            starts = None if call.kv is None else call.kv.starts
            x_BSHK = rotary_forward(x_BSHK, *call.tables, self.rotary.interleaved, starts)
        return x_BSHK, normed

    def turn_backward(self, part, dx_BSHK, normed, call):
        """The gradient before rotary and norm, as (N, heads K), and that of the norm's weight, if there is one."""
        dw_K = None
        if self.rotary:
            dx_BSHK = rotary_backward(dx_BSHK, *call.tables, self.rotary.interleaved)
        if self.norm:
            dx_BSHK, dw_K, _ = norm_backward(dx_BSHK, normed)
        return as_rows(dx_BSHK), dw_K

    def add_bias(self, y_ND):
        """y += b, on every rank, but after the sum: once."""
        add_bias(y_ND, self.parameter("out.bias"))

    def collectives(self, tokens):
        """The closed form: (forward, backward), each a Counter of logical data collectives."""
        def all_reduce(elements):
            return Collective("all_reduce", elements, self.dtype.name)
        return Counter({all_reduce(tokens * self.hidden_size): 1}), \
            self.inner_collectives(tokens) + Counter({all_reduce(tokens * self.hidden_size): 1})

    def inner_collectives(self, tokens):
        """Those of backward beside f: shared key/value heads, and query/key norm."""
        shared = sum(unit.is_shared for unit in self.heads.units)
        counts = Counter({Collective("all_reduce", 2 * tokens * self.kv_channels, self.sum_dtype.name): shared})
        if self.norm:
            counts[Collective("all_reduce", 2 * self.kv_channels, self.sum_dtype.name)] += 1
        return +counts
