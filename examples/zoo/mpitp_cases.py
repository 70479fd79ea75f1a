"""Mistakes planted in mpitp's own layers, which run on ranks of MPI. Each is the same on every rank.

A case is a function of a Patch: it puts the wrong function in the place of the right one.
"""
from pathlib import Path
from typing import Any

import numpy as np

import mpitp
from case import Case, Registry
from mpitp.attention_config import AttentionConfig, Rotary
from mpitp.comm.sums import Sum
from mpitp.layers import attention, embedding, linear, mlp
from mpitp.layers.attention import ParallelAttention
from mpitp.layers.heads import Heads
from mpitp.layers.mlp import ParallelMLP
from mpitp.oracle.recorder import Recorder
from mpitp.sharding.parameters import ParameterSpec, Place
from plain import Setting
from problems import Problem, make

mistake = Registry("mpitp")


class Patch:
    """Puts values in the place of others, and all back at the end."""

    def __init__(self, group: Any):
        self.group = group
        self.kept: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set owner.name for now."""
        self.kept.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put all back."""
        while self.kept:
            owner, name, value = self.kept.pop()
            setattr(owner, name, value)


# --- the mistakes --------------------------------------------------------------------------------------------------

@mistake("row bias added by every rank", "mlp", "row bias", r"row bias P times", "PaddlePaddle/Paddle #35186")
def bias_on_every_rank(patch: Patch) -> None:
    right = ParallelMLP.block_forward

    def wrong(layer: Any, block: Any, x: Any, total: Sum, save: bool) -> Any:
        y, of_block = right(layer, block, x, total, save)
        return y + layer.own["down.bias"], of_block
    patch.set(ParallelMLP, "block_forward", wrong)
    patch.set(ParallelMLP, "add_bias", lambda layer, y: None)


@mistake("f's backward without its all-reduce", "mlp", "f", r"f missing", "NovaSky-AI/SkyRL #1886 (in a review)",
         sizes={"gated": True, "bias": False})
def no_sum_of_dx(patch: Patch) -> None:
    patch.set(mlp, "copy_to_ranks_backward", lambda total: total.local_sum())


@mistake("f's backward without its all-reduce, of attention", "attention", "f", r"f missing",
         "NovaSky-AI/SkyRL #1886 (in a review)")
def attention_no_sum_of_dx(patch: Patch) -> None:
    patch.set(attention, "copy_to_ranks_backward", lambda total: total.local_sum())


@mistake("g's forward summed twice", "mlp", "g", r"g doubled")
def y_twice(patch: Patch) -> None:
    patch.set(mlp, "reduce_from_ranks_forward", lambda total: patch.group.all_reduce(total.all_reduce()))


@mistake("f's backward a mean", "mlp", "f", r"f mean")
def mean_of_dx(patch: Patch) -> None:
    patch.set(mlp, "copy_to_ranks_backward", lambda total: total.all_reduce() / patch.group.size)


@mistake("the up projection's shards counted from the other end", "mlp", "slices",
         r"up's slices (\(not its bias\) )?are (in reverse order|swapped)", sizes={"F": 18})
def up_reversed(patch: Patch) -> None:
    right = ParameterSpec.window

    def wrong(spec: ParameterSpec, place: Place) -> tuple[slice, ...]:
        if spec.name != "up.weight":
            return right(spec, place)
        return right(spec, place._replace(rank=place.ranks - 1 - place.rank))
    patch.set(ParameterSpec, "window", wrong)


@mistake("every rank loads the next rank's heads of out", "attention", "slices",
         r"out's slices .*(of the next rank|swapped)", "deepspeedai/DeepSpeed #5283 (order of files)",
         sizes={"H": 6, "G": 6})
def out_of_the_next_rank(patch: Patch) -> None:
    right = ParameterSpec.window

    def wrong(spec: ParameterSpec, place: Place) -> tuple[slice, ...]:
        move = spec.name == "out.weight"
        return right(spec, place._replace(rank=(place.rank + 1) % place.ranks) if move else place)
    patch.set(ParameterSpec, "window", wrong)


@mistake("rank 0's rows of q, k and v on every rank", "attention", "slices", r"rank 0's on every rank",
         "vllm-project/vllm-gguf-plugin #103", sizes={"H": 6, "G": 6})
def same_rows_on_every_rank(patch: Patch) -> None:
    right = ParameterSpec.window

    def wrong(spec: ParameterSpec, place: Place) -> tuple[slice, ...]:
        return right(spec, place if spec.name.startswith("out.") else place._replace(rank=0))
    patch.set(ParameterSpec, "window", wrong)


