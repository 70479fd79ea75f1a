"""The plan against what runs: what stays to the byte, the peak within 2%, messages as the ledger counts them."""
import argparse
import dataclasses
import gc
import json
import math
import re
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

import make_tiny_checkpoints as tiny
import mpitp
import stand_in
from decoder_cases import KINDS, NEWER_KINDS, config
from mpitp.checkpoints import room
from mpitp.comm import launch
from mpitp.commands import Parser, ask_plan, bench
from mpitp.commands import plan as plan_command
from mpitp.commands.bench_calibrate import run_calibration
from mpitp.errors import InputError
from mpitp.inference.kv import KeyValues
from mpitp.measure import timed_cases
from mpitp.measure.calibrate import Calibration
from mpitp.measure.calibrate_in_use import in_use, sums, without_sums
from mpitp.measure.calibrate_python import calibrate
from mpitp.measure.timed_cases import Sizes
from mpitp.ops.greatest import greatest_of_rank
from mpitp.plan import messages, outcome, tensors
from mpitp.plan.job import Job, Layout, pieces
from mpitp.plan.machine import LARGE_ARRAY, SMALL_ARRAY, Grid, Link, Machine, Tables
from mpitp.plan.machine_file import calibrated_here, read_machine, write_machine
from mpitp.plan.machines import MACHINES
from mpitp.plan.work import Item, work, working_bytes
from mpitp.training.data import Tokens
from mpitp.training.loop import Settings, Trainer
from spmd import everywhere, job, job_environment

ALL_KINDS = {**KINDS, **NEWER_KINDS}
LLAMA = dict(vocab_size=256, hidden_size=256, num_layers=2, num_attention_heads=8, num_query_groups=4,
             ffn_hidden_size=704, activation="silu", gated=True, normalization="rmsnorm", qkv_bias=False,
             attention_bias=False, mlp_bias=False)
OF_MEMORY = {
    "llama": LLAMA,
    "gpt": dict(LLAMA, gated=False, activation="gelu_tanh", normalization="layernorm", mlp_bias=True, qkv_bias=True,
                attention_bias=True, position_embedding="learned", max_position_embeddings=300, num_query_groups=8),
    "tied, norms around": dict(LLAMA, vocab_size=2048, tie_word_embeddings=True, norm_placement="both", qk_norm=True,
                               hidden_dropout=0.1),
    "side by side": dict(LLAMA, parallel_residual=True, gated=False, qk_norm=True),
}

MODES = {"rows": dict(sequence_parallel=True), "gathered again": dict(sequence_parallel=True, gather_again=True),
         "block": dict(recompute="block"), "attention": dict(recompute="attention"),
         "rows, block": dict(sequence_parallel=True, recompute="block"),
         "gathered again, attention": dict(sequence_parallel=True, gather_again=True, recompute="attention")}
OF_MODES = (*(("llama, one kv head", mode) for mode in MODES), ("gemma3", "rows, block"),
            ("neox with query norm", "rows"), ("neox with query norm", "block"),
            ("neox with query norm", "gathered again, attention"),
            ("olmo2, over all heads", "gathered again, attention"))


def layout_of(group):
    return Layout(group.size, 1, group.blocks if group.reproducible else None)


def planned(plan, layout, rank):
    """{(kind, name): (shape, bytes)} of every array that stays."""
    return {(t.kind, t.name): (t.shape, t.nbytes) for t in tensors.persistent(plan, layout, rank)}


def found(**arrays):
    return {(kind, name): (array.shape, array.nbytes) for kind, named in arrays.items()
            for name, array in named.items()}


