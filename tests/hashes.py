"""SHA-256 of outputs and gradients in reproducible mode: the same lines for every number of ranks and every MPI.

    mpirun -n P python tests/hashes.py [--device gpu] [--every N] [workers]

On a GPU in its 16-bit types, too. With --every N: each N-th layer and each N-th kind of decoder.
"""
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))

import numpy as np

if sys.argv[1:2] == ["--device"]:           # arrays go there and come back: see devices.py
    import devices
    devices.install(sys.argv[2], "auto")
    del sys.argv[1:3]

import mpitp
from decoder_cases import KINDS, config
from mpitp.arrays import HALF_DTYPES, compute_dtype

EVERY = 1
if sys.argv[1:2] == ["--every"]:
    EVERY = int(sys.argv[2])
    del sys.argv[1:3]

CASES = [       # tokens, hidden, ffn, activation, gated, blocks
    (64, 96, 384, "gelu_tanh", False, 8), (1, 96, 384, "gelu_tanh", False, 8), (17, 33, 131, "gelu", True, 8),
    (1, 64, 257, "silu", True, 8), (3, 5, 3, "relu", False, 8), (2, 7, 13, "silu", True, 5), (0, 4, 9, "relu", True, 8),
    (7, 1, 8, "gelu_tanh", False, 8), (2, 3, 1, "identity", True, 8), (5, 40, 64, "gelu_tanh", False, 3),
    (64, 130, 520, "relu", True, 32), (1, 15, 26, "gelu", True, 8), (1, 24, 48, "silu", False, 8),
    (33, 9, 56, "relu", False, 8),
]


def main(workers=None):
    for tokens, hidden, ffn, activation, gated, blocks in CASES[::EVERY]:
        with mpitp.TensorParallelGroup(reproducible=True, blocks=blocks, check=True) as group:
            if workers:
                group.workers.count = workers
            for name in ("float32", "float64", *of_device(group)):
                dtype = compute_dtype(name, group.device)
                layer = mpitp.ParallelMLP(group, hidden, ffn, activation, gated, dtype=dtype, seed=None)
                draw = np.random.default_rng(1).standard_normal
                layer.load_dense({name: np.asfortranarray(draw(spec.shape)) for name, spec in layer.specs.items()})
                dense = group.comm.bcast(layer.gather())
                layer = mpitp.ParallelMLP(group, hidden, ffn, activation, gated, dtype=dtype, seed=None)
                layer.load_dense(dense)                 # after a save and a load
                x, dy = draw((tokens, hidden)).astype(dtype), draw((tokens, hidden)).astype(dtype)
                y, saved = layer.forward(x)
                dx, gradients = layer.backward(dy, saved)
                column = mpitp.ColumnParallelLinear(group, hidden, ffn, gather_output=True, dtype=dtype, name="c")
                row = mpitp.RowParallelLinear(group, ffn, hidden, input_is_parallel=False, dtype=dtype, name="r")
                h, saved_column = column.forward(x)
                z, saved_row = row.forward(h)
                dh, row_gradients = row.backward(dy, saved_row)
                dx2, column_gradients = column.backward(dh, saved_column)
                found = {"y": y, "dx": dx, "z": z, "dh": dh, "dx2": dx2}
                for of_layer, split in ((layer, gradients), (row, row_gradients), (column, column_gradients)):
                    found.update(of_layer.gather(split) or {})
                show(group, (tokens, hidden, ffn, activation, gated, blocks, name), found)
    for kind in list(KINDS)[::EVERY]:
        for blocks, dtype in ((8, "float32"), (3, "float64")):
            with mpitp.TensorParallelGroup(reproducible=True, blocks=blocks, check=True) as group:
                if workers:
                    group.workers.count = workers
                decoder(group, kind, dtype)
                for half in of_device(group):
                    decoder(group, kind, half)


def of_device(group):
    return HALF_DTYPES if group.device == "gpu" else ()


def decoder(group, kind, dtype):
    """Two steps of plain gradient descent with dropout and label smoothing, so that every gradient comes back in."""
    model = mpitp.Decoder(group, config(kind, hidden_dropout=0.1, attention_dropout=0.2), dtype=dtype, seed=3)
    draw = np.random.default_rng(2)
    gradients = None
    for step in range(2):
        ids = draw.integers(0, 27, (2, 71))             # more than one tile of queries
        mask = draw.random((2, 71)) < 0.9
        ids = ids[:, :9] if kind == "gpt2" else ids
        mask = mask[:, :ids.shape[1]]
        logits, saved = model.forward(ids, mask=mask, step=step)
        loss, saved_loss = model.loss(logits, ids, label_smoothing=0.1, ignore_index=5)
        gradients = model.backward(model.loss_backward(saved_loss), saved, out=gradients)
        for name, weight in model.weights.items():
            weight[...] = weight.astype(gradients[name].dtype) - group.xp.asarray(gradients[name])
    found = {"logits": model.gather_logits(logits), "loss": np.float64(loss)}
    found.update(model.gather() or {})
    assert all(np.isfinite(value).all() for value in found.values())
    show(group, (kind, group.blocks, dtype), found)


def show(group, case, found):
    if group.rank == 0:
        for name, value in found.items():
            digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
            print(*case, name, digest)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
