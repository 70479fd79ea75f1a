"""SHA-256 of outputs and gradients in reproducible mode: the same lines for every number of ranks and every MPI.

    mpirun -n P python tests/hashes.py
"""
import hashlib
import sys

import numpy as np

import mpitp

CASES = [       # tokens, hidden, ffn, activation, gated, blocks
    (64, 96, 384, "gelu_tanh", False, 8), (1, 96, 384, "gelu_tanh", False, 8), (17, 33, 131, "gelu", True, 8),
    (1, 64, 257, "silu", True, 8), (3, 5, 3, "relu", False, 8), (2, 7, 13, "silu", True, 5), (0, 4, 9, "relu", True, 8),
    (7, 1, 8, "gelu_tanh", False, 8), (2, 3, 1, "identity", True, 8), (5, 40, 64, "gelu_tanh", False, 3),
    (64, 130, 520, "relu", True, 32), (1, 15, 26, "gelu", True, 8), (1, 24, 48, "silu", False, 8),
    (33, 9, 56, "relu", False, 8),
]


def main(workers=None):
    for tokens, hidden, ffn, activation, gated, blocks in CASES:
        with mpitp.TensorParallelGroup(reproducible=True, blocks=blocks, check=True) as group:
            if workers:
                group._workers.count = workers
            for dtype in ("float32", "float64"):
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
                if group.rank == 0:
                    for name, value in found.items():
                        digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
                        print(tokens, hidden, ffn, activation, gated, blocks, dtype, name, digest)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