@pytest.mark.parametrize("kind, mode", [*((kind, "whole") for kind in ALL_KINDS), *OF_MODES])
def test_training_keeps_and_sends_what_the_plan_names(group, kind, mode, tmp_path):
    (tmp_path / "text").write_bytes(bytes(i * i % 27 for i in range(300)))
    made = Trainer(group, config(kind), Tokens(tmp_path / "text", 27, 7, 0),
                   Settings(micro_batch_size=2, gradient_accumulation=2, label_smoothing=0.1, **MODES.get(mode, {})))
    group.ledger.clear()
    made.train_step()
    plan, layout = Job(config(kind), "train", 2, 7, accumulation=2, label_smoothing=0.1, **MODES.get(mode, {})), \
        layout_of(group)
    optimizer, attentions = made.optimizer, {block.attention.name: block.attention for block in made.model.blocks}
    expected = found(weights=made.model.weights, exp_avg=optimizer.exp_avg, exp_avg_sq=optimizer.exp_avg_sq,
                     cos={name: a.tables[0] for name, a in attentions.items() if a.rotary},
                     sin={name: a.tables[1] for name, a in attentions.items() if a.rotary},
                     slopes={name: a.slopes for name, a in attentions.items() if a.slopes is not None})
    of_plan = planned(plan, layout, group.rank)
    assert everywhere({key: of for key, of in of_plan.items() if "gradients" not in key[0]} == expected)
    flats = made.sum.flats if group.reproducible else [made.sum.total, made.sum.more]
    for kind_of, flat in zip(("gradients", "more gradients", "more gradients 2"), flats):       # each in one array
        of_kind = {name: of for (kind, name), of in of_plan.items() if kind == kind_of}
        assert everywhere({name: shape for name, (shape, _) in of_kind.items()} ==
                          {name: view.shape for name, view in flat.named.items()})
        assert everywhere(sum(nbytes for _, nbytes in of_kind.values()) == flat.array.nbytes)
    assert len(flats) == len({kind for kind, _ in of_plan if "gradients" in kind})
    of_ranks = tensors.bytes_of_ranks(plan, layout)
    assert everywhere(sum(sizes[group.rank] for sizes in of_ranks.values()) == sum(n for _, n in of_plan.values()))
    step = messages.messages(plan, layout, "step", group.rank)
    assert everywhere(messages.counts(step) == group.ledger.counts())
    if not group.reproducible:                      # where the tree may send more
        assert everywhere(abs(messages.totals(step)[1] - group.ledger.wire_bytes()) <= len(group.ledger.data))


@pytest.mark.parametrize("batch, accumulation, mode", [(4, 3, "whole"), (3, 1, "rows, block"), (1, 1, "whole")])
def test_a_grid(world, batch, accumulation, mode, tmp_path):
    """Each data rank has its part of the global batch; what the data group sums is in its own ledger."""
    (tmp_path / "text").write_bytes(bytes(i * i % 27 for i in range(300)))
    data = 2 if world.size % 2 == 0 else world.size
    with mpitp.Grid(data=data) as grid:
        options = MODES.get(mode, {})
        made = Trainer(grid, config("llama, one kv head"), Tokens(tmp_path / "text", 27, 7, 0),
                       Settings(micro_batch_size=batch, gradient_accumulation=accumulation, **options))
        grid.tensor.ledger.clear()
        made.train_step()
        plan = Job(made.config, "train", batch, 7, accumulation=accumulation, **options)
        layout, rank = Layout(grid.tensor.size, data), grid.tensor.rank
        sizes = [piece.stop - piece.start for piece in made.dealing.pieces]
        of_data = grid.data.comm.allgather(sizes)
        assert pieces(plan, layout) == max(of_data, key=lambda sizes: (sum(sizes), len(sizes)))
        found = messages.messages(plan, layout, "step", rank)
        if data > 1:
            assert everywhere(messages.counts(found, "data") == grid.data.ledger.counts() == made.sum.collectives())
        if sizes == pieces(plan, layout):
            assert messages.counts(found) == grid.tensor.ledger.counts()
            assert tensors.bytes_of_ranks(plan, layout)["gradients"][rank] == made.sum.total.array.nbytes


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_generation_keeps_what_the_plan_names(group, kind):
    model = mpitp.Decoder(group, config(kind))
    plan, layout = Job(config(kind), "decode", 2, 5, 3), layout_of(group)
    kv = KeyValues(model, 2, 7)
    assert plan.positions == 7
    layers = {block.attention.name: of for block, of in zip(model.blocks, kv.layers)}
    units = [list(of.units.values()) for of in layers.values()]
    assert everywhere({key: n for key, (_, n) in planned(plan, layout, group.rank).items()} == {
        **{("weights", name): w.nbytes for name, w in model.weights.items()},
        **{(part, name): sum(unit[i].nbytes for unit in of) for name, of in zip(layers, units)
           for i, part in enumerate(("keys", "values"))},
        **{(part, name): of.tables[i].nbytes for name, of in layers.items() for i, part in enumerate(("cos", "sin"))
           if of.tables},
        **{("slopes", block.attention.name): block.attention.slopes.nbytes for block in model.blocks
           if block.attention.slopes is not None}})
    for phase, ids in (("prefill", np.ones((2, 5), int)), ("token", np.ones((2, 1), int))):
        group.ledger.clear()
        best = greatest_of_rank(model.extend(ids, kv), 0)[None]
        group.all_gather(best, mpitp.Partition(group.size, group.size, group.size), axis=0)
        assert everywhere(messages.counts(messages.messages(plan, layout, phase)) == group.ledger.counts())


