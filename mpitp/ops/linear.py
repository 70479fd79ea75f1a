"""y = x w^T, the one product that everything here splits over ranks.

Dimension key: N rows (tokens), I in features, O out features.
"""
from ..arrays import module_of


def linear_forward(x_NI, w_OI, out=None):
    """y = x w^T. Returns y (N, O), written to `out` if given, and what backward needs."""
    y_NO = module_of(x_NI).matmul(x_NI, w_OI.T, out=out)
    return y_NO, (x_NI, w_OI)


def linear_backward(dy_NO, saved, dw_out=None):
    """dx = dy w, dw = dy^T x. Returns dx (N, I) and dw (O, I), the latter written to `dw_out` if given."""
    x_NI, w_OI = saved
    dx_NI = dy_NO @ w_OI
    dw_OI = module_of(dy_NO).matmul(dy_NO.T, x_NI, out=dw_out)
    return dx_NI, dw_OI


def bias_backward(dy_NO, out=None):
    """The gradient of b in y = x w^T + b: the sum of dy over the rows (O,)."""
    return dy_NO.sum(axis=0, out=out)
