"""Record what a tensor-parallel PyTorch module does, by hooks, and judge it: DTensor, or Megatron's style.

    pip install torch
    python examples/judge_torch.py                          # a feed-forward block of DTensors on two processes
    python examples/judge_torch.py --megatron               # one with hand-written f and g
    python examples/judge_torch.py --megatron --forget-f    # whose f has no all-reduce in backward

Of this file, `ModuleRecorder` is what another project copies, beside mpitp/oracle/recorder.py.
"""
import argparse
import subprocess
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from mpitp.oracle import Recorder


class ModuleRecorder:
    """Records one forward and backward of a module on this rank.

    names : {name in the module: name in docs/judge.md} of parameters, and of submodules whose outputs are recorded
    splits : {name in the module: axis} of what is split and does not say so itself, as DTensors and Megatron's
        parameters do (`partition_dim`)
    """

    def __init__(self, module, recorder, names, splits=None):
        self.module, self.recorder, self.names, self.splits = module, recorder, names, splits or {}
        module.register_forward_hook(self.whole)
        for name, inner in module.named_modules():
            if name in names:
                inner.register_forward_hook(lambda _, x, y, name=name: self.keep("forward", name, y))

    def whole(self, module, x, y):
        """Record x and y, and their gradients when they are there."""
        self.keep("forward", "x", x[0])
        self.keep("forward", "y", y)
        if x[0].requires_grad:
            x[0].register_hook(lambda gradient: self.keep("backward", "x", gradient))
        y.register_hook(lambda gradient: self.keep("backward", "y", gradient))

    def keep(self, phase, name, tensor, like=None):
        """Record a tensor with its layout."""
        ours = self.names.get(name, name)
        self.recorder.record(phase, ours, tensor, **self.layout(name, tensor if like is None else like))

    def layout(self, name, tensor):
        """How a tensor lies on the ranks."""
        if isinstance(tensor, DTensor):
            placement = tensor.placements[0]
            return {"axis": placement.dim} if placement.is_shard() else {"partial": placement.is_partial()}
        if getattr(tensor, "tensor_model_parallel", False):
            return {"axis": tensor.partition_dim}
        return {"axis": self.splits[name]} if name in self.splits else {}

    def save(self):
        """Record the gradients of the parameters, after backward, and write this rank's files."""
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None and name in self.names:
                same = parameter if not isinstance(parameter.grad, DTensor) else parameter.grad
                self.keep("backward", name, parameter.grad, like=same)
        self.recorder.save()


# --- two modules to judge ----------------------------------------------------------------------------------------

D, F, NAMES = 12, 32, {"up.weight": "up.weight", "up.bias": "up.bias", "down.weight": "down.weight",
                       "down.bias": "down.bias"}


class Dense(nn.Module):
    """relu(x U^T + b) V^T + c, dense; DTensor makes it parallel."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, F), nn.Linear(F, D)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class CopyToRanks(torch.autograd.Function):
    """f: the identity forward, an all-reduce backward, unless that is forgotten."""

    @staticmethod
    def forward(context, x, forget):
        context.forget = forget
        return x.clone()

    @staticmethod
    def backward(context, dx):
        dx = dx.contiguous()
        if not context.forget:
            dist.all_reduce(dx)
        return dx, None


class ReduceFromRanks(torch.autograd.Function):
    """g: an all-reduce forward, the identity backward."""

    @staticmethod
    def forward(context, y):
        y = y.clone()
        dist.all_reduce(y)
        return y

    @staticmethod
    def backward(context, dy):
        return dy


class MegatronStyle(nn.Module):
    """The same by hand: rows of U and columns of V on each rank."""

    def __init__(self, dense, rank, ranks, forget):
        super().__init__()
        self.forget, mine = forget, slice(F * rank // ranks, F * (rank + 1) // ranks)
        self.up, self.down = nn.Linear(D, mine.stop - mine.start), nn.Linear(mine.stop - mine.start, D)
        with torch.no_grad():
            self.up.weight.copy_(dense.up.weight[mine])
            self.up.bias.copy_(dense.up.bias[mine])
            self.down.weight.copy_(dense.down.weight[:, mine])
            self.down.bias.copy_(dense.down.bias)
        for parameter, axis in ((self.up.weight, 0), (self.up.bias, 0), (self.down.weight, 1)):
            parameter.tensor_model_parallel, parameter.partition_dim = True, axis

    def forward(self, x):
        h = torch.relu(self.up(CopyToRanks.apply(x, self.forget)))
        return ReduceFromRanks.apply(h @ self.down.weight.T) + self.down.bias


def work(rank, ranks, arguments, port):
    """What each process does."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    dense, x, dy = Dense(), torch.randn(2, 5, D, requires_grad=True), torch.randn(2, 5, D)
    recorder = Recorder(arguments.out, rank, ranks, "mlp", {"activation": "relu"})
    for name, parameter in dense.named_parameters():
        recorder.reference(NAMES[name], parameter)
    if arguments.megatron:
        module = MegatronStyle(dense, rank, ranks, arguments.forget_f)
    else:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        module = parallelize_module(dense, init_device_mesh("cpu", (ranks,)), plan)
    run = ModuleRecorder(module, recorder, NAMES)
    module(x).backward(dy)
    run.save()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="torch-dump", help="folder for the dump")
    parser.add_argument("--megatron", action="store_true", help="hand-written f and g, not DTensor")
    parser.add_argument("--forget-f", action="store_true", help="no all-reduce in f's backward")
    parser.add_argument("--port", type=int, default=29571, help="a free port of this machine")
    given = parser.parse_args()
    processes.spawn(work, (2, given, given.port), nprocs=2)
    sys.exit(subprocess.run([sys.executable, "-m", "mpitp", "judge", given.out]).returncode)
