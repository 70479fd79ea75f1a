"""Mistakes in the plain program: each class is a layer of plain.py with one method as its author got it wrong.

The sources are threads that report the mistake, in other programs; the code and the words are this project's own.
"""
from typing import Any

import numpy as np

import plain
from case import Registry
from plain import Array, Weights, bounds, rows

mistake = Registry("plain")


# --- sums of the feed-forward block and of linear layers -----------------------------------------------------------

@mistake("row bias added by every rank", "mlp", "row bias", r"row bias P times",
         "huggingface/text-generation-inference #1036")
class BiasOnEveryRank(plain.MLP):
    def forward(self, x: Array) -> Array:
        super().forward(x)
        return self.g_forward(self.a @ self.down.T + self.down_bias)


@mistake("row bias added by every rank, of a linear layer", "row_linear", "row bias", r"row bias P times",
         "Wenyueh/MinivLLM #80")
class LinearBiasOnEveryRank(plain.RowLinear):
    def forward(self, x: Array) -> Array:
        self.x = x
        return self.g_forward(x @ self.w.T + self.b)


@mistake("row bias over P on every rank: its gradient is over P", "mlp", "row bias", r"row bias gradient over P",
         "pytorch/torchtitan #4332")
class BiasOverRanks(plain.MLP):
    def forward(self, x: Array) -> Array:
        super().forward(x)
        return self.g_forward(self.a @ self.down.T + self.down_bias / self.comm.size)

    def bias_gradient(self, dy_own: Array) -> Array:
        return super().bias_gradient(dy_own) / self.comm.size


@mistake("f's backward without its all-reduce", "mlp", "f", r"f missing", "NovaSky-AI/SkyRL #1886 (in a review)")
class NoSumOfDx(plain.MLP):
    def f_backward(self, dx: Array) -> Array:
        return dx


@mistake("f's backward without its all-reduce, of a linear layer", "column_linear", "f", r"f missing",
         "NovaSky-AI/SkyRL #1886 (in a review)")
class LinearNoSumOfDx(plain.ColumnLinear):
    def f_backward(self, dx: Array) -> Array:
        return dx


@mistake("g's forward without its all-reduce", "mlp", "g", r"g missing", "sgl-project/sglang #14811")
class NoSumOfY(plain.MLP):
    def g_forward(self, y: Array) -> Array:
        return y


@mistake("g's forward without its all-reduce, attention", "attention", "g", r"g missing", "sgl-project/sglang #14811")
class AttentionNoSumOfY(plain.Attention):
    def g_forward(self, y: Array) -> Array:
        return y


@mistake("all-reduce as the adjoint of g", "mlp", "g", r"dy summed",
         "Dao-AILab/flash-attention #1244 (a question that proposes it)")
class SumOfDy(plain.MLP):
    def g_backward(self, dy: Array) -> Array:
        return self.comm.all_reduce(dy)


@mistake("f's backward summed twice", "mlp", "f", r"f doubled", "NVIDIA/Megatron-LM #775 (of gradient buckets)")
class DxTwice(plain.MLP):
    def f_backward(self, dx: Array) -> Array:
        return super().f_backward(super().f_backward(dx))


@mistake("g's forward summed twice", "row_linear", "g", r"g doubled")
class YTwice(plain.RowLinear):
    def g_forward(self, y: Array) -> Array:
        return super().g_forward(super().g_forward(y))


@mistake("mean in place of the sum in g's forward", "mlp", "g", r"g mean", "vllm-project/vllm #33088")
class MeanOfY(plain.MLP):
    def g_forward(self, y: Array) -> Array:
        return super().g_forward(y) / self.comm.size


@mistake("mean in place of the sum in f's backward", "column_linear", "f", r"f mean")
class MeanOfDx(plain.ColumnLinear):
    def f_backward(self, dx: Array) -> Array:
        return super().f_backward(dx) / self.comm.size


@mistake("dx of a row-parallel layer gathered: every rank has rank 0's", "row_linear", "slices",
         r"parts of other ranks: .*rank 1 has rank 0's", "huggingface/nanotron #46", sizes={"F": 18})
class SameDxOnEveryRank(plain.RowLinear):
    def backward(self, dy: Array) -> Array:
        return self.comm.all_gather(super().backward(dy))[0]


