"""Write the test vectors of the fixed tree: float32.json, bfloat16.json, float16.json, beside this file.

    python examples/vectors/make.py

The numbers are made of integers alone, so every machine writes the same files. The sums are those of
mpitp.comm.tree, rank by rank, without MPI. docs/fixed_tree.md says what is in the files.
"""
import json
from pathlib import Path

import ml_dtypes
import numpy as np

from mpitp.comm import tree
from mpitp.sharding.partition import Partition

HERE = Path(__file__).resolve().parent
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
RANKS = (1, 2, 3, 4, 8)
ELEMENTS = 5                            # of every array that is summed

# name: (features, blocks, features that stay together, query heads that share them)
CUTS = {
    "even": (16, 8, 1, 1),
    "uneven": (41, 8, 1, 1),
    "absent blocks": (3, 8, 1, 1),
    "one feature": (1, 8, 1, 1),
    "five blocks": (23, 5, 1, 1),
    "twelve blocks": (30, 12, 1, 1),
    "heads": (24, 8, 4, 1),
    "shared heads": (8, 8, 4, 3),
}


def word(case: str, feature: int, element: int) -> int:
    """Return 32 bits that depend on all three: FNV-1a, then the finisher of MurmurHash3."""
    h = 2166136261
    for byte in f"{case} {feature} {element}".encode():
        h = (h ^ byte) * 16777619 % 2**32
    h = (h ^ h >> 16) * 0x85ebca6b % 2**32
    h = (h ^ h >> 13) * 0xc2b2ae35 % 2**32
    return h ^ h >> 16


def number(case: str, feature: int, element: int) -> float:
    """Return a number of either sign with 11 significant bits, between 2^-12 and 2^4: exact in float32 and float16."""
    bits = word(case, feature, element)
    return (-1) ** (bits & 1) * (1024 + (bits >> 1) % 1024) / 1024 * 2.0 ** ((bits >> 16) % 16 - 12)


def special(dtype: str) -> dict[str, list]:
    """Return cases of eight blocks of one feature: [of each block, of each element] numbers, or None for all of it."""
    tiny = {"float32": 2.0**-149, "bfloat16": 2.0**-133, "float16": 2.0**-24}[dtype]
    half = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]       # half an ulp of 1
    big = {"float32": 2.0**127, "bfloat16": 2.0**127, "float16": 49152.0}[dtype]
    large, small = (2.0**12, 2.0**-12) if dtype == "float16" else (2.0**24, 1.0)        # large + small is large
    inf, nan, none = float("inf"), float("nan"), [0.0] * 8
    columns = {
        "zeros": [[-0.0] * 8, [-0.0] * 7 + [0.0], [0.0] + [-0.0] * 7, [1.0, -1.0] + [-0.0] * 6, [-1.0, 1.0] * 4],
        "not finite": [[nan] + [1.0] * 7, [inf] + [1.0] * 7, [inf] + [1.0] * 6 + [-inf], [1.0] * 7 + [nan],
                       [-inf, -inf] + none[2:]],
        "order": [[large, small] * 2 + [-large, small] * 2, [small, large] * 2 + [small, -large] * 2,
                  [large] + [small] * 6 + [-large], [small] * 6 + [large, -large],
                  [3 * small, large, small, -large] + none[4:]],
        "rounding at the root": [[1.0, half] + none[2:], [1.0, half] + none[2:7] + [half / 64],
                                 [1.0] + [half / 4] * 4 + none[5:], [1.0, 2 * half, half] + none[3:],
                                 [-1.0, -half] + none[2:6] + [-half / 64] * 2],
        "out of range": [[big, -big] * 4, [big, big, -big, -big] + none[4:], [big] * 2 + none[2:],
                         [-big] * 4 + none[4:], [big, tiny] + none[2:]],
        "subnormal": [[tiny] * 8, [tiny, -tiny] + none[2:], [tiny * 1024, tiny] + none[2:], [-tiny] * 3 + none[3:],
                      [tiny] + none[1:]],
    }
    return {name: np.array(of_element, dtype=np.float64).T.tolist() for name, of_element in columns.items()}


def hexadecimal(array: np.ndarray) -> str:
    """Return the bits of each number; every NaN as 'nan', since its other bits are the machine's."""
    bits = array.view(f"u{array.itemsize}")
    return " ".join("nan" if np.isnan(x) else f"{b:0{2 * array.itemsize}x}" for x, b in zip(array, bits))