@mistake("gate and up read alternately out of a fused matrix", "mlp", "gate and up",
         r"gate and up: .*(interleav|even and odd)", "pytorch/torchtitan #4535 (the two layouts)",
         sizes={"gated": True, "bias": False, "F": 18})
def fused_alternately(patch: Patch) -> None:
    right = ParallelMLP.load_dense

    def wrong(layer: Any, weights: dict) -> None:
        fused = np.concatenate([weights["gate.weight"], weights["up.weight"]])
        right(layer, {**weights, "gate.weight": fused[0::2], "up.weight": fused[1::2]})
    patch.set(ParallelMLP, "load_dense", wrong)


@mistake("a shared key/value head's gradient not summed over its ranks", "attention", "key/value heads",
         r"kv gradient not summed", "bigcode-project/Megatron-LM #37", sizes={"H": 6, "G": 1})
def shared_not_summed(patch: Patch) -> None:
    def wrong(layer: Any, unit: Any, dkv_of: dict, call: Any) -> Any:
        own = [dkv_of[key] for key in dkv_of if key[1] is unit]
        shape = 2, call.B, call.S, unit.stop - unit.start, layer.kv_channels
        return sum(own[1:], own[0]) if own else np.zeros(shape, layer.dtype)
    patch.set(ParallelAttention, "sum_key_value", wrong)


@mistake("a shared key/value head's gradient carried into dx by every holder", "attention", "key/value heads",
         r"kv gradient once a holder", "NVIDIA/Megatron-LM #6839 (in a review)", sizes={"H": 6, "G": 1})
def carried_by_all(patch: Patch) -> None:
    rank = patch.group.rank

    def wrong(heads: Heads, block: Any) -> list:
        mine = [b.index for b in heads.partition.blocks_of(rank)]
        return [unit for unit in heads.held_units if min(set(unit.blocks) & set(mine)) == block.index]
    patch.set(Heads, "owned_units", wrong)


@mistake("scores over the square root of hidden_size", "attention", "attention scale",
         r"square root of hidden_size in place", "karpathy/ng-video-lecture #6")
def scale_of_hidden(patch: Patch) -> None:
    right = ParallelAttention.forward

    def wrong(layer: Any, x: Any, **options: Any) -> Any:
        layer.scale = layer.hidden_size ** -0.5
        return right(layer, x, **options)
    patch.set(ParallelAttention, "forward", wrong)


@mistake("query and key norms' gradients not summed over the heads", "attention", "norm gradients",
         r"q/k norm gradient not summed", "NVIDIA/Megatron-LM #7452 (of another layer's norm)",
         sizes={"H": 6, "G": 6, "qk_norm": True})
def head_norms_not_summed(patch: Patch) -> None:
    right = ParallelAttention.sum_norm_gradients

    def wrong(layer: Any, norms: dict, gradients: dict) -> None:
        kind = layer.group.sum_class
        whole = kind.all_reduce
        kind.all_reduce = lambda total: total.local_sum() if total.total is not None else np.zeros(total.shape)
        try:
            right(layer, norms, gradients)
        finally:
            kind.all_reduce = whole
    patch.set(ParallelAttention, "sum_norm_gradients", wrong)


@mistake("ALiBi slopes counted from head 0 on every rank", "attention", "ALiBi",
         r"ALiBi's slopes are counted from head 0", "bigscience-workshop/Megatron-DeepSpeed #227",
         sizes={"position_embedding": "alibi"})
def local_slopes(patch: Patch) -> None:
    right = ParallelAttention.forward

    def wrong(layer: Any, x: Any, **options: Any) -> Any:
        layer.slopes = np.roll(layer.slopes, layer.partition.bounds[patch.group.rank])
        return right(layer, x, **options)
    patch.set(ParallelAttention, "forward", wrong)


@mistake("the embedding's sum over the ranks left out", "decoder", "embedding", r"embedding.*(missing|not summed|own)")
def embedding_not_summed(patch: Patch) -> None:
    def wrong(layer: Any, ids: Any) -> Any:
        found = embedding.embedding_forward(layer.own["weight"], layer.local(ids))
        return found.reshape(*ids.shape, layer.hidden_size)
    patch.set(embedding.VocabParallelEmbedding, "look_up", wrong)


@mistake("the head's dx not summed over the ranks", "decoder", "f", r"the head's all-reduce of dx .* missing",
         "NovaSky-AI/SkyRL #1886 (in a review)")
def head_not_summed(patch: Patch) -> None:
    patch.set(linear, "copy_to_ranks_backward", lambda total: total.local_sum())


@mistake("the row bias twice where both branches share a sum", "decoder", "row bias",
         r"row bias.*(twice|2 times|too often)", ranks=(2, 3), sizes={"parallel_residual": True})