# --- shards --------------------------------------------------------------------------------------------------------

@mistake("the down projection's shards in the reverse order of ranks", "mlp", "slices",
         r"down's slices are (in reverse order|swapped)", sizes={"F": 18})
class DownReversed(plain.MLP):
    def load(self, w: Weights) -> None:
        super().load(w)
        cut, other = bounds(w["down.weight"].shape[1], self.comm.size), self.comm.size - 1 - self.comm.rank
        self.down = w["down.weight"][:, cut[other]:cut[other + 1]]


@mistake("rank 0's rows of q, k and v on every rank", "attention", "slices", r"rank 0's on every rank",
         "vllm-project/vllm-gguf-plugin #103", sizes={"H": 6, "G": 6})
class SameRowsOnEveryRank(plain.Attention):
    def load(self, w: Weights) -> None:
        super().load(w)
        part = slice(0, len(self.wq))
        self.wq, self.wk, self.wv = (w[f"{name}.weight"][part] for name in ("query", "key", "value"))


@mistake("the up projection's bias is rank 0's on every rank", "mlp", "slices", r"bias.* rank 0's on every rank",
         "Wenyueh/MinivLLM #81 (loader of weight and bias shared)", sizes={"F": 18})
class SameBiasOnEveryRank(plain.MLP):
    def load(self, w: Weights) -> None:
        super().load(w)
        self.up_bias = w["up.bias"][:len(self.up)]


@mistake("shards begin one row too early", "mlp", "slices", r"offset by one: .*early", sizes={"F": 18})
class OffByOne(plain.MLP):
    def mine(self, size: int) -> slice:
        part = super().mine(size)
        return slice(part.start - 1, part.stop - 1) if self.comm.rank else part


@mistake("a square weight's shard transposed", "mlp", "slices", r"transposed", sizes={"F": 12, "D": 12})
class Transposed(plain.MLP):
    def load(self, w: Weights) -> None:
        super().load(w)
        self.down = w["down.weight"].T[:, self.mine(w["down.weight"].shape[1])]


@mistake("gate and up fused and cut like one matrix", "mlp", "gate and up", r"gate and up: .*(cut|one matrix|ranks)",
         "NVIDIA-NeMo/Automodel #1324", sizes={"gated": True, "F": 18, "bias": False})
class FusedGateUpCut(plain.MLP):
    def load(self, w: Weights) -> None:
        super().load(w)
        fused = np.concatenate([w["gate.weight"], w["up.weight"]])
        self.gate, self.up = np.split(fused[self.mine(len(fused))], 2)


@mistake("gate and up interleaved row by row, read as halves", "mlp", "gate and up", r"gate and up: .*interleav",
         "vllm-project/vllm #36242", sizes={"gated": True, "F": 18, "bias": False})
class FusedGateUpInterleaved(plain.MLP):
    def load(self, w: Weights) -> None:
        super().load(w)
        fused = np.stack([w["gate.weight"], w["up.weight"]], axis=1).reshape(-1, w["up.weight"].shape[1])
        self.gate, self.up = np.split(fused[self.mine(len(fused))], 2)


@mistake("the activation applied to up, not to gate", "mlp", "gate and up", r"gate and up: .*swap",
         "tenstorrent/tt-forge-models #855", sizes={"gated": True, "bias": False})
class GateUpSwapped(plain.MLP):
    def load(self, w: Weights) -> None:
        super().load({**w, "gate.weight": w["up.weight"], "up.weight": w["gate.weight"]})


@mistake("q, k and v fused and cut like one matrix", "attention", "fused qkv", r"fused qkv: .*(one matrix|cut)",
         "vllm-project/vllm #42803", sizes={"H": 6, "G": 6, "K": 4})
class FusedQKVCut(plain.Attention):
    def load(self, w: Weights) -> None:
        super().load(w)
        fused = np.concatenate([w["query.weight"], w["key.weight"], w["value.weight"]])
        self.wq, self.wk, self.wv = np.split(fused[self.mine(len(fused))], 3)


@mistake("q, k and v by heads in the checkpoint, read as thirds", "attention", "fused qkv",
         r"fused qkv: .*(head|group)", "ai-dynamo/modelexpress #650 (the layout)", sizes={"H": 6, "G": 6, "K": 4})