def traced_peak(make, run):
    """What run(make()) has at most of memory, in bytes, without what it imports the first time."""
    run(make())
    gc.collect()
    tracemalloc.start()
    try:
        made = make()
        run(made)
        tracemalloc.reset_peak()
        run(made)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind, mode", [*((kind, "whole") for kind in OF_MEMORY), *(("llama", mode) for mode in MODES),
                                        ("side by side", "gathered again"), ("side by side", "rows, block"),
                                        ("tied, norms around", "gathered again, attention")])
def test_the_peak_of_training(world, kind, mode):
    if world.size > 1 and kind not in ("llama", "side by side"):
        pytest.skip("the others say no more on several ranks")
    if world.size == 1 and mode in MODES and kind == "llama" and "recompute" not in MODES[mode]:
        pytest.skip("one rank has all rows")
    options = MODES.get(mode, {})
    with mpitp.TensorParallelGroup() as group:
        plan = Job(mpitp.DecoderConfig(**OF_MEMORY[kind]), "train", 4, 256, **options)
        tokens = Tokens(None, 256, 256, 0)
        tokens.vocab_size = plan.config.vocab_size
        peak = traced_peak(lambda: Trainer(group, plan.config, tokens, Settings(micro_batch_size=4, **options)),
                           Trainer.train_step)
        said = outcome.memory(plan, layout_of(group))[1][group.rank]
        assert everywhere(abs(said / peak - 1) < 0.02), said / peak


@pytest.mark.parametrize("kind", ["llama", "side by side"])
def test_the_peak_of_generation(world, kind):
    with mpitp.TensorParallelGroup() as group:
        ids = np.ones((4, 256), int)
        plan = Job(mpitp.DecoderConfig(**OF_MEMORY[kind]), "decode", *ids.shape, 5)
        peak = traced_peak(lambda: mpitp.Decoder(group, plan.config),
                           lambda model: model.extend(ids, KeyValues(model, 4, plan.positions)))
        said = outcome.memory(plan, layout_of(group))[1][group.rank]
        assert everywhere(abs(said / peak - 1) < 0.02), said / peak


# --- on one process --------------------------------------------------------------------------------------------------

def test_a_large_model_on_many_ranks():
    """405 billion parameters on 1,024 ranks: nothing of their size is made, and no rank is counted twice."""
    big = mpitp.DecoderConfig(128256, 16384, 126, 128, 8, ffn_hidden_size=53248, activation="silu", gated=True,
                              normalization="rmsnorm", qkv_bias=False, attention_bias=False, mlp_bias=False)
    tracemalloc.start()
    of, = outcome.plan(Job(big, "train", 1, 4096, dtype="bfloat16", device="gpu"), MACHINES["h100x8"], [1024], 8)
    assert tracemalloc.get_traced_memory()[1] < 1 << 26
    tracemalloc.stop()
    assert (of.tensor, of.data, of.hosts) == (128, 8, 128) and 405e9 < outcome.parameters(big) < 407e9
    assert of.bytes_of["gradients"] == 2 * of.bytes_of["weights"]
    assert of.phases[0].seconds > 0 and not math.isnan(of.phases[0].seconds)


def test_more_ranks_hold_less_and_the_smallest_that_fits_is_found():
    plan = Job(mpitp.DecoderConfig(**OF_MEMORY["llama"]), "train", 1, 32)
    of_ranks = [max(outcome.memory(plan, Layout(ranks))[1]) for ranks in (1, 2, 3, 4, 8)]
    assert sorted(of_ranks, reverse=True) == of_ranks
    assert outcome.smallest_that_fits(plan, of_ranks[0], 1, Layout(1)) == 1
    assert outcome.smallest_that_fits(plan, of_ranks[0] - 1, 1, Layout(1)) == 2
    assert outcome.smallest_that_fits(plan, of_ranks[2], 1, Layout(1)) == 3
    assert outcome.smallest_that_fits(plan, 2 * of_ranks[2], 2, Layout(1)) <= 4
    assert outcome.smallest_that_fits(plan, 1000, 1, Layout(1)) is None        # what every rank holds whole


