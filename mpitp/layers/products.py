"""The two products of tensor parallelism, and f and g, which lead from replicated arrays to split ones and back.

    f                  column-parallel        activation       row-parallel            g
    x  on every rank   h_p = x W1_p^T         a_p = act(h_p)   y_p = a_p W2_p^T        y = sum over p of y_p
                       rows of W1 a rank                       columns of W2 a rank    MPI_Allreduce

Each stands beside its backward. What the forward pass does not communicate, the backward pass does, and the other way
round. The names f and g are Megatron-LM's (Shoeybi et al., arXiv 1909.08053, section 3). The adjoint of an all-reduce
is the identity here, because a replicated tensor is one tensor, however many ranks hold a copy: a second all-reduce
would make gradients P times too large. `rows` are those of sequence parallelism (comm/rows.py), None without it.

Dimension key: N rows (tokens), I in features, O out features; p marks an axis split over the ranks, b the part of it in
one block. `part` is the block's slice of that axis in the arrays of its rank, `total` the sum that it belongs to.
"""
from typing import Any

from ..arrays import Array
from ..comm.sums import Sum
from ..ops.linear import linear_backward, linear_forward, linear_weight_backward, product, two_linears_forward


# --- f and g ----------------------------------------------------------------------------------------------------

def copy_to_ranks_forward(x: Array, rows: Any = None) -> Array:
    """Apply f: every rank uses x. With rows, of which each has its own: one all-gather."""
    return x if rows is None else rows.all_gather(x)


def copy_to_ranks_backward(total: Sum, rows: Any = None) -> Array:
    """Apply f*: every rank used x, so its gradients add up. Collective: one all-reduce, or reduce-scatter of rows."""
    return total.all_reduce() if rows is None else rows.reduce_scatter(total)


def reduce_from_ranks_forward(total: Sum, rows: Any = None) -> Array:
    """Apply g: the partial results add up. Collective: one all-reduce, or with rows one reduce-scatter."""
    return total.all_reduce() if rows is None else rows.reduce_scatter(total)


def reduce_from_ranks_backward(dy: Array, rows: Any = None) -> Array:
    """Apply g*: each partial result counts once. With rows: one all-gather."""
    return dy if rows is None else rows.all_gather(dy)


# --- the column-parallel product ----------------------------------------------------------------------------------

def column_parallel_forward(x_NI: Array, w_OpI: Array, part: slice, out: Array | None = None) -> Array:
    """Return y_b = x W_b^T (N, O b): W is split by rows, so a rank computes its columns of y from all of x.

                  [ rank 0 ]
        x  times  [--------] ^T  =  [ y_0 | y_1 ]         no communication before, none after
                  [ rank 1 ]
    """
    return linear_forward(x_NI, rows_of(w_OpI, part), out)[0]


def two_column_parallel_forward(x_NI: Array, v_OpI: Array, w_OpI: Array, part: slice) -> tuple[Array, Array]:
    """Return x V_b^T and x W_b^T, (N, O b) each."""
    return two_linears_forward(x_NI, rows_of(v_OpI, part), rows_of(w_OpI, part))


def column_parallel_backward(dy_NOb: Array, x_NI: Array, w_OpI: Array, part: slice, dw_OpI: Array, total: Sum,
                             dx_NI: Array | None = None) -> Array:
    """Return this block's summand of dx = sum over b of dy_b W_b, added to dx_NI if given; write dW_b = dy_b^T x.

    No other rank waits for dW, so it may be computed while the ranks add up dx, which is `total`.
    """
    total.meanwhile(linear_weight_backward, dy_NOb, x_NI, rows_of(dw_OpI, part))
    return product(dy_NOb, rows_of(w_OpI, part), dx_NI, total.summand_dtype, dx_NI is not None)


# --- the row-parallel product -----------------------------------------------------------------------------------------

def row_parallel_forward(x_NIb: Array, w_OIp: Array, part: slice, total: Sum | None) -> Any:
    """Return this block's summand of y = sum over b of x_b W_b^T: W is split by columns, as x is. None without a sum.

                               [        |        ]
        [ x_0 | x_1 ]  times   [ rank 0 | rank 1 ] ^T  =  y_0 + y_1         every summand has y's full shape
                               [        |        ]
    """
    return None if total is None else linear_forward(x_NIb, columns_of(w_OIp, part), None, total.summand_dtype)[0]


def row_parallel_backward(dy_NO: Array, x_NIb: Array, w_OIp: Array, part: slice, dw_OIp: Array) -> Array:
    """Return dx_b = dy W_b (N, I b); write dW_b = dy^T x_b. dy is whole on every rank: no communication."""
    return linear_backward(dy_NO, (x_NIb, columns_of(w_OIp, part)), columns_of(dw_OIp, part))[0]


def rows_of(w: Array | None, part: slice) -> Any:
    """Return w[part], and None for None; w itself where that is all of it, as a view takes time."""
    return w if w is None or part.start == 0 and part.stop == len(w) else w[part]


def columns_of(w: Array, part: slice) -> Array:
    """Return w[:, part]; w itself where that is all of it."""
    return w if part.start == 0 and part.stop == w.shape[1] else w[:, part]