class FusedQKVByHeads(plain.Attention):
    def load(self, w: Weights) -> None:
        super().load(w)
        by_head = [w[f"{name}.weight"].reshape(self.H, self.K, -1) for name in ("query", "key", "value")]
        fused = np.concatenate(by_head, axis=1).reshape(3 * self.H * self.K, -1)[self.mine(3 * self.H * self.K)]
        self.wq, self.wk, self.wv = np.split(fused, 3)


@mistake("heads dealt in turn for out, in runs for q, k and v", "attention", "slices",
         r"(out|heads).*(turn|interleav|rank \\+|every)", sizes={"H": 6, "G": 6})
class HeadsInTurn(plain.Attention):
    def load(self, w: Weights) -> None:
        super().load(w)
        by_head = w["out.weight"].reshape(len(w["out.weight"]), self.H, self.K)
        self.wo = by_head[:, self.comm.rank::self.comm.size].reshape(len(w["out.weight"]), -1)


# --- attention -----------------------------------------------------------------------------------------------------

@mistake("a shared key/value head's gradient not summed over its ranks", "attention", "key/value heads",
         r"kv gradient not summed", "bigcode-project/Megatron-LM #37", sizes={"H": 6, "G": 1})
class SharedNotSummed(plain.Attention):
    def share(self, total: Array) -> Array:
        return total


@mistake("a shared key/value head's gradient carried into dx by every holder", "attention", "key/value heads",
         r"kv gradient once a holder", "NVIDIA/Megatron-LM #6839 (in a review)", sizes={"H": 6, "G": 1})
class CarriedByAll(plain.Attention):
    def carried(self, d: Array) -> Array:
        return d


@mistake("scores over the square root of hidden_size", "attention", "attention scale",
         r"square root of hidden_size in place", "karpathy/ng-video-lecture #6")
class ScaleOfHidden(plain.Attention):
    def scale(self) -> float:
        return self.D ** -0.5


@mistake("scores scaled by hidden_size over the local heads", "attention", "attention scale",
         r"hidden_size over the heads of a rank", "huggingface/transformers #43481", sizes={"H": 6, "G": 6, "K": 2})
class ScaleOfLocalHeads(plain.Attention):
    def scale(self) -> float:
        return (self.D / (self.heads.stop - self.heads.start)) ** -0.5


@mistake("rotary positions by neighbours in place of halves", "attention", "rotary",
         r"interleaved pairs in place of halves", "huggingface/transformers #47328")
class RotaryInterleaved(plain.Attention):
    def turn(self, z: Array, back: bool = False) -> Array:
        mixed = np.concatenate([z[..., 0::2], z[..., 1::2]], axis=-1)
        turned, out = super().turn(mixed, back), np.empty_like(z)
        out[..., 0::2], out[..., 1::2] = np.split(turned, 2, axis=-1)
        return out


@mistake("rotary positions applied twice", "attention", "rotary", r"rotary positions are applied twice")
class RotaryTwice(plain.Attention):
    def turn(self, z: Array, back: bool = False) -> Array:
        return super().turn(super().turn(z, back), back)


@mistake("positions of each rank's part of the sequence begin at 0", "block", "rotary",
         r"positions of each rank's part .* begin at 0", "NVIDIA/Megatron-LM #560 (a question)", sequence_parallel=True)
class PositionsFromZero(plain.Block):
    class attention(plain.Attention):
        def positions(self, S: int) -> Array:
            cut = bounds(S, self.comm.size)
            return np.concatenate([np.arange(stop - start) for start, stop in zip(cut, cut[1:])])


@mistake("ALiBi slopes counted from head 0 on every rank", "attention", "ALiBi",
         r"ALiBi's slopes are counted from head 0", "bigscience-workshop/Megatron-DeepSpeed #227",
         sizes={"position_embedding": "alibi", "H": 4})
class LocalSlopes(plain.Attention):
    def slopes(self) -> Array:
        return 2.0 ** (-8.0 * np.arange(1, self.heads.stop - self.heads.start + 1) / self.H)


@mistake("ALiBi slopes of as many heads as a rank has", "attention", "ALiBi",
         r"ALiBi's slopes are .*(number|as many|local)", "flashinfer-ai/flashinfer #1606",
         sizes={"position_embedding": "alibi", "H": 4})
