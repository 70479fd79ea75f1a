"""Check another implementation of the fixed tree, bit by bit, with the vectors beside this file. NumPy alone; MIT.

    python examples/vectors/read.py [MODULE:FUNCTION]       without one, tree_sum below is checked

FUNCTION(leaves, blocks, ranks, dtype), leaves = {block: float32 array} without the empty blocks, returns the sum in
`dtype` ("bfloat16" as uint16), and {(first leaf, width): float32 array} of the nodes that it had, or {}.
"""
import importlib
import json
import sys
from pathlib import Path

import numpy as np


def tree_sum(leaves, blocks, ranks, dtype):
    """The sum of docs/fixed_tree.md, which is the same for any number of ranks."""
    nodes, width = {(block, 1): leaf for block, leaf in leaves.items()}, 1
    while width < blocks:
        for first in range(0, blocks, 2 * width):
            children = [nodes[key] for key in ((first, width), (first + width, width)) if key in nodes]
            if children:
                nodes[first, 2 * width] = children[0] if len(children) == 1 else children[0] + children[1]
        width *= 2
    root = nodes[0, width]
    if dtype != "bfloat16":
        return root.astype(dtype), nodes
    bits = root.view(np.uint32).astype(np.uint64)       # the upper half, to nearest, ties to even
    return np.where(np.isnan(root), 0x7fc0, (bits + 0x7fff + (bits >> 16 & 1)) >> 16).astype(np.uint16), nodes


def bits_of(array):
    """Return the hexadecimal digits of each number as the files have them, of every NaN 'nan'."""
    words = array.view(f"u{array.itemsize}")
    is_nan = (words & 0x7fff) > 0x7f80 if array.dtype == np.uint16 else np.isnan(array.astype(np.float32))
    return " ".join("nan" if nan else f"{word:0{2 * array.itemsize}x}" for word, nan in zip(words, is_nan))


def check(function, dtype):
    """Yield (dtype, case, ranks, what is wrong or None) for every case in the file of a dtype."""
    for case in json.loads((Path(__file__).parent / f"{dtype}.json").read_text())["cases"]:
        expected = {tuple(map(int, key.split(","))): text for key, text in case["nodes"].items()}
        bits = {n[0]: text.replace("nan", "7fc00000").split() for n, text in expected.items() if n[1] == 1}
        for ranks in map(int, case["ranks"]):
            leaves = {block: np.array([int(x, 16) for x in row], np.uint32).view("f4") for block, row in bits.items()}
            result, nodes = function(leaves, case["blocks"], ranks, dtype)
            pairs = [(f"node {node}", bits_of(nodes[node]), expected.get(node)) for node in sorted(nodes)]
            wrong = [pair for pair in [*pairs, ("the sum", bits_of(result), case["result"])] if pair[1] != pair[2]]
            yield dtype, case["name"], ranks, wrong and "{}: found {}, expected {}".format(*wrong[0])


if __name__ == "__main__":
    sys.path.insert(0, ".")
    module, name = sys.argv[1].split(":") if len(sys.argv) > 1 else ("__main__", "tree_sum")
    yours = getattr(importlib.import_module(module), name)
    with np.errstate(all="ignore"):
        checks = [one for dtype in ("float32", "bfloat16", "float16") for one in check(yours, dtype)]
    bad = [f"{dtype}, {case}, {ranks} ranks: {wrong}" for dtype, case, ranks, wrong in checks if wrong]
    print(*bad, f"{len(checks) - len(bad)} of {len(checks)} sums have the bits of the tree", sep="\n")
    sys.exit(bool(bad))
