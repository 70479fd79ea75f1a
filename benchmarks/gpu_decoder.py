"""A whole decoder in bfloat16, a token of generation and a training step, against torch eager on the same weights.

Llama's kind: RMS norms, rotary positions, gated SiLU, no biases, attention by torch's scaled_dot_product_attention.
"mpitp choice" is the recorded token with the choice of the next one in the graph, brought to the host, as in generate.
torch trains as mpitp does: bfloat16 weights, float32 weights for AdamW, gradients widened.
"""
import numpy as np
import torch
import torch.distributed as distributed
from torch.nn import functional as F

import mpitp
from gpu_common import as_torch, norm_difference, randomise, torch_graph
from mpitp.inference.generation import Choice
from mpitp.inference.graph import CapturedChoice, CapturedToken, can_record
from mpitp.inference.kv import KeyValues
from mpitp.training.optimizer import AdamW

FURTHER = 100           # tokens that recorded cases continue by, before they start again after CONTEXT
LAYERS, D, HEADS, FFN, V, TOKENS, CONTEXT = 12, 2048, 16, 5632, 32000, 1024, 512
CONFIG = mpitp.DecoderConfig(V, D, LAYERS, HEADS, ffn_hidden_size=FFN, activation="silu", gated=True, qkv_bias=False,
                             attention_bias=False, mlp_bias=False, normalization="rmsnorm",
                             max_position_embeddings=4096)


class Sum(torch.autograd.Function):
    """g: all-reduce forward, identity backward."""
    @staticmethod
    def forward(context, x):
        x = x.clone()
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(context, dy):
        return dy


class Copy(torch.autograd.Function):
    """f: identity forward, all-reduce backward."""
    @staticmethod
    def forward(context, x):
        return x

    @staticmethod
    def backward(context, dy):
        dy = dy.clone()
        distributed.all_reduce(dy)
        return dy


class VocabParallelLoss(torch.autograd.Function):
    """Mean cross-entropy of logits (N, V p), a rank's columns: one maximum over the ranks, one sum of two numbers."""
    @staticmethod
    def forward(context, logits, targets, first_id):
        local = targets - first_id
        mine = (local >= 0) & (local < logits.shape[1])
        local = local.clamp(0, logits.shape[1] - 1)[:, None]
        top = logits.amax(1, keepdim=True)
        if distributed.is_initialized():
            distributed.all_reduce(top, distributed.ReduceOp.MAX)
        e = (logits - top).exp_()
        sums = torch.stack([e.sum(1), (logits.gather(1, local) - top)[:, 0] * mine])
        if distributed.is_initialized():
            distributed.all_reduce(sums)
        context.save_for_backward(e.div_(sums[0][:, None]), local, mine)
        return (sums[0].log() - sums[1]).mean()

    @staticmethod
    def backward(context, d_loss):
        d_logits, local, mine = context.saved_tensors
        d_logits.scatter_add_(1, local, -mine[:, None].to(d_logits.dtype))
        return d_logits.mul_(d_loss / len(d_logits)), None, None


def add_up(x):
    return Sum.apply(x) if distributed.is_initialized() else x


def use_everywhere(x):
    return Copy.apply(x) if distributed.is_initialized() else x


class TorchDecoder:
    def __init__(self, weights, first_id, trains=False):
        """weights : {name of mpitp's: tensor}; first_id : of the vocabulary rows of this rank"""
        self.w, self.first_id = weights, first_id
        self.K = D // HEADS
        angle = torch.arange(CONFIG.max_position_embeddings, device="cuda")[:, None] * \
            CONFIG.rotary_of(0).base ** (-torch.arange(0, self.K, 2, device="cuda") / self.K)
        self.cos, self.sin = (torch.cat([f(angle)] * 2, 1).bfloat16() for f in (torch.cos, torch.sin))

    def norm(self, x, name):
        return F.rms_norm(x, (D,), self.w[f"{name}.weight"], CONFIG.norm_epsilon)

    def turn(self, x, start):                               # (B, heads, S, K)
        half, S = self.K // 2, x.shape[2]
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * self.cos[start:start + S] + turned * self.sin[start:start + S]

    def __call__(self, ids, kv=None, start=0):
        local = ids - self.first_id
        table = self.w["embedding.weight"]
        mine = (local >= 0) & (local < len(table))
        x = add_up(F.embedding(local.clamp(0, len(table) - 1), table) * mine[..., None])
        B, S = ids.shape
        for i in range(LAYERS):
            name = f"layers.{i}"
            h = use_everywhere(self.norm(x, f"{name}.attention_norm"))
            q, k, v = (F.linear(h, self.w[f"{name}.attention.{part}.weight"]).view(B, S, -1, self.K).transpose(1, 2)
                       for part in ("query", "key", "value"))
            q, k = self.turn(q, start), self.turn(k, start)
            if kv is not None:
                kv[i][0][:, :, start:start + S], kv[i][1][:, :, start:start + S] = k, v
                k, v = kv[i][0][:, :, :start + S], kv[i][1][:, :, :start + S]
            a = F.scaled_dot_product_attention(q, k, v, is_causal=S > 1)
            a = a.transpose(1, 2).reshape(B, S, -1)
            x = x + add_up(F.linear(a, self.w[f"{name}.attention.out.weight"]))
            h = use_everywhere(self.norm(x, f"{name}.mlp_norm"))
            a = F.silu(F.linear(h, self.w[f"{name}.mlp.gate.weight"])) * F.linear(h, self.w[f"{name}.mlp.up.weight"])
            x = x + add_up(F.linear(a, self.w[f"{name}.mlp.down.weight"]))
        if kv is not None:
            x = x[:, -1]
        return F.linear(use_everywhere(self.norm(x, "final_norm")), self.w["head.weight"])