class SlopesOfLocalHeads(plain.Attention):
    def slopes(self) -> Array:
        n = self.heads.stop - self.heads.start
        return 2.0 ** (-8.0 * np.arange(1, n + 1) / n)


@mistake("key/value heads tiled, not repeated", "attention", "key/value heads", r"kv heads numbered wrongly",
         "onnx/onnx #7274", sizes={"H": 6, "G": 2})
class TiledHeads(plain.Attention):
    def load(self, w: Weights) -> None:
        super().load(w)
        self.group_of = np.arange(self.heads.start, self.heads.stop) % self.G
        self.groups = slice(0, self.G)
        self.wk, self.wv = w["key.weight"], w["value.weight"]

    def owned(self) -> Array:
        return np.full(self.G, self.comm.rank == 0)


@mistake("the same dropout mask on every rank's heads", "attention", "dropout", r"dropout.*same",
         "tenstorrent/tt-metal #55947", sizes={"H": 6, "G": 6, "dropout": 0.25})
class SameMask(plain.Attention):
    def dropout(self, shape: tuple) -> Array:
        return self.setting.options["mask"][:, :shape[1]]


# --- norms and replicated parameters -------------------------------------------------------------------------------

@mistake("a norm's gradient not summed under sequence parallelism", "norm", "norm gradients",
         r"norm gradient not summed", "NVIDIA/Megatron-LM #1446", sequence_parallel=True)
class NormNotSummed(plain.Norm):
    def sum_of_tokens(self, gradient: Array) -> Array:
        return gradient


@mistake("a norm's gradient averaged under sequence parallelism", "norm", "norm gradients", r"norm gradient mean",
         "EleutherAI/gpt-neox #1259", sequence_parallel=True)
class NormAveraged(plain.Norm):
    def sum_of_tokens(self, gradient: Array) -> Array:
        return super().sum_of_tokens(gradient) / self.comm.size


@mistake("norms' gradients not summed under sequence parallelism, of a block", "block", "norm gradients",
         r"norm gradient not summed", "NVIDIA/Megatron-LM #1446", sequence_parallel=True)
class BlockNormNotSummed(plain.Block):
    norm = NormNotSummed


@mistake("the row bias's gradient not summed under sequence parallelism", "mlp", "row bias",
         r"bias gradient not summed", "NVIDIA/Megatron-LM #236 (a question)", sequence_parallel=True)
class BiasGradientNotSummed(plain.MLP):
    def bias_gradient(self, dy_own: Array) -> Array:
        return rows(dy_own).sum(0)


@mistake("epsilon 1e-6 in place of 1e-5", "norm", "norm", r"epsilon is 1e-06 in place of 1e-05",
         "foundation-model-stack/foundation-model-stack #99", sizes={"rms": True})
class OtherEpsilon(plain.Norm):
    epsilon = 1e-6


@mistake("another dropout mask on every replica", "block", "dropout", r"dropout.*(differ|another|other|not the same)",
         "NVIDIA/Megatron-LM #206", sizes={"dropout": 0.25})
class OtherMasks(plain.Block):
    def load(self, w: Weights) -> None:
        super().load(w)
        random = np.random.default_rng(self.comm.rank)
        for name in ("attention.dropout", "mlp.dropout"):
            mask = (random.random(self.setting.options[name].shape) < 0.75) / 0.75
            self.setting.options = {**self.setting.options, name: mask}


# --- vocabulary ----------------------------------------------------------------------------------------------------

@mistake("the first id of every part masked", "embedding", "ids of a range", r"first id",
         "deepseek-ai/DeepSeek-V3 #298 (a question)")
class FirstIdMasked(plain.Embedding):
    def is_mine(self, ids: Array) -> Array:
        return (ids > self.part.start) & (ids < self.part.stop)


@mistake("the last id of every part masked", "embedding", "ids of a range", r"last id",
         "huggingface/text-generation-inference #1463 (of the last part)")
class LastIdMasked(plain.Embedding):
    def is_mine(self, ids: Array) -> Array:
        return (ids >= self.part.start) & (ids < self.part.stop - 1)


