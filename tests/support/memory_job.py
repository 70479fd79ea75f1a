"""Peak memory of a rank for a 4096 -> 16384 -> 4096 block, above its start; run by test_memory.py on 4 ranks."""
import tracemalloc

import numpy as np

import mpitp

TOKENS, D, F = 64, 4096, 16384


def main():
    with mpitp.TensorParallelGroup() as group:
        import numpy.random                             # noqa: F401 (imports are not the layer's memory)
        x = np.ones((TOKENS, D), "f")
        dy = np.ones((TOKENS, D), "f")
        tracemalloc.start()
        base = tracemalloc.get_traced_memory()[0]

        def peak():
            value = tracemalloc.get_traced_memory()[1] - base
            tracemalloc.reset_peak()
            return value

        layer = mpitp.ParallelMLP(group, D, F, bias=False)
        created = peak()
        y, saved = layer.forward(x)
        forward = peak()
        layer.backward(dy, saved)
        backward = peak()
        slices = 4 * 2 * D * F // group.size
        kept = 4 * 2 * TOKENS * F // group.size         # the activation and its derivative
        one = 4 * TOKENS * D                            # y, or dx
        assert layer.local_bytes() == slices
        limits = {"creation": (created, slices), "forward": (forward, slices + kept + one),
                  # gradients are as large as the slices; da is as large as an activation
                  "backward": (backward, 2 * slices + kept + kept // 2 + 2 * one)}
        for what, (found, expected) in limits.items():
            print(f"rank {group.rank} {what}: {found / 2**20:.1f} MiB of {expected / 2**20:.1f}", flush=True)
            assert expected * 0.9 < found <= expected * 1.2, (what, found, expected)


if __name__ == "__main__":
    main()
