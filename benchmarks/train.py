"""A whole training step against the same model in torch eager on all cores: interleaved in one run.

    pip install '.[mpi,plot,threads]' torch
    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE mpirun -n 2 python benchmarks/train.py [--rounds 9] [--out FOLDER]

Forward, loss, backward, clipping and AdamW of a decoder of Llama's kind (RMS norm, rotary, gated SiLU, no biases),
float32, vocabulary 256. A time is the slowest rank's. Rows:
  mpitp          Trainer.train_step over the ranks; reproducible: with the same bits for any number of them, for one cut
                 into micro-batches (reproducible_unit="micro-batch"); any cut: for every cut and every grid
  torch eager    one process with all the cores, while the other ranks sleep; torch.optim.AdamW as it comes
  torch fused    the same with AdamW(fused=True)
  AdamW          the optimizer alone, of each: torch's fused one is one compiled loop, NumPy's a dozen
"""
import argparse
import sys

import common                                       # before NumPy

import numpy as np
import torch
import torch.nn.functional as functional

import mpitp
from mpitp import measure
from mpitp.comm.guard import guarded
from mpitp.ops.rotary import rotary_tables
from mpitp.training.data import Tokens
from mpitp.training.loop import Settings, Trainer

LR, CLIP = 1e-3, 1.0
KINDS = {"step": "torch eager step", "AdamW": "torch eager AdamW"}


class TorchDecoder:
    """The same decoder by torch's functions, from the weights of a Decoder on one rank."""

    def __init__(self, model, seq_length):
        self.config, self.w = model.config, {name: torch.from_numpy(w.copy()).requires_grad_()
                                             for name, w in model.weights.items()}
        cos, sin = rotary_tables(self.config.rotary_of(0), self.config.head_dim, range(seq_length), np.float32)
        self.cos, self.sin = (torch.from_numpy(np.concatenate([table, table], 1)) for table in (cos, sin))

    def norm(self, x, name):
        return functional.rms_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.config.norm_epsilon)

    def turned(self, x):
        half = x.shape[-1] // 2
        return x * self.cos + torch.cat((-x[..., half:], x[..., :half]), -1) * self.sin

    def loss(self, ids, targets):
        w, linear = self.w, functional.linear
        x = functional.embedding(ids, w["embedding.weight"])
        for i in range(self.config.num_layers):
            at = f"layers.{i}."
            h = self.norm(x, f"{at}attention_norm")
            q, k, v = (linear(h, w[f"{at}attention.{part}.weight"]).view(*ids.shape, -1, self.config.head_dim)
                       .transpose(1, 2) for part in ("query", "key", "value"))
            a = functional.scaled_dot_product_attention(self.turned(q), self.turned(k), v, is_causal=True)
            x = x + linear(a.transpose(1, 2).flatten(2), w[f"{at}attention.out.weight"])
            h = self.norm(x, f"{at}mlp_norm")
            a = functional.silu(linear(h, w[f"{at}mlp.gate.weight"])) * linear(h, w[f"{at}mlp.up.weight"])
            x = x + linear(a, w[f"{at}mlp.down.weight"])
        logits = linear(self.norm(x, "final_norm"), w["head.weight"])
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def torch_cases(model, tokens, batch, name, **how):
    decoder = TorchDecoder(model, tokens.seq_length)
    parameters = list(decoder.w.values())
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), weight_decay=0.1, **how)

    def step():
        ids, targets = map(torch.from_numpy, tokens.batch(0, batch))
        optimizer.zero_grad()
        loss = decoder.loss(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        return loss
    return {f"{name} step": step, f"{name} AdamW": optimizer.step}


def mpitp_cases(group, config, tokens, batch, name, unit="micro-batch"):
    trainer = Trainer(group, config, tokens, Settings(micro_batch_size=batch, train_iters=1 << 30, lr=LR, warmup=0,
                                                      clip_grad=CLIP, reproducible_unit=unit))
    loss = trainer.train_step()["loss"]
    trainer.step = 0
    return {f"{name} step": trainer.train_step,
            f"{name} AdamW": lambda: trainer.optimizer.step(trainer.gradients, LR, 10)}, loss


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--out", metavar="FOLDER")
    arguments = parser.parse_args()
    hidden, batch = arguments.hidden_size, arguments.micro_batch_size
    config = mpitp.DecoderConfig(256, hidden, arguments.num_layers, 8, ffn_hidden_size=-(-hidden * 8 // 3), gated=True,
                                 activation="silu", normalization="rmsnorm", qkv_bias=False, attention_bias=False,
                                 mlp_bias=False)
    torch.set_num_threads(common.SHARE)
    with mpitp.TensorParallelGroup() as group, mpitp.TensorParallelGroup(reproducible=True) as fixed:
        with common.blas_threads(common.SHARE), group.subgroup(group.rank) as single:
            tokens = Tokens(None, 256, arguments.seq_length, 0)
            cases, loss = mpitp_cases(group, config, tokens, batch, "mpitp")
            cases |= mpitp_cases(fixed, config, tokens, batch, "reproducible")[0]
            cases["any cut step"] = mpitp_cases(fixed, config, tokens, batch, "any cut", "sequence")[0]["any cut step"]
            whole = mpitp.Decoder(single, config)
            of_torch = torch_cases(whole, tokens, batch, "torch eager")
            found = torch_cases(whole, tokens, batch, "check")["check step"]().item()
            if abs(found - loss) > 1e-4:
                raise RuntimeError(f"torch's loss is {found}, mpitp's {loss}")
            cases |= common.alone(group.comm, of_torch | torch_cases(whole, tokens, batch, "torch fused", fused=True))
            cases["pause"] = common.pause
            seconds = measure.interleave(group, cases, arguments.rounds, 5e-2)
        if group.rank == 0:
            found = common.summary("mpitp.benchmark.train/1", seconds, KINDS, group, arguments.rounds,
                                   base="torch eager", hidden_size=hidden, layers=config.num_layers, heads=8,
                                   batch=batch, seq_length=arguments.seq_length)
            title = f"training step, h = {hidden}, {config.num_layers} layers, {batch} x {arguments.seq_length} tokens"
            common.show(found, title, "torch eager")
            if arguments.out:
                common.save(found, arguments.out, f"train-h{hidden}-n{group.size}", title, KINDS)


if __name__ == "__main__":
    sys.exit(guarded(main))
