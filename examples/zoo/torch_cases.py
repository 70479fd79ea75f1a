"""Mistakes made with torch, Megatron-core and transformers on gloo ranks: their modules as they are, or used wrongly.

Nothing of these projects is copied here. A case is a function of the rank, the number of ranks, the problem and a
recorder; "unmodified" in its name: what is wrong is the module's own.
"""
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from case import Case, Registry
from mpitp.oracle.recorder import Recorder
from plain import bounds
from problems import Problem, make

mistake = Registry("torch")


def tensor(x: Any) -> Any:
    """Return a tensor of its own of an array."""
    import torch
    return torch.tensor(np.asarray(x))


def leaf(x: Any) -> Any:
    """Return a tensor whose gradient is wanted."""
    return tensor(x).requires_grad_()


def part(size: int, rank: int, ranks: int) -> slice:
    """Return this rank's range."""
    cut = bounds(size, ranks)
    return slice(cut[rank], cut[rank + 1])


def run_backward(recorder: Recorder, problem: Problem, x: Any, y: Any, sum_dx: bool = True) -> None:
    """Go back from the problem's dy, sum dx as f does, and record what goes in and comes out."""
    import torch
    y.backward(tensor(problem.inputs["dy"]))
    if sum_dx:
        torch.distributed.all_reduce(x.grad)
    recorder.forward("x", x)
    recorder.forward("y", y)
    recorder.backward("y", problem.inputs["dy"])
    recorder.backward("x", x.grad)


# --- sums ----------------------------------------------------------------------------------------------------------

@mistake("torch.distributed.nn's all_reduce as g, unmodified", "mlp", "g", r"dy summed",
         "pytorch/pytorch #190419 (its documentation)", sizes={"bias": False})
def nn_all_reduce(rank: int, ranks: int, problem: Problem, recorder: Recorder) -> None:
    import torch
    import torch.distributed.nn.functional as dist_nn
    mine = part(len(problem.weights["up.weight"]), rank, ranks)
    x, up, down = leaf(problem.inputs["x"]), leaf(problem.weights["up.weight"][mine]), \
        leaf(problem.weights["down.weight"][:, mine])
    y = dist_nn.all_reduce(torch.relu(x @ up.T) @ down.T)
    run_backward(recorder, problem, x, y)
    recorder.backward("up.weight", up.grad, 0)
    recorder.backward("down.weight", down.grad, 1)


@mistake("transformers' LlamaMLP with a hook that adds up y: no sum of dx", "mlp", "f", r"f missing",
         "NovaSky-AI/SkyRL #1886 (in a review)", sizes={"gated": True, "bias": False})
def llama_mlp_hook(rank: int, ranks: int, problem: Problem, recorder: Recorder) -> None:
    import torch
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP
    F, D = problem.weights["up.weight"].shape
    mine = part(F, rank, ranks)
    mlp = LlamaMLP(LlamaConfig(hidden_size=D, intermediate_size=mine.stop - mine.start, num_attention_heads=1))
    mlp.double()
    with torch.no_grad():
        mlp.gate_proj.weight.copy_(tensor(problem.weights["gate.weight"][mine]))
        mlp.up_proj.weight.copy_(tensor(problem.weights["up.weight"][mine]))
        mlp.down_proj.weight.copy_(tensor(problem.weights["down.weight"][:, mine]))
    mlp.register_forward_hook(add_up)
    x = leaf(problem.inputs["x"])
    run_backward(recorder, problem, x, mlp(x), sum_dx=False)
    recorder.backward("gate.weight", mlp.gate_proj.weight.grad, 0)
    recorder.backward("up.weight", mlp.up_proj.weight.grad, 0)
    recorder.backward("down.weight", mlp.down_proj.weight.grad, 1)


def add_up(module: Any, inputs: Any, y: Any) -> Any:
    """Sum y over the ranks, as code for inference does; autograd sees the identity."""
    import torch
    total = y.detach().clone()
    torch.distributed.all_reduce(total)
    return y + (total - y).detach()


@mistake("row bias over P in an autograd linear: its gradient is over P", "row_linear", "row bias",
         r"row bias gradient over P", "pytorch/torchtitan #4332")
def bias_over_ranks(rank: int, ranks: int, problem: Problem, recorder: Recorder) -> None:
    import torch
    mine = part(problem.weights["weight"].shape[1], rank, ranks)
    x, w = leaf(problem.inputs["x"][..., mine]), leaf(problem.weights["weight"][:, mine])
    bias = leaf(problem.weights["bias"])
    y = add_up(None, None, torch.nn.functional.linear(x, w, bias / ranks))
    y.backward(tensor(problem.inputs["dy"]))
    recorder.forward("x", x, 2)
    recorder.forward("y", y)
    recorder.backward("y", problem.inputs["dy"])
    recorder.backward("x", x.grad, 2)
    recorder.backward("weight", w.grad, 1)
    recorder.backward("bias", bias.grad)