def rows(rows, groups):
    with groups() as group:
        model = randomise(mpitp.Decoder(group, CONFIG, dtype="bfloat16", seed=None))
        shared = {name: as_torch(w) for name, w in model.weights.items()}
        first_id = model.partition.bounds[group.rank]
        theirs = TorchDecoder(shared, first_id)
        ids = np.random.default_rng(0).integers(0, V, (1, TOKENS + 1))
        tids = torch.as_tensor(ids, device="cuda")
        decode(rows, group, model, theirs, ids, tids)
        if group.size == 1 or distributed.is_initialized():
            train(rows, group, model, shared, first_id, ids, tids)


def decode(rows, group, model, theirs, ids, tids):
    kv = KeyValues(model, 1, CONTEXT + 500)
    model.extend(ids[:, :CONTEXT], kv)
    heads = group.partition(HEADS).lengths[group.rank]
    tkv = [[torch.zeros(1, heads, CONTEXT + 500, D // HEADS, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
           for _ in range(LAYERS)]
    theirs(tids[:, :CONTEXT], tkv)
    token = ids[:, :1]

    def ours():
        kv.set_lengths([CONTEXT])                            # the same token again: the same work
        return model.extend(token, kv)
    first = tids[:, :1]
    cases = {"mpitp": ours, "torch": lambda: theirs(first, tkv, CONTEXT)}
    expected = theirs(first, tkv, CONTEXT)
    if group.size == 1 or distributed.is_initialized():
        cases["torch graph"] = torch_graph(lambda: theirs(first, tkv, CONTEXT))     # of this one position
    if can_record(model, 1):
        copy = KeyValues(model, 1, CONTEXT + 500)
        model.extend(ids[:, :CONTEXT], copy)
        replay = CapturedToken(model, copy)
        if replay(token).tobytes() != ours().tobytes():
            raise SystemExit("found other logits of a recorded token than of a called one")

        def recorded():
            if copy.lengths[0] == CONTEXT + FURTHER:         # not each time: generation does not set lengths
                copy.set_lengths([CONTEXT])
            return replay(token)
        cases["mpitp graph"] = recorded
        chosen_kv = KeyValues(model, 1, CONTEXT + 500)
        model.extend(ids[:, :CONTEXT], chosen_kv)
        choice = CapturedChoice(model, chosen_kv, Choice(model, 1, 0.0, None, None, 0))

        def chosen():
            if chosen_kv.lengths[0] == CONTEXT + FURTHER:
                chosen_kv.set_lengths([CONTEXT])
            return choice(token[:, 0])                  # from the second call on the token before, as in generation
        cases["mpitp choice"] = chosen
    rows.add(f"decoder, {LAYERS} layers of h = {D}, a token after {CONTEXT}, bfloat16", cases,
             bytes_read=model.local_bytes(), check=(ours(), expected, 0.1))


def train(rows, group, model, shared, first_id, ids, tids):
    leaves = {name: w.clone().requires_grad_(True) for name, w in shared.items()}
    theirs, optimizer = TorchDecoder(leaves, first_id), AdamW(model)
    master = [leaf.detach().float() for leaf in leaves.values()]
    torch_optimizer = torch.optim.AdamW(master, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1)
    kept = [None]

    def our_gradients():
        logits, saved = model.forward(ids[:, :-1])
        loss, saved_loss = model.loss(logits, ids[:, 1:])
        kept[0] = model.backward(model.loss_backward(saved_loss), saved, out=kept[0])
        return loss

    def torch_gradients():
        with torch.enable_grad():
            logits = theirs(tids[:, :-1])
            loss = F.cross_entropy(logits[0].float(), tids[0, 1:]) if group.size == 1 else \
                VocabParallelLoss.apply(logits[0].float(), tids[0, 1:], first_id)
            loss.backward()
        return float(loss)

    def ours():
        our_gradients()
        optimizer.step(kept[0], 1e-5, 1)

    def torch_step():
        torch_gradients()
        for slow, leaf in zip(master, leaves.values()):
            slow.grad = leaf.grad.float()
            leaf.grad = None
        torch_optimizer.step()
        for slow, leaf in zip(master, leaves.values()):
            leaf.data.copy_(slow)
    loss, expected = our_gradients(), torch_gradients()
    if abs(loss - expected) > 0.02 * expected:
        raise SystemExit(f"found a loss of {loss}, expected torch's {expected}")
    for name, leaf in leaves.items():
        found = norm_difference(kept[0][name], leaf.grad)
        if found > 0.1:                                     # of bfloat16 through 12 layers
            raise SystemExit(f"{name}: found a gradient that differs by {found:.2g} of its norm from torch's")
        leaf.grad = None
    rows.add(f"decoder, {LAYERS} layers of h = {D}, training step of {TOKENS} tokens, bfloat16",
             {"mpitp": ours, "torch": torch_step})