@mistake("ids of other ranks not masked", "embedding", "ids of a range", r"not masked|row 0|first row")
class NotMasked(plain.Embedding):
    def forward(self, ids: Array) -> Array:
        self.ids, self.own = ids, self.is_mine(ids)
        return self.g_forward(self.w[np.where(self.own, ids - self.part.start, 0)])


@mistake("label smoothing over the local vocabulary", "loss", "label smoothing",
         r"label smoothing.*local|label smoothing.*rank", "NVIDIA/Megatron-LM #737", sizes={"smoothing": 0.1})
class LocalSmoothing(plain.Loss):
    def mean_logit(self, z: Array) -> Array:
        return z.mean(-1)

    def smooth_label(self, s: float) -> float:
        return s / (self.part.stop - self.part.start)


@mistake("logits gathered, and summed over the ranks again: log P too much", "loss", "cross entropy",
         r"the loss is log \d too large", "NVIDIA/Megatron-LM #7452")
class LogPTooMuch(plain.Loss):
    def sum_exp(self, z: Array) -> Array:
        return super().sum_exp(z) * self.comm.size


@mistake("the softmax over the local vocabulary", "loss", "cross entropy", r"sum of e\^z is not summed",
         "bigscience-workshop/Megatron-DeepSpeed #394 (a question)")
class LocalSoftmax(plain.Loss):
    def sum_exp(self, z: Array) -> Array:
        return np.exp(z).sum(-1)


@mistake("the maximum of the local vocabulary", "loss", "cross entropy", r"maxim|highest|largest")
class LocalMaximum(plain.Loss):
    def shift(self, z: Array) -> Array:
        return z.max(-1)


@mistake("the last id of a part is no target", "loss", "ids of a range", r"last id",
         "NVIDIA/Megatron-LM #1754 (uneven vocabularies)")
class LastTargetMasked(plain.Loss):
    def is_mine(self, t: Array) -> Array:
        return (t >= self.part.start) & (t < self.part.stop - 1)


@mistake("valid tokens averaged per rank", "loss", "tokens", r"averages over its own valid tokens",
         "huggingface/transformers #34373", sizes={"B": 6, "few_in_the_first": True}, tokens=0)
class TokensPerRank(plain.DataParallelLoss):
    def count(self, counted: Array) -> Array:
        return counted.sum() * self.local_comm.size


@mistake("the gradient of the loss scaled twice", "loss", "loss scale", r"(scale|scaled).*twice",
         "huggingface/accelerate #1839", options={"loss_scale": 8.0})
class ScaledTwice(plain.Loss):
    def backward(self) -> Array:
        return super().backward() * 8.0 * 8.0


@mistake("the loss averaged over all tokens, those that do not count too", "loss", "tokens",
         r"(all tokens|ignored|do not count|every token)", "ml-explore/mlx-lm #1413 (of accumulation)")
class AllTokensCounted(plain.Loss):
    def count(self, counted: Array) -> Array:
        return np.asarray(counted.size, float)


# --- the decoder ---------------------------------------------------------------------------------------------------

@mistake("the head's dx not summed over the ranks", "decoder", "f", r"the head's all-reduce of dx .* missing",
         "NovaSky-AI/SkyRL #1886 (in a review)")
class HeadNotSummed(plain.Decoder):
    def head_backward(self, dz: Array) -> Array:
        return dz @ self.head


@mistake("a tied embedding without the head's gradient", "decoder", "tied embedding",
         r"tied embedding leaves out the head", "paiml/entrenar #314", sizes={"tied": True})
class TiedWithoutHead(plain.Decoder):
    def tie(self, d_embedding: Array, d_head: Array) -> Array:
        return d_embedding


@mistake("label smoothing over the local vocabulary, of a decoder", "decoder", "label smoothing",
         r"label smoothing.*local|label smoothing.*rank", "NVIDIA/Megatron-LM #7464", options={"label_smoothing": 0.1})
class DecoderLocalSmoothing(plain.Decoder):
    loss = LocalSmoothing


@mistake("all-reduce as the adjoint of g, of a decoder of two layers", "decoder", "g", r"dy summed",
         "Dao-AILab/flash-attention #1244 (a question that proposes it)", sizes={"layers": 2})
class DecoderSumOfDy(plain.Decoder):
    class block(plain.Block):
        mlp = SumOfDy


# --- gradients over the ranks --------------------------------------------------------------------------------------