def leaves_of(terms: np.ndarray, bounds: list[int]) -> dict[int, np.ndarray]:
    """Return {block: the sum of its features' terms, one after the other, in float32}; no entry for an empty block."""
    leaves = {}
    for block, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        if start < stop:
            leaf = terms[start].astype(np.float32)
            for term in terms[start + 1:stop]:
                leaf += term.astype(np.float32)
            leaves[block] = leaf
    return leaves


def nodes_of(leaves: dict[int, np.ndarray], blocks: int) -> dict[tree.Node, np.ndarray]:
    """Return every node of the tree that is not absent, leaves and root among them."""
    nodes: dict[tree.Node, np.ndarray] = {}
    width = 1
    while width <= tree.root_width(blocks):
        for first in range(0, tree.root_width(blocks), width):
            known = {(block, 1): leaf.copy() for block, leaf in leaves.items()}
            value = tree.finish(known, first, width)
            if value is not None:
                nodes[first, width] = value
        width *= 2
    return nodes


def on_ranks(leaves: dict[int, np.ndarray], partition: Partition) -> np.ndarray:
    """Return the sum as the ranks of mpitp compute it: each folds its own leaves, then the tree is finished."""
    known = {}
    for rank in range(partition.ranks):
        fold = tree.Fold(partition, rank)
        for block in partition.blocks_of(rank):
            fold.add(block.index, leaves[block.index].copy())
        known.update({node: value.copy() for node, value in fold.known.items()})
    return tree.finish(known, 0, tree.root_width(partition.blocks))


def case_of(name: str, terms: np.ndarray, cut: tuple[int, int, int, int], dtype: str) -> dict:
    """Return one case as it stands in the file."""
    size, blocks, unit, share = cut
    whole = Partition(size, 1, blocks, unit, share)
    leaves = leaves_of(terms, whole.block_bounds)
    nodes = nodes_of(leaves, blocks)
    result = nodes[0, tree.root_width(blocks)].astype(DTYPES[dtype])
    ranks = {}
    for count in RANKS:
        partition = Partition(size, count, blocks, unit, share)
        assert hexadecimal(on_ranks(leaves, partition).astype(DTYPES[dtype])) == hexadecimal(result)
        ranks[str(count)] = {"blocks": partition.run_bounds, "features": partition.bounds,
                             "folds": [[list(node) for node in of_rank] for of_rank in tree.nodes_of_ranks(partition)]}
    return {"name": name, "size": size, "blocks": blocks, "unit": unit, "share": share,
            "block_bounds": whole.block_bounds, "inputs": [hexadecimal(row) for row in terms],
            "nodes": {f"{first},{width}": hexadecimal(value) for (first, width), value in nodes.items()},
            "result": hexadecimal(result), "ranks": ranks}


def vectors(dtype: str) -> dict:
    """Return what the file of a dtype holds."""
    cases = []
    with np.errstate(all="ignore"):
        for name, cut in CUTS.items():
            terms = np.array([[number(name, i, j) for j in range(ELEMENTS)] for i in range(cut[0])])
            cases.append(case_of(name, terms.astype(DTYPES[dtype]), cut, dtype))
        for name, terms in special(dtype).items():
            cases.append(case_of(name, np.array(terms).astype(DTYPES[dtype]), (8, 8, 1, 1), dtype))
        zeros = np.full((3, ELEMENTS), -0.0).astype(DTYPES[dtype])          # a zero for an absent block would show
        cases.append(case_of("zeros between absent blocks", zeros, (3, 8, 1, 1), dtype))
    return {"schema": "mpitp.fixed_tree/1", "license": "MIT", "dtype": dtype, "sum_dtype": "float32", "cases": cases}


def text_of(dtype: str) -> str:
    """Return the file of a dtype: one line for each entry of a case."""
    found = vectors(dtype)
    cases = [",\n  ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in case.items())
             for case in found.pop("cases")]
    head = json.dumps(found)[1:-1]
    return "{" + head + ', "cases": [\n {' + "},\n {".join(cases) + "}\n]}\n"


if __name__ == "__main__":
    for one in DTYPES:
        (HERE / f"{one}.json").write_text(text_of(one), encoding="utf-8")