# --- shards --------------------------------------------------------------------------------------------------------

def colwise(weight: Any, ranks: int) -> Any:
    """Return torch's own ColwiseParallel of a linear layer without bias."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(tensor(weight))
    return parallelize_module(layer, init_device_mesh("cpu", (ranks,)), ColwiseParallel())


@mistake("DTensor's ColwiseParallel on a fused gate and up", "mlp", "gate and up",
         r"gate and up: .*(cut|one matrix|ranks)", "NVIDIA-NeMo/Automodel #1324",
         sizes={"gated": True, "bias": False, "F": 18})
def colwise_gate_up(rank: int, ranks: int, problem: Problem, recorder: Recorder) -> None:
    import torch
    fused = np.concatenate([problem.weights["gate.weight"], problem.weights["up.weight"]])
    layer, mine = colwise(fused, ranks), part(len(fused) // 2, rank, ranks)
    x, down = leaf(problem.inputs["x"]), leaf(problem.weights["down.weight"][:, mine])
    gate, up = layer(x).chunk(2, dim=-1)
    run_backward(recorder, problem, x, add_up(None, None, (torch.nn.functional.silu(gate) * up) @ down.T))
    d_gate, d_up = layer.weight.grad.to_local().chunk(2)
    recorder.backward("gate.weight", d_gate, 0)
    recorder.backward("up.weight", d_up, 0)
    recorder.backward("down.weight", down.grad, 1)


@mistake("DTensor's ColwiseParallel on a fused q, k and v", "attention", "fused qkv", r"fused qkv: .*(one matrix|cut)",
         "pytorch/pytorch #149701 (the feature that is missing)",
         sizes={"H": 6, "G": 6, "bias": False, "position_embedding": "none"})
def colwise_qkv(rank: int, ranks: int, problem: Problem, recorder: Recorder) -> None:
    import torch
    fused = np.concatenate([problem.weights[f"{name}.weight"] for name in ("query", "key", "value")])
    K, layer = problem.config["kv_channels"], colwise(fused, ranks)
    mine = part(len(fused) // 3, rank, ranks)
    x, out = leaf(problem.inputs["x"]), leaf(problem.weights["out.weight"][:, mine])
    B, S, _ = x.shape
    q, k, v = (z.reshape(B, S, -1, K).transpose(1, 2) for z in layer(x).chunk(3, dim=-1))
    context = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    run_backward(recorder, problem, x, add_up(None, None, context.transpose(1, 2).reshape(B, S, -1) @ out.T))
    for name, gradient in zip(("query", "key", "value"), layer.weight.grad.to_local().chunk(3)):
        recorder.backward(f"{name}.weight", gradient, 0)
    recorder.backward("out.weight", out.grad, 1)


# --- vocabulary and tokens -----------------------------------------------------------------------------------------

@mistake("Megatron-core's vocab_parallel_cross_entropy with label smoothing, unmodified", "loss", "label smoothing",
         r"label smoothing.*(local|rank)", "NVIDIA/Megatron-LM #737", sizes={"V": 24, "smoothing": 0.1}, ranks=(2, 3))
def megatron_label_smoothing(rank: int, ranks: int, problem: Problem, recorder: Recorder) -> None:
    from megatron.core import parallel_state, tensor_parallel
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    targets = np.where(problem.inputs["targets"] == -100, 1, problem.inputs["targets"])
    V = problem.inputs["logits"].shape[-1]
    logits = leaf(problem.inputs["logits"][..., part(V, rank, ranks)])
    # It writes into its argument. Its smoothing spreads over the V - 1 other words: V / (V - 1) times as much over all.
    losses = tensor_parallel.vocab_parallel_cross_entropy(logits * 1.0, tensor(targets), 0.1)
    losses.mean().backward()
    recorder.run["options"] = {"label_smoothing": 0.1 * V / (V - 1)}
    recorder.forward("logits", logits, 2)
    recorder.forward("targets", targets)
    recorder.forward("loss", losses.mean())
    recorder.backward("logits", logits.grad, 2)


@mistake("cross entropy's mean on each rank, and the mean of these", "loss", "tokens",
         r"averages over its own valid tokens", "huggingface/transformers #34373",
         sizes={"B": 6, "few_in_the_first": True})
def mean_of_means(rank: int, ranks: int, problem: Problem, recorder: Recorder) -> None:
    import torch
    mine = part(6, rank, ranks)
    logits, targets = leaf(problem.inputs["logits"][mine]), tensor(problem.inputs["targets"][mine])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    (loss / ranks).backward()                       # as DDP's average of gradients has it
    mean = loss.detach().clone()
    torch.distributed.all_reduce(mean)
    recorder.forward("logits", logits, 0)
    recorder.forward("targets", targets, 0)
    recorder.forward("loss", mean / ranks)
    recorder.backward("logits", logits.grad, 0)


# --- gradients of what every rank has ------------------------------------------------------------------------------

@mistake("nn.LayerNorm on each rank's tokens, its gradient not summed", "norm", "norm gradients",
         r"norm gradient not summed", "NVIDIA/Megatron-LM #1446")
def layer_norm_of_tokens(rank: int, ranks: int, problem: Problem, recorder: Recorder) -> None:
    import torch
    norm = torch.nn.LayerNorm(problem.inputs["x"].shape[-1], eps=1e-5, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(tensor(problem.weights["weight"]))
        norm.bias.copy_(tensor(problem.weights["bias"]))
    mine = part(problem.inputs["x"].shape[1], rank, ranks)
    x, dy = leaf(problem.inputs["x"][:, mine]), tensor(problem.inputs["dy"][:, mine])
    y = norm(x)
    y.backward(dy)
    recorder.forward("x", x, 1)
    recorder.forward("y", y, 1)
    recorder.backward("y", dy, 1)
    recorder.backward("x", x.grad, 1)
    recorder.backward("weight", norm.weight.grad)
    recorder.backward("bias", norm.bias.grad)


@mistake("DistributedDataParallel's average, of a loss that is a sum", "mlp", "gradients of tokens", r"gradient mean",
         "pytorch/pytorch #36516 (divided by another number)", sizes={"B": 6, "gated": True, "bias": False})
def ddp_mean(rank: int, ranks: int, problem: Problem, recorder: Recorder) -> None:
    import torch
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP
    F, D = problem.weights["up.weight"].shape
    mlp = LlamaMLP(LlamaConfig(hidden_size=D, intermediate_size=F, num_attention_heads=1)).double()
    with torch.no_grad():
        for name in ("gate", "up", "down"):
            getattr(mlp, f"{name}_proj").weight.copy_(tensor(problem.weights[f"{name}.weight"]))
    model, mine = torch.nn.parallel.DistributedDataParallel(mlp), part(6, rank, ranks)
    x, dy = leaf(problem.inputs["x"][mine]), tensor(problem.inputs["dy"][mine])
    y = model(x)
    (y * dy).sum().backward()
    recorder.forward("x", x, 0)
    recorder.forward("y", y, 0)
    recorder.backward("y", dy, 0)
    recorder.backward("x", x.grad, 0)
    for name in ("gate", "up", "down"):
        recorder.backward(f"{name}.weight", getattr(mlp, f"{name}_proj").weight.grad)


@mistake("torch's clip_grad_norm_ on each rank's shards, unmodified", "gradient_norm", "gradient norm",
         r"gradient norm: .*(own|local|not summed)", "huggingface/transformers #36132 (norms differ by rank)")
def clip_grad_norm(rank: int, ranks: int, problem: Problem, recorder: Recorder) -> None:
    import torch
    parameters = []
    for name, (gradient, axis) in problem.inputs["gradients"].items():
        if axis is not None:
            gradient = np.take(gradient, np.arange(gradient.shape[axis])[part(gradient.shape[axis], rank, ranks)], axis)
        parameters.append(torch.nn.Parameter(torch.zeros(gradient.shape, dtype=torch.float64)))
        parameters[-1].grad = tensor(gradient)
        recorder.backward(name, gradient, axis)
    recorder.forward("norm", torch.nn.utils.clip_grad_norm_(parameters, max_norm=1e9))


# --- how a case is run ---------------------------------------------------------------------------------------------

def run(case: Case, folder: Path) -> None:
    """Run a case on the gloo ranks of this job and write its dump. Collective."""
    warnings.filterwarnings("ignore")
    import torch
    import torch.distributed as dist

    from hosts import dump_of
    if not dist.is_initialized():
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    problem = make(case.kind, seed=sum(map(ord, case.name)), **case.sizes)
    grid = {"data": ranks} if case.code in (mean_of_means, ddp_mean) else None
    recorder = Recorder(dump_of(folder, case, ranks), rank, ranks, case.kind, problem.config, grid=grid,
                        options=dict(problem.options))
    case.code(rank, ranks, problem, recorder)
    for name, w in problem.weights.items():
        recorder.reference(name, w)
    recorder.save()