@mistake("the gradient norm counts what all ranks have P times", "gradient_norm", "gradient norm",
         r"gradient norm: .*(every rank|replica).*times", "NVIDIA-NeMo/RL #3788")
class ReplicasCounted(plain.GradientNorm):
    def forward(self, gradients: dict[str, tuple[Array, bool]]) -> Array:
        own = sum(self.squares(g) for g, _ in gradients.values())
        return np.sqrt(self.comm.all_reduce(np.asarray(own, self.setting.numbers)))


@mistake("the gradient norm of each rank's own part", "gradient_norm", "gradient norm",
         r"gradient norm: .*(own|local|not summed)", "huggingface/transformers #36132 (norms differ by rank)")
class LocalNorm(plain.GradientNorm):
    def forward(self, gradients: dict[str, tuple[Array, bool]]) -> Array:
        return np.sqrt(sum(self.squares(g) for g, _ in gradients.values()))


@mistake("gradients averaged over data-parallel ranks, of a loss that is a sum", "mlp", "gradients of tokens",
         r"gradient mean", "pytorch/pytorch #36516 (divided by another number)", sizes={"B": 6}, tokens=0)
class GradientsAveraged(plain.DataParallelMLP):
    def synchronise(self) -> None:
        super().synchronise()
        for name, gradient in self.gradients.items():
            self.keep(name, gradient / self.comm.size)


@mistake("gradients not communicated over data-parallel ranks", "mlp", "gradients of tokens",
         r"gradient not communicated", "NVIDIA/Megatron-LM #1685", sizes={"B": 6}, tokens=0)
class NotCommunicated(plain.DataParallelMLP):
    def synchronise(self) -> None:
        pass


@mistake("one bucket of gradients not communicated", "mlp", "gradients of tokens",
         r"gradient not communicated|not summed", "NVIDIA/Megatron-LM #1012 (a gradient computed after the all-reduce)",
         sizes={"B": 6}, tokens=0)
class BucketLeftOut(plain.DataParallelMLP):
    def synchronise(self) -> None:
        for name in ("down.weight", "down.bias"):
            self.keep(name, self.comm.all_reduce(self.gradients[name]))


@mistake("a bucket of the step before", "mlp", "gradients of tokens", r"stale", "NVIDIA/Megatron-LM #3670",
         sizes={"B": 6}, tokens=0)
class StaleBucket(plain.DataParallelMLP):
    """Communication starts before backward has written the buffer: what it finds is the last step's."""

    def forward(self, x: Array) -> Array:
        super().forward(np.roll(x, 1, axis=-1))
        super().backward(np.roll(x, 2, axis=-1))
        self.previous = dict(self.gradients)
        return super().forward(x)

    def synchronise(self) -> None:
        super().synchronise()
        if hasattr(self, "previous"):
            self.gradients["up.weight"] = self.previous["up.weight"]

    def write(self, recorder: Any) -> None:
        super().write(recorder)
        for name, gradient in self.previous.items():
            recorder.record("previous", name, gradient)


# --- precision -----------------------------------------------------------------------------------------------------

@mistake("the sum over the ranks in bfloat16, where float32 is claimed", "row_linear", "16 bits", r"16 bits",
         "NVIDIA/TransformerEngine #1761", sizes={"F": 192, "D": 48}, dtype="bfloat16", ranks=(8,))
class SumInBfloat16(plain.RowLinear):
    def g_forward(self, y: Array) -> Array:
        total: Any = 0
        for summand in self.comm.all_gather(plain.round_to_bfloat16(y)):
            total = plain.round_to_bfloat16(total + summand)
        return total


@mistake("products accumulated in bfloat16, where float32 is claimed", "column_linear", "16 bits", r"16 bits",
         "tenstorrent/tt-metal #37884 (of a collective)", sizes={"D": 512, "F": 24}, dtype="bfloat16", ranks=(2, 3))
class ProductsInBfloat16(plain.ColumnLinear):
    def forward(self, x: Array) -> Array:
        self.x, y = x, np.zeros((*x.shape[:-1], len(self.w)), np.float32)
        for i in range(x.shape[-1]):
            y = plain.round_to_bfloat16(y + plain.round_to_bfloat16(x[..., i:i + 1] * self.w[:, i]))
        return plain.round_to_bfloat16(y + self.b)
