"""The four ways across the border between replicated and split, each beside its adjoint.

What the forward pass does not communicate, the backward pass does, and the other way round. f and g are the
names of Megatron-LM (Shoeybi et al., arXiv 1909.08053, section 3). The adjoint of an all-reduce is the identity
here, because a replicated tensor is one tensor, however many ranks hold a copy: a second all-reduce would make
gradients P times too large.

`partial` is a function of a Block; see TensorParallelGroup.sum_blocks.
"""


class Later(list):
    """Work that no other rank waits for, such as a weight's gradient: done while the ranks add up, or at once.

    At once where the transport cannot add up meanwhile: what the work needs is in cache then, and is freed sooner.
    """

    def __init__(self, group):
        super().__init__()
        self.overlaps = group.overlaps

    def append(self, function):
        if self.overlaps:
            super().append(function)
        else:
            function()


def copy_to_ranks_forward(x):
    """f: every rank uses x."""
    return x


def copy_to_ranks_backward(partial, partition, group, shape, dtype, later=None):
    """f*: every rank used x, so its gradients add up. Collective: one all-reduce of `shape`.

    later : Later, what `partial` leaves to be done while the ranks add up
    """
    return group.sum_blocks(partial, partition, shape, dtype, later)


def reduce_from_ranks_forward(partial, partition, group, shape, dtype):
    """g: the partial results add up. Collective: one all-reduce of `shape`."""
    return group.sum_blocks(partial, partition, shape, dtype)


def reduce_from_ranks_backward(dy):
    """g*: each partial result counts once."""
    return dy


def gather_from_ranks_forward(x_local, partition, group):
    """The ranks' parts of the last axis side by side, on every rank. Collective: one all-gather."""
    return group.all_gather(x_local, partition, axis=-1)


def gather_from_ranks_backward(dy, partition, group):
    """Each rank made its part, and every rank uses the whole alike: the part's gradient is a slice."""
    return split(dy, partition, group)


def scatter_to_ranks_forward(x, partition, group):
    """This rank's part of the last axis."""
    return split(x, partition, group)


def scatter_to_ranks_backward(dy_local, partition, group):
    """Each rank used its part only: the whole gradient is the parts side by side. Collective: one all-gather."""
    return group.all_gather(dy_local, partition, axis=-1)


def split(x, partition, group):
    return group.xp.ascontiguousarray(x[..., partition.range(group.rank)])
