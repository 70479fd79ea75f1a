"""One step of AdamW on the GPU: every array is read and written once."""
from .kernel import elementwise

BODY = """
    A grown = (A)g * scale;
    m += (grown - m) * (1 - beta1);
    v += (grown * grown - v) * (1 - beta2);
    w = w * decay - rate * (m / (sqrt(v) * root + eps));"""


def adamw_step(w, g, m, v, *, beta1, beta2, rate, root, eps, decay, scale):
    """As mpitp.ops.adamw.adamw_step."""
    numbers = [w.dtype.type(number) for number in (beta1, beta2, rate, root, eps, decay, scale)]
    kernel = elementwise("T g, T beta1, T beta2, T rate, T root, T eps, T decay, T scale", "T w, T m, T v", BODY,
                         "mpitp_adamw")
    kernel(g, *numbers, w, m, v)
