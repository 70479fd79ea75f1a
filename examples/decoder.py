"""A whole decoder in one's own MPI program: it learns to say the alphabet, each rank with its part of every matrix.

    OMP_NUM_THREADS=1 mpirun -n 2 python examples/decoder.py
"""
import numpy as np

import mpitp
from mpitp.training.optimizer import AdamW

with mpitp.TensorParallelGroup(reproducible=True) as group:     # the same digits on any number of ranks
    config = mpitp.DecoderConfig(vocab_size=27, hidden_size=40, num_layers=2, num_attention_heads=5, num_query_groups=1,
                                 normalization="rmsnorm", activation="silu", gated=True)
    model = mpitp.Decoder(group, config)
    optimizer, gradients = AdamW(model), None
    ids = (np.arange(16)[:, None] + np.arange(12)) % 27         # the same on every rank
    for step in range(1, 61):
        logits, saved = model.forward(ids[:, :-1])              # each rank has the logits of its part of the vocabulary
        loss, saved_loss = model.loss(logits, ids[:, 1:])
        gradients = model.backward(model.loss_backward(saved_loss), saved, out=gradients)
        optimizer.step(gradients, lr=0.01, t=step)
        if group.rank == 0 and step % 20 == 0:
            print(f"step {step:2d}  loss {loss:.6f}")
    text = [ids[0, :3], *mpitp.generate(model, ids[:1, :3], max_new_tokens=9)]
    if group.rank == 0:
        print("".join(chr(97 + i) for i in np.concatenate(text)))
