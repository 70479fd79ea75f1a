"""The vectors of the fixed tree and docs/fixed_tree.md: mpitp has these bits, and the reader sees who has not."""
import contextlib
import importlib.util
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pages
from groups import group_fixture
from mpitp.comm import tree
from mpitp.sharding.partition import Partition
from spmd import ROOT, draw, same_bytes

FOLDER = ROOT / "examples" / "vectors"
DTYPES = ("float32", "bfloat16", "float16")
SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=150)

group = group_fixture("reproducible")


def load(name):
    found = importlib.util.spec_from_file_location(f"vectors_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


READ = load("read")


def cases(dtype):
    return json.loads((FOLDER / f"{dtype}.json").read_text())["cases"]


def numbers(text):
    return np.array([int(word.replace("nan", "7fc00000"), 16) for word in text.split()], np.uint32).view("f4")


def leaves_of(case):
    return {int(key.split(",")[0]): numbers(text) for key, text in case["nodes"].items() if key.endswith(",1")}


def wrong(function):
    """The cases that the reader finds wrong, by dtype."""
    with np.errstate(all="ignore"):
        return {(dtype, name): text for dtype in DTYPES for dtype, name, _, text in READ.check(function, dtype) if text}


# --- the files ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES)
def test_the_files_are_what_the_script_writes(dtype):
    pytest.importorskip("ml_dtypes")
    assert load("make").text_of(dtype) == (FOLDER / f"{dtype}.json").read_text()


@pytest.mark.host                               # the additions of a GPU make subnormal numbers 0
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_groups_sums_have_these_bits(group, dtype):
    """Over MPI, on the ranks of this run; float32 sums, since CPUs have no others of these."""
    for case in cases(dtype):
        if case["blocks"] != group.blocks:
            continue
        partition = Partition(case["size"], group.size, case["blocks"], case["unit"], case["share"])
        leaves = leaves_of(case)
        total = group.sum(partition, next(iter(leaves.values())).shape, "float32")
        with np.errstate(all="ignore"):
            for block in partition.blocks_of(group.rank):
                total.add(block, leaves[block.index].copy())
            found = total.all_reduce()
        root = case["nodes"][f"0,{tree.root_width(case['blocks'])}"]
        assert READ.bits_of(found) == root, case["name"]
        if str(group.size) in case["ranks"]:
            ranks = case["ranks"][str(group.size)]
            assert [partition.run_bounds, partition.bounds] == [ranks["blocks"], ranks["features"]]
            assert [[list(node) for node in of_rank] for of_rank in tree.nodes_of_ranks(partition)] == ranks["folds"]


def test_inputs_make_the_leaves():
    for dtype, width in (("float32", 32), ("float16", 16)):
        for case in cases(dtype):
            terms = [np.array([int(word.replace("nan", "7e00" if width == 16 else "7fc00000"), 16)
                               for word in row.split()], f"u{width // 8}").view(dtype).astype("f4")
                     for row in case["inputs"]]
            for block, leaf in leaves_of(case).items():
                start, stop = case["block_bounds"][block:block + 2]
                found = terms[start]
                for term in terms[start + 1:stop]:
                    found = found + term
                assert READ.bits_of(found) == READ.bits_of(leaf), (case["name"], block)


# --- the reader --------------------------------------------------------------------------------------------------

def test_the_reader_is_short_and_stands_alone():
    source = (FOLDER / "read.py").read_text()
    assert len(source.splitlines()) <= 60
    assert set(re.findall(r"^(?:import|from) (\w+)", source, re.M)) == {"importlib", "json", "sys", "pathlib", "numpy"}


@pytest.mark.launcher
def test_the_reader_as_a_command(tmp_path):
    (tmp_path / "mine.py").write_text("def add(leaves, blocks, ranks, dtype):\n    return sum(leaves.values()), {}\n")
    command = [sys.executable, FOLDER / "read.py"]
    assert subprocess.run(command, timeout=300, capture_output=True).returncode == 0
    done = subprocess.run([*command, "mine:add"], cwd=tmp_path, timeout=300, capture_output=True, text=True)
    assert done.returncode == 1 and "the sum: found " in done.stdout and "Traceback" not in done.stderr


def test_the_reader_accepts_the_tree():
    assert wrong(READ.tree_sum) == {}


def zeros_for_absent_blocks(leaves, blocks, ranks, dtype):
    shape = next(iter(leaves.values())).shape
    return READ.tree_sum({b: leaves.get(b, np.zeros(shape, "f4")) for b in range(blocks)}, blocks, ranks, dtype)[0], {}


def from_left_to_right(leaves, blocks, ranks, dtype):
    total = None
    for block in sorted(leaves):
        total = leaves[block] if total is None else total + leaves[block]
    return READ.tree_sum({0: total}, 1, ranks, dtype)[0], {}


def one_leaf_a_rank(leaves, blocks, ranks, dtype):
    """What depends on the number of ranks: each adds up its run, then the ranks are added."""
    runs = [[leaves[b] for b in range(blocks * r // ranks, blocks * (r + 1) // ranks) if b in leaves]
            for r in range(ranks)]
    return from_left_to_right(dict(enumerate(sum(run[1:], run[0]) for run in runs if run)), ranks, ranks, dtype)


def cut_off(leaves, blocks, ranks, dtype):
    root, nodes = READ.tree_sum(leaves, blocks, ranks, "float32")
    if dtype == "bfloat16":
        return (root.view(np.uint32) >> 16).astype(np.uint16), nodes
    return root.astype(dtype), nodes


def in_double_precision(leaves, blocks, ranks, dtype):
    wide = {block: leaf.astype(np.float64) for block, leaf in leaves.items()}
    root = READ.tree_sum(wide, blocks, ranks, "float64")[0].astype(np.float32)
    return READ.tree_sum({0: root}, 1, ranks, dtype)[0], {}


@pytest.mark.parametrize("function, names", [
    (zeros_for_absent_blocks, {("float32", "zeros between absent blocks"), ("float16", "zeros between absent blocks")}),
    (from_left_to_right, {("float32", "order"), ("float32", "uneven"), ("float16", "order")}),
    (one_leaf_a_rank, {("float32", "order"), ("bfloat16", "order")}),
    (cut_off, {("bfloat16", "rounding at the root"), ("bfloat16", "even")}),
    (in_double_precision, {("float32", "order"), ("float32", "even"), ("bfloat16", "out of range")}),
])
def test_the_reader_finds_another_sum(function, names):
    assert names <= set(wrong(function))


def test_the_first_wrong_addition_is_named():
    def swapped(leaves, blocks, ranks, dtype):
        result, nodes = READ.tree_sum(leaves, blocks, ranks, dtype)
        return result, {**nodes, **({(2, 2): nodes[2, 2] + np.float32(1)} if (2, 2) in nodes else {})}
    assert wrong(swapped)["float32", "even"].startswith("node (2, 2): found ")


# --- the page ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def page():
    """What the python blocks of the page define."""
    namespace = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in pages.blocks(ROOT / "docs" / "fixed_tree.md"):
            if block.language == "python" and not block.program:
                exec(block.text, namespace)
    return namespace


@SETTINGS
@given(st.integers(0, 60), st.integers(1, 33), st.integers(1, 12), st.sampled_from([1, 2, 4]), st.integers(1, 5))
def test_the_page_cuts_as_the_code_does(page, size, blocks, ranks, unit, share):
    partition = Partition(size * unit, ranks, blocks, unit, share)
    assert page["block_bounds"](size * unit, blocks, unit, share) == partition.block_bounds
    assert page["runs"](blocks, ranks) == partition.run_bounds


@SETTINGS
@given(st.integers(1, 40), st.integers(1, 33), st.integers(0, 10_000))
def test_the_page_adds_as_the_code_does(page, size, blocks, seed):
    partition = Partition(size, 1, blocks)
    leaves = {b: draw(seed + b, 3, dtype=np.float32) for b in range(blocks) if not partition.is_empty(b)}
    known = {(b, 1): leaf.copy() for b, leaf in leaves.items()}
    expected = tree.finish(known, 0, tree.root_width(blocks))
    assert same_bytes(page["fixed_tree"](leaves, blocks), expected)
    assert same_bytes(READ.tree_sum(leaves, blocks, 1, "float32")[0], expected)


def test_the_page_names_every_key_of_the_files():
    text = (ROOT / "docs" / "fixed_tree.md").read_text()
    for dtype in DTYPES:
        for case in cases(dtype):
            assert all(f"`{key}`" in text for key in case if key != "name")