def test_the_verdict():
    plan = Job(mpitp.DecoderConfig(**OF_MEMORY["llama"]), "decode", 1, 32)
    of = outcome.plan(plan, MACHINES["ethernet-10g"], [1, 2, 16, 32])
    assert outcome.fastest(of).ranks == 16                          # beyond 16 cores there is the network
    assert "From 16 to 32 ranks a token saves" in outcome.why(of) and "of messages" in outcome.why(of)
    assert outcome.cheapest(of).ranks == 1
    for one in of:
        assert math.isclose(sum(one.phases[1].seconds_of.values()), one.phases[1].seconds)


def test_times_between_points():
    grid = Grid({(rows, n): 1e-6 * rows * n ** 0.5 for rows in (1, 64, 1024) for n in (256, 4096)})
    assert math.isclose(grid.seconds((64, 256)), 64e-6 * 16)
    assert math.isclose(grid.seconds((2048, 256)), 2 * grid.seconds((1024, 256)))       # beyond the last point
    assert grid.seconds((1, 16)) == grid.seconds((1, 256))                              # before the first one
    assert 200e-6 * 30 < grid.seconds((200, 1024)) < 200e-6 * 34


WITHOUT_MPI = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("mpi4py"):
            raise ImportError("no mpi4py here")

sys.meta_path.insert(0, Absent())
from mpitp.__main__ import main
sys.exit(main())
"""


@pytest.mark.launcher
def test_it_needs_no_mpi():
    """And what it prints is the same."""
    words = "plan", "--hidden-size", "64", "-n", "1,2", "--machine", "laptop"
    done = subprocess.run([sys.executable, "-c", WITHOUT_MPI, *words], text=True, capture_output=True, timeout=60,
                          env=job_environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout == job(1, "-m", "mpitp", *words).stdout and "fastest: " in done.stdout


@pytest.mark.launcher
def test_the_command(tmp_path):
    tiny.write(tmp_path, tiny.load("llama"))
    done = job(1, "-m", "mpitp", "plan", "--model", tmp_path, "-n", "1,2,3", "--tokens", 16, "--json",
               tmp_path / "plan.json", "--plot", tmp_path / "plan.png")
    assert done.returncode == 0, done.stderr
    assert "fastest: " in done.stdout and all(len(line) <= 100 for line in done.stdout.splitlines()[2:])
    said = json.loads((tmp_path / "plan.json").read_text())
    assert said["schema"] == "mpitp.plan/1" and [found["kind"] for found in said["jobs"]] == ["train", "decode"]
    names = {(t["kind"], t["name"]) for t in said["jobs"][0]["of_ranks"][1]["tensors"]}
    assert ("exp_avg", "layers.1.mlp.up.weight") in names
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def run_command(*words):
    parser = Parser()
    plan_command.add_arguments(parser)
    return plan_command.run(parser.parse_args(list(map(str, words))))


def test_what_it_refuses(tmp_path):
    tiny.write(tmp_path, {**tiny.load("llama")})
    said = json.loads((tmp_path / "config.json").read_text())
    del said["hidden_size"]
    (tmp_path / "lacks.json").write_text(json.dumps(said))
    (tmp_path / "machine.json").write_text('{"schema": "mpitp.machine/1", "name": "x"}')
    for words, message in (
            (("--machine", "cray-1"), "found machine 'cray-1', expected a file"),
            (("--machine", tmp_path / "machine.json"), "machine.json: found no device, expected 'cpu' or 'gpu'"),
            (("--machine", tmp_path / "config.json"), "expected a machine file"),
            (("--train", "--decode"), "found --train and --decode"),
            (("--decode", "--sequence-parallel", "--recompute", "block"), "found --decode with --sequence-parallel, "
             "--recompute, expected --train"),
            (("--gather-again",), "found --gather-again without --sequence-parallel, expected both"),
            (("--model", tmp_path, "--hidden-size", 64), "found --model and --hidden-size"),
            (("--config", tmp_path / "lacks.json"), "lacks.json: found no hidden_size, expected it there"),
            (("--config", tmp_path / "gone.json"), "gone.json: found No such file"),
            (("-n", "2,0"), "found -n 2,0"), (("-n", 7, "--data-parallel", 2), "found 7 ranks with --data-parallel 2"),
            (("--dtype", "bfloat16"), "found dtype 'bfloat16'"), (("--batch", 0), "batch = 0"),
            (("--plot", tmp_path / "no" / "plan.png"), "expected a file in an existing"),
            (("--plot", tmp_path / "plan.txt"), "plan.txt, expected a file that ends with .png, .svg, .pdf")):
        with pytest.raises(InputError) as refused:
            run_command(*words)
        assert message in str(refused.value)


def test_no_matplotlib_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)            # which makes its import fail
    monkeypatch.setattr(plan_command, "plan", None)
    with pytest.raises(InputError, match="found no matplotlib, expected it for --plot"):
        run_command("--plot", tmp_path / "plan.png")


def test_recomputation_repeats_products_and_rows_take_other_collectives():
    """Forward's products but the last of each branch that backward needs no more; norms of a rank's rows alone."""
    plans = {name: Job(mpitp.DecoderConfig(**LLAMA), "train", 1, 64, **mode)
             for name, mode in {"whole": {}, **MODES}.items()}
    items = {name: work(of, Layout(2), "step") for name, of in plans.items()}

    def of(name, kind, what):
        return sum(item.count for item in items[name] if (item.kind, item.what) == (kind, what))

    per_block = {name: (of(name, "product", "forward") - 1) // 2 for name in items}
    assert per_block == {"whole": 7, "rows": 7, "gathered again": 7, "block": 13, "attention": 10, "rows, block": 13,
                         "gathered again, attention": 10}
    assert all(of(name, "product", "dw") == 15 for name in items)
    assert of("whole", "message", "all_gather") == of("whole", "message", "reduce_scatter") == 0
    assert of("rows", "message", "all_gather") == of("rows", "message", "reduce_scatter") == 2 * 4 + 2
    norms = {name: {item.size for item in found if item.what == "rmsnorm forward"} for name, found in items.items()}
    assert norms["whole"] == {(64 * 256,)} and norms["rows"] == {(32 * 256,)}
    machine = MACHINES["infiniband"]
    seconds = {name: outcome.of_ranks(of, machine, Layout(2)).seconds for name, of in plans.items()}
    assert seconds["rows"] < seconds["whole"] < seconds["attention"] < seconds["block"]


def test_ranks_that_are_not_named_are_those_that_the_machine_has(capsys, tmp_path):
    for words, numbers in ((("--machine", "laptop"), [1, 2, 4, 8]), (("--machine", "h100x2"), [1, 2]),
                           (("--machine", "infiniband", "--train", "--data-parallel", 4), [4, 8, 16, 32, 64]),
                           (("--machine", "infiniband", "-n", "3,1"), [1, 3])):
        run_command(*words, "--hidden-size", 64, "--json", tmp_path / "plan.json")
        job, *_ = json.loads((tmp_path / "plan.json").read_text())["jobs"]
        assert [of["ranks"] for of in job["of_ranks"]] == numbers


# --- the question before the work ------------------------------------------------------------------------------------

@pytest.mark.parametrize("ranks", [1, 2])
def test_what_has_no_memory_is_refused_with_the_number_that_has(world, ranks, monkeypatch):
    """So many ranks a host; what all of them need together counts, and one number less would not do."""
    with mpitp.TensorParallelGroup() as group:
        plan = Job(mpitp.DecoderConfig(**OF_MEMORY["llama"]), "train", 1, 64)
        needed = sum(outcome.memory(plan, layout_of(group))[1])
        monkeypatch.setattr(room, "free_bytes", lambda: needed)
        room.require_room(group, "it", plan)
        free = max(outcome.memory(plan, Layout(6 * group.size))[1]) * group.size + 1000
        monkeypatch.setattr(room, "free_bytes", lambda: free)
        with pytest.raises(InputError) as refused:
            room.require_room(group, "it", plan)
        number = int(re.search(r"there \((\d+) ranks", str(refused.value))[1])
        assert group.size < number <= 6 * group.size
        assert outcome.fits(plan, Layout(number), free, group.size)
        assert not outcome.fits(plan, Layout(number - 1), free, group.size)
        monkeypatch.setattr(room, "free_bytes", lambda: 1000)
        with pytest.raises(InputError, match="no number of ranks needs as little"):
            room.require_room(group, "it", plan)


def test_a_gpu_is_asked_for_what_stays(world, monkeypatch):
    stand_in.install(monkeypatch)
    plan = Job(mpitp.DecoderConfig(**OF_MEMORY["llama"]), "train", 1, 64, device="gpu")
    with mpitp.TensorParallelGroup(device="gpu", share_gpu=True) as group:
        needed = [of_rank - transient for of_rank, transient in
                  zip(outcome.memory(plan, layout_of(group))[1], outcome.peaks(plan, layout_of(group)))]
        monkeypatch.setattr(stand_in.runtime, "memGetInfo", lambda: (max(needed), 1 << 40))
        room.require_room(group, "it", plan)
        monkeypatch.setattr(stand_in.runtime, "memGetInfo", lambda: (max(needed) - 1, 1 << 40))
        with pytest.raises(InputError, match=r"free on GPU .* weights, gradients and optimizer of the 1 rank there \("
                                             r"\d ranks, 1 a GPU, would do"):
            room.require_room(group, "it", plan)


def test_training_asks_with_its_modes(world, monkeypatch):
    """What has room with recomputation and rows has none without."""
    config = mpitp.DecoderConfig(**OF_MEMORY["llama"])
    with mpitp.TensorParallelGroup() as group:
        plan = Job(config, "train", 4, 256, sequence_parallel=True, gather_again=True, recompute="block")
        monkeypatch.setattr(room, "free_bytes", lambda: sum(outcome.memory(plan, layout_of(group))[1]))
        arguments = argparse.Namespace(seq_length=256, dtype="float32")
        modes = dict(sequence_parallel=True, gather_again=True, recompute="block")
        ask_plan.training(group, arguments, config, Settings(micro_batch_size=4, **modes))
        with pytest.raises(InputError, match="activations of the"):
            ask_plan.training(group, arguments, config, Settings(micro_batch_size=4))


@pytest.mark.launcher
def test_commands_ask_before_they_load(tmp_path):
    """One line, before a weight is read or made: the folder has none."""
    tiny.write(tmp_path, tiny.load("llama"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 1 << 23, "hidden_size": 20000,
                                                      "num_attention_heads": 5, "num_key_value_heads": 1}))
    for words, needed in ((("generate", "--model", tmp_path, "--ids", "1,2"), "weights, keys, values and activations"),
                          (("score", "--model", tmp_path, "--ids-file", tmp_path / "ids"), "weights and activations"),
                          (("train", "--hidden-size", 8192, "--num-layers", 16, "--micro-batch-size", 1, "--seq-length",
                            16), "optimizer and activations")):
        (tmp_path / "ids").write_text("1,2,3")
        done = job(2, "-m", "mpitp", *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "GiB of memory free on " in done.stderr and f"{needed} of the 2 ranks there (" in done.stderr
        assert "ranks, 2 a host, would do)" in done.stderr


# --- a machine that is measured --------------------------------------------------------------------------------------

FEW = Sizes(rows=(1, 2), sides=(16, 64), tokens=(4, 16), features=(16, 32), keys=(4, 16), elements=(64, 512),
            reads=(1 << 12, 1 << 14), messages=(8, 64))


def test_a_measured_machine_is_read_as_it_was_written(world, tmp_path):
    """Every operation that a plan asks for has a time, and what the file lacks is named."""
    with mpitp.TensorParallelGroup() as group:
        machine = calibrate(Calibration(group, sizes=FEW), 1)
        assert machine.ranks_per_host == group.size and machine.source == launch.machine()
        assert machine.outside is None and not machine.tables.outside_messages
    outside = dataclasses.replace(machine, outside=Link(1e-4, 1e8), tables=dataclasses.replace(
        machine.tables, outside_messages={(8,): 1e-4}, outside_ranks=3, large_reads={(1 << 26,): 1e-2}))
    write_machine(tmp_path / "machine.json", outside, "float32")
    assert read_machine(tmp_path / "machine.json") == outside
    write_machine(tmp_path / "machine.json", machine, "float32")
    assert read_machine(tmp_path / "machine.json") == machine
    tables = machine.tables
    assert set(tables.row_messages) == ({"all_gather", "reduce_scatter"} if world.size > 1 else set())
    for kind in ALL_KINDS:
        for how, phases in outcome.PHASES.items():
            for item in (item for phase in phases
                         for item in work(Job(config(kind), how, 1, 7), Layout(group.size), phase)):
                known = {"product": tables.products, "scores": tables.scores, "pass": tables.passes,
                         "python": tables.python}.get(item.kind, [item.what])
                assert item.what in known, item
                assert machine.seconds(item, "float32", 4) >= 0
    of, = outcome.plan(Job(config("gpt2"), "train", 1, 7), machine, [group.size])
    assert of.fits and of.seconds > 0
    with pytest.raises(InputError, match="found float64 on machine"):
        outcome.plan(Job(config("gpt2"), "train", 1, 7, dtype="float64"), machine, [1])
    with pytest.raises(InputError, match="it is one host"):
        outcome.plan(Job(config("gpt2"), "train", 1, 7), machine, [2 * group.size])
    good = json.loads((tmp_path / "machine.json").read_text())
    for change, message in (({"device": "tpu"}, "found device = tpu, expected 'cpu' or 'gpu'"),
                            ({"inside": {"alpha_seconds": 0}}, "inside: found alpha_seconds = 0, expected a positive"),
                            ({"memory_bytes": "much"}, "found memory_bytes = much"),
                            ({"tables": {**good["tables"], "reads": [[1, -1.0]]}}, "tables: found reads = "),
                            ({"tables": {**good["tables"], "products": {"forward": [[1, 2, 3, 1.0], [2, 2, 4, 1.0]]}}},
                             "found 2 points of forward, expected 4, a grid's"),
                            ({"tables": {**good["tables"], "row_messages": {"bcast": []}}}, "found row_messages = "),
                            ({"tables": {**good["tables"], "passes": {"bias": [[1, 1.0]]}}}, "passes: found no add")):
        (tmp_path / "bad.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(InputError) as refused:
            read_machine(tmp_path / "bad.json")
        assert message in str(refused.value)


def test_sums_over_hosts_are_measured_apart(world, monkeypatch):
    """As if each rank had a host of its own; hosts with different numbers of ranks are refused."""
    if world.size == 1:
        pytest.skip("one rank has one host")
    monkeypatch.setattr(timed_cases, "nodes_of", lambda comm: list(range(comm.size)))
    with mpitp.TensorParallelGroup() as group:
        calibration = Calibration(group, sizes=FEW)
        calibration.run_pass()
        machine = calibration.machine()
        assert machine.ranks_per_host == 1 and set(machine.tables.messages) == {(0,)}
        assert machine.tables.outside_ranks == world.size and len(machine.tables.outside_messages) == 2
        of, = outcome.plan(Job(config("gpt2"), "train", 1, 7), machine, [world.size])
        assert of.hosts == world.size and of.phases[0].seconds_of["messages"] > 0
        if world.size > 2:
            monkeypatch.setattr(timed_cases, "nodes_of", lambda comm: [0, *range(comm.size - 1)])
            with pytest.raises(InputError, match="ranks on . hosts, up to 2 on one, expected as many on each"):
                Calibration(group, sizes=FEW)


def machine_of(device="cpu", **tables):
    """A machine that reads 100 GB/s in its cache, and 10 GB/s out of 64 MiB and more, large arrays in half the time."""
    reads = {(size,): size / (1e11 if size < 1 << 24 else 1e10) for size in (1 << 20, 1 << 22, 1 << 26, 1 << 28)}
    grid = {(rows, outs, ins): rows * outs * ins * 4e-11
            for rows in (1, 64) for outs in (64, 4096) for ins in (64, 4096)}
    found = dict(products=dict.fromkeys(("forward", "dx", "dw"), grid), passes={"add": {(64,): 1e-6, (128,): 2e-6}},
                 scores={"forward": {(16, 16): 1e-6}, "backward": {(16, 16): 2e-6}, "token": {(64,): 1e-6}},
                 reads=reads, messages={(8,): 2e-6, (1 << 20,): 1e-3}, python={"block step": 1e-3, "step": 1e-3},
                 large_reads={size: seconds / 2 for size, seconds in reads.items() if size[0] >= LARGE_ARRAY})
    return Machine("it", "nowhere", device, 2, 1 << 40, {"float32": 1e11}, 1e10, 1e10, 1e-6, Link(2e-6, 1e9),
                   Link(5e-5, 1e8) if "outside_messages" in tables else None, Tables(**{**found, **tables}))


def test_a_weight_is_read_as_fast_as_the_memory_gives_it():
    """Out of a cache, out of the memory in small pages, and in large ones; a measured time is not undercut."""
    machine, mebi = machine_of(), 1 << 20
    small, large = (Item("product", "forward", (1, side, side)) for side in (1024, 4096))
    in_cache = machine.seconds(small, "float32", 4, 5 * mebi)
    out_of_memory = machine.seconds(small, "float32", 4, 256 * mebi)
    assert in_cache < 1e-4 and math.isclose(out_of_memory, 4 * (mebi + 2048) / 1e10, rel_tol=0.3)
    of_large = machine.seconds(large, "float32", 4, 256 * mebi)
    share = SMALL_ARRAY / (64 * mebi)
    assert math.isclose(of_large, 4 * (16 * mebi + 8192) / 1e10 * (share + (1 - share) / 2), rel_tol=0.01)
    token = Item("scores", "token", (8, 8, 1024, 64))
    assert machine.seconds(token, "float32", 4, 256 * mebi) > machine.seconds(token, "float32", 4) + 1e-4


def test_sums_in_use():
    """A small sum takes what it takes behind a product; reads are freed of the sums between them."""
    medians = {("messages", "", (8,)): 1e-6, ("messages", "", (1 << 20,)): 1e-3, ("in use", " product", (0,)): 1e-5,
               ("in use", "", (8,)): 1.5e-5, ("messages", "outside", (8,)): 1.0}
    found = in_use(medians, "")
    assert set(found) == {(8,), (1 << 20,)} and math.isclose(found[8,], 5e-6) and found[1 << 20,] == 1e-3
    assert in_use({**medians, ("in use", "", (8,)): 1e-5}, "")[8,] == 1e-6         # at least as long as without
    assert sums(1 << 22, SMALL_ARRAY) == 0 and sums(1 << 26, SMALL_ARRAY) == 8
    assert without_sums({(1 << 26,): 1e-2}, SMALL_ARRAY, 1e-4) == {(1 << 26,): pytest.approx(9.2e-3)}


def test_sums_over_hosts():
    """As measured over as many hosts; a further hop for more of them, all that leave a host together share its link."""
    machine = machine_of(outside_messages={(8,): 1e-4, (1 << 20,): 1e-2}, outside_ranks=2)
    assert machine.message_seconds(8, 2) == pytest.approx(2e-6)                        # inside of a host
    assert machine.message_seconds(1 << 20, 3) == pytest.approx(1e-2 + 5e-5)
    assert machine.message_seconds(1 << 20, 2, sharing=2) == pytest.approx(2e-2)


def test_a_gpu_computes_while_python_starts_the_next():
    """The longer of both counts; a token is recorded, and what it takes beside its items is added."""
    machine, items = machine_of("gpu"), [Item("python", "block step", (), 2), Item("pass", "add", (128,), 100)]
    for count, python in ((1, 2e-3 - 2e-4), (20, 0.0)):
        parts = outcome.parts_of_time(machine, [items[0], *count * [items[1]]], "float32", 4, 0, False)
        assert parts["memory"] == pytest.approx(count * 2e-4) and parts["python"] == pytest.approx(python)
    assert outcome.parts_of_time(machine, items, "float32", 4, 0, True)["python"] == pytest.approx(2e-3)


def test_a_token_works_on_its_keys_and_values():
    plan = Job(mpitp.DecoderConfig(**LLAMA), "decode", 1, 1000, 2)
    short = Job(mpitp.DecoderConfig(**LLAMA), "decode", 1, 1, 1)
    more = working_bytes(plan, Layout(2), "token") - working_bytes(short, Layout(2), "token")
    assert more == 2 * 2 * 1000 * 2 * 32 * 4            # keys and values, layers, positions, heads, features


@pytest.mark.launcher
def test_a_gpu_is_calibrated(tmp_path):
    """On a stand-in, in 16 bits, too; the plan asks for nothing that was not measured."""
    done = job(2, "tests/support/plan_gpu_job.py", tmp_path / "machine.json")
    assert done.returncode == 0 and "planned" in done.stdout, done.stderr


def test_the_machine_at_hand_is_used_where_it_was_calibrated(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found, note = calibrated_here()
    assert found is None and "none calibrated" in note
    parser = Parser()
    bench.add_arguments(parser)
    arguments = parser.parse_args(["--calibrate"])
    assert arguments.calibrate == str(tmp_path / "mpitp" / "machine.json")
    run_calibration(arguments, FEW)
    found, note = calibrated_here()
    assert found.tables is not None and note.startswith("calibrated here")
    monkeypatch.setattr(launch, "machine", lambda: "another processor")
    found, note = calibrated_here()
    assert found is None and "is of another one" in note
    with pytest.raises(InputError, match="expected it alone"):
        run_calibration(parser.parse_args(["ffn", "--calibrate", str(tmp_path / "x.json")]))