def bias_twice(patch: Patch) -> None:
    right = ParallelMLP.add_bias

    def wrong(layer: Any, y: Any) -> None:
        for _ in range(2):
            right(layer, y)
    patch.set(ParallelMLP, "add_bias", wrong)


@mistake("the epsilon of every norm 1e-6 in place of 1e-5", "decoder", "norm", r"epsilon is 1e-06 in place of 1e-05",
         "huggingface/candle #271")
def other_epsilon(patch: Patch) -> None:
    right = mpitp.layers.norm.Norm.forward

    def wrong(layer: Any, x: Any, **options: Any) -> Any:
        layer.epsilon = 1e-6
        return right(layer, x, **options)
    patch.set(mpitp.layers.norm.Norm, "forward", wrong)


# --- how a case is run ---------------------------------------------------------------------------------------------

def problem_of(case: Case) -> Problem:
    """Return the problem, with what mpitp's layers have and the plain ones have not."""
    sizes = dict(case.sizes)
    qk_norm, parallel = sizes.pop("qk_norm", False), sizes.pop("parallel_residual", False)
    problem = make(case.kind, seed=sum(map(ord, case.name)), setting=Setting(dtype=case.dtype), **sizes)
    if qk_norm:
        K = problem.config["kv_channels"]
        problem.config["qk_norm"] = True
        for name in ("query_norm.weight", "key_norm.weight"):
            problem.weights[name] = np.linspace(0.5, 1.5, K)
    if parallel:
        problem.config["parallel_residual"] = True
    return problem


def layer_of(group: Any, problem: Problem) -> Any:
    """Return mpitp's layer of a problem, with its weights."""
    c, kind = problem.config, problem.kind
    if kind == "mlp":
        layer: Any = ParallelMLP(group, c["hidden_size"], c["ffn_hidden_size"], c["activation"], c["gated"],
                                 c["mlp_bias"], dtype="float64")
    elif kind == "attention":
        layer = ParallelAttention(group, AttentionConfig(
            c["hidden_size"], c["num_attention_heads"], c["num_query_groups"], c["kv_channels"],
            rotary=Rotary() if c["position_embedding"] == "rotary" else None, alibi=c["position_embedding"] == "alibi",
            qk_norm="layernorm" if c.get("qk_norm") else None, qkv_bias=False, bias=c["attention_bias"]),
            dtype="float64")
    else:
        layer = mpitp.Decoder(group, mpitp.DecoderConfig(**c), dtype="float64")
    layer.load_dense(problem.weights)
    return layer


def run(case: Case, folder: Path) -> None:
    """Run a case on the ranks of this job and write its dump. Collective."""
    from hosts import dump_of
    with mpitp.TensorParallelGroup() as group:
        problem, patch = problem_of(case), Patch(group)
        recorder = Recorder(dump_of(folder, case, group.size), group.rank, group.size, case.kind, problem.config)
        try:
            case.code(patch)
            layer = layer_of(group, problem)
            results = run_decoder(layer, problem, recorder) if case.kind == "decoder" else \
                run_layer(layer, problem, recorder)
        finally:
            patch.undo()
        for name, w in problem.weights.items():
            recorder.reference(name, w)
        for name, gradient in results.items():
            spec = layer.specs[name]
            ranges = spec.axis if spec.axis is None else [
                [part.start, part.stop] for rank in range(group.size)
                for part in [spec.window(group.place._replace(rank=rank))[spec.axis]]]
            recorder.backward(name, gradient, spec.axis, ranges)
        recorder.save()


def run_layer(layer: Any, problem: Problem, recorder: Recorder) -> dict:
    """Run a layer of x forward and backward. Returns its gradients."""
    x, dy = problem.inputs["x"], problem.inputs["dy"]
    y, saved = layer.forward(x.copy())
    dx, gradients = layer.backward(dy.copy(), saved)
    recorder.forward("x", x)
    recorder.forward("y", y)
    recorder.backward("y", dy)
    recorder.backward("x", dx)
    return gradients


def run_decoder(model: Any, problem: Problem, recorder: Recorder) -> dict:
    """Run a decoder forward and backward. Returns its gradients."""
    ids, targets = problem.inputs["ids"], problem.inputs["targets"]
    logits, saved = model.forward(ids)
    loss, saved_loss = model.loss(logits, targets)
    recorder.forward("ids", ids)
    recorder.forward("targets", targets)
    recorder.forward("logits", logits.copy(), 2)
    recorder.forward("loss", np.asarray(loss))
    return model.backward(model.loss_backward(saved_loss), saved)
