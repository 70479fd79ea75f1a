"""bench: its figures add up, its files are what they say. Times themselves are not tested."""
import argparse
import csv
import json

import pytest

import mpitp
from mpitp import measure
from spmd import job

SMALL = ("--hidden-size", 32, "--seq-length", 8, "--rounds", 3, "--max-bytes", 600)


@pytest.mark.launcher
def test_all_benches(tmp_path):
    done = job(2, "-m", "mpitp", "bench", *SMALL, "--reproducible", "--json", tmp_path / "b.json",
               "--csv", tmp_path / "b.csv")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["schema"] == "mpitp.bench/1" and report["ranks"] == 2
    rows = report["rows"]
    assert {row["bench"] for row in rows} == {"allreduce", "matmul", "ffn", "block", "decode"}
    assert {(row["case"], row["bytes"]) for row in rows if row["bench"] == "allreduce"} == {
        (case, size) for case in ("all_reduce", "all_gather", "reduce_scatter", "broadcast") for size in (8, 64, 512)}
    for row in rows:
        assert 0 < row["least_seconds"] <= row["median_seconds"] <= row["most_seconds"]
        if row["flops"]:
            assert row["flops_per_second"] == pytest.approx(row["flops"] / row["median_seconds"])
    forward = [row for row in rows if row["case"] == "forward"][0]
    assert forward["flops"] == 2 * 2 * 8 * 32 * 128 and forward["share_of_limit"] > 0
    blocks = [row for row in rows if row["bench"] == "block"]       # 12 D^2 weights; q k^T and p v over one tile
    flops = [2 * (12 * 8 * 32 ** 2 + 2 * 64 * 32), 2 * (36 * 8 * 32 ** 2 + 7 * 64 * 32)]
    assert [row["flops"] for row in blocks] == flops
    assert report["fits"] == [] and "MB/s" in done.stdout           # no message here that shows a rate
    assert len(list(csv.DictReader((tmp_path / "b.csv").open()))) == len(rows)


def test_latency_and_rate():
    """The line through times that lie on one, over five powers of ten; a rate that noise made negative is none."""
    times = {n: 3e-5 + 2e-9 * n for n in (8, 512, 32768, 2097152)}
    assert measure.latency_and_rate(times) == pytest.approx((3e-5, 2e-9))
    alpha, beta = measure.latency_and_rate({8: 2e-5, 64: 1e-5})
    assert alpha > 0 and beta > 0


def test_collectives_beside_what_neighbours_exchange(world):
    """Large messages have a limit where there is a link; small ones are latency."""
    from mpitp.commands import bench
    with mpitp.TensorParallelGroup() as group:
        arguments = argparse.Namespace(max_bytes=bench.BANDWIDTH_BYTES, rounds=2)
        rows = bench.collectives(group, arguments)
        fits = bench.fits(rows)
    assert [fit.operation for fit in fits] == ["all_gather", "all_reduce", "broadcast", "reduce_scatter"]
    assert all(fit.alpha_seconds >= 0 and fit.beta_seconds_per_byte > 0 for fit in fits)
    assert len(rows) == 4 * 5 and {row.case for row in rows} == {"all_reduce", "all_gather", "reduce_scatter",
                                                                 "broadcast"}
    for row in rows:
        assert (row.share_of_limit is not None) == (world.size > 1 and row.bytes == bench.BANDWIDTH_BYTES)


def test_every_bench_on_the_groups_device(group):
    """Under --device gpu there, too; in the 16-bit type that such a group has."""
    from mpitp.commands import bench
    has_half = group.device == "gpu" and hasattr(group.xp, "RawKernel")
    for dtype in ("float32", "bfloat16") if has_half else ("float32",):
        options = argparse.Namespace(what=[], hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, seq_length=8,
                                     dtype=dtype, max_bytes=64, rounds=1, reproducible=True, device=group.device,
                                     transport="auto", share_gpu=True, tf32=group.tf32, stall_limit=None,
                                     timeline=None)
        for run in (bench.collectives, bench.products, bench.feed_forward, bench.decoder_block, bench.one_token):
            assert all(row.median_seconds > 0 for row in run(group, options))


@pytest.mark.launcher
def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    for ranks in (1, 2):
        done = job(ranks, "-m", "mpitp", "bench", *SMALL, "--json", tmp_path / f"{ranks}.json",
                   "--plot", tmp_path / f"{ranks}.png")
        assert done.returncode == 0, done.stderr
    done = job(1, "-m", "mpitp", "bench", "--from", tmp_path / "1.json", tmp_path / "2.json",
               "--plot", tmp_path / "all.png")
    assert done.returncode == 0, done.stderr
    for name in ("1.png", "2.png", "all.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and (tmp_path / name).stat().st_size > 20_000


@pytest.mark.launcher
@pytest.mark.parametrize("arguments, said", [
    (["fft"], "found bench 'fft', expected allreduce, matmul, ffn, block, decode"), (["--rounds", "0"], "rounds = 0"),
    (["--from", "x.json"], "--from without --plot"), (["--dtype", "int8"], "dtype 'int8'"),
    (["--json", "/gone/x"], "'/gone/x'"),
    (["matmul", "--plot", "x.png"], "--plot of matmul alone"),
    (["block", "--num-attention-heads", "3"], "= 3, expected a div"),
])
def test_bad_input(arguments, said):
    done = job(2, "-m", "mpitp", "bench", *arguments)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("mpitp: ") == 1, done.stderr


def test_interleaved_rounds(group):
    """The slowest rank's time, once a round for each case, in turn."""
    calls = []
    cases = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = measure.interleave(group, cases, rounds=4)
    assert calls[6:] == list("abc" * 4)             # after two calls of each to warm up
    assert all(len(times) == 4 and min(times) >= 0 for times in seconds.values())
    assert len({str(times) for times in group.comm.allgather(seconds)}) == 1
    assert measure.ratio([2.0, 6.0, 20.0], [1.0, 2.0, 5.0]) == 3.0
