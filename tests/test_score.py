"""Scoring: the mean of -log p, each token but the first counted once, whatever window, stride and ranks."""
import json
import math
from types import SimpleNamespace
import tracemalloc

import numpy as np
import pytest

import make_tiny_checkpoints as tiny
from decoder_cases import KINDS
import mpitp
from mpitp import InputError
from mpitp.commands import text
from mpitp.commands.score import Given, score, tokens_of
from spmd import everywhere, job
from test_kv import decoder

IDS = np.random.default_rng(3).integers(0, 27, 23)
GOLDEN = tiny.load("llama")


def by_definition(model, ids, window, stride):
    """Token i is predicted in the first window that sees token i - 1."""
    losses, of_window = [], {}
    for i in range(1, len(ids)):
        first = max(0, math.ceil((i - window) / stride)) * stride
        if first not in of_window:
            seen = ids[None, first:min(first + window, len(ids))]
            of_window[first] = model.gather_logits(model.forward(seen, save=False)[0])[0]
        logits = of_window[first][i - 1 - first]
        losses.append(np.log(np.exp(logits - logits[ids[i]]).sum()))
    return np.mean(losses)


@pytest.mark.parametrize("window, stride, logits", [
    (22, 22, 1 << 24), (100, 1, 100), (9, 9, 1), (9, 4, 100), (7, 1, 1 << 24), (1, 1, 100), (2, 1, 1), (22, 5, 1)])
def test_each_token_counts_once(group, window, stride, logits, monkeypatch):
    """Of several rows, or one, at a time."""
    if group.size > 1 and group.reproducible and window > 9:
        return                                              # the same windows, of other sums
    monkeypatch.setattr("mpitp.commands.score.LOGITS", logits)
    model = decoder(group, "gemma3")
    loss, counted, windows = score(model, IDS, window, stride)
    assert counted == 22 and windows == 1 + max(0, math.ceil((22 - window) / stride))
    assert loss == pytest.approx(by_definition(model, IDS, window, stride), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(group, kind):
    if group.size > 1 and group.reproducible:
        return
    model = decoder(group, kind)
    assert score(model, IDS, 8, 3)[0] == pytest.approx(by_definition(model, IDS, 8, 3), rel=1e-12)


def test_memory_does_not_grow_with_the_text(group):
    """But for the ids, which are made before; garbage that waits to be collected counts."""
    model, peaks = decoder(group, "gemma3"), []
    for windows in (6, 6, 90):                              # the first one fills caches
        ids = np.random.default_rng(5).integers(0, 27, 16 * windows + 1).astype(np.int32)
        tracemalloc.start()
        loss, _, found = score(model, ids, 32, 16)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found == windows - 1 and math.isfinite(loss)
    assert peaks[2] < 2 * peaks[1]


def test_ids_of_a_file_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "PIECE", 5)
    (tmp_path / "ids").write_text("1,22, 333\n4444 , 55555\n\n6,")
    found = text.read_ids(tmp_path / "ids")
    assert found.tolist() == [1, 22, 333, 4444, 55555, 6] and found.dtype == np.int32
    (tmp_path / "ids").write_text(f"1,2,3,{2 ** 31}")
    with pytest.raises(mpitp.InputError, match="found token id 2147483648, expected one below 2147483648"):
        text.read_ids(tmp_path / "ids")


@pytest.mark.parametrize("size", [0, 1, 7])
def test_ids_are_given_to_all_ranks(group, size):
    ids = np.arange(size, dtype=np.int32)
    found = text.give_ids(group, ids if group.rank == 0 else None)
    assert everywhere(found.tolist() == ids.tolist() and found.dtype == np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny.write(folder, GOLDEN)
    (folder / "ids").write_text("\n".join(map(str, GOLDEN["ids"])))
    return folder


def command(ranks, folder, *arguments):
    return job(ranks, "-m", "mpitp", "score", "--model", folder, *arguments)


@pytest.mark.launcher
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_loss_of_transformers(folder, ranks, tmp_path):
    logits, ids = np.array(GOLDEN["logits"]), GOLDEN["ids"]
    loss = np.mean([np.log(np.exp(row - row[target]).sum()) for row, target in zip(logits, ids[1:])])
    done = command(ranks, folder, "--ids-file", folder / "ids", "--json", tmp_path / "r.json", "--dtype", "float64")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["schema"] == "mpitp.score/1" and report["ranks"] == ranks and report["counted"] == len(ids) - 1
    assert report["loss"] == pytest.approx(loss, rel=1e-10) and report["perplexity"] == pytest.approx(math.exp(loss))
    assert report["bits_per_token"] == pytest.approx(loss / math.log(2))
    assert f"loss {loss:.6f} nats a token, perplexity {math.exp(loss):.6g}\n" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.launcher
def test_same_loss_on_any_number_of_ranks(folder):
    found = {command(ranks, folder, "--ids-file", folder / "ids", "--window", 4,
                     "--reproducible").stdout.splitlines()[0]
             for ranks in (1, 2, 3)}
    assert len(found) == 1


@pytest.mark.parametrize("ids", [[3], [3, 4]])
def test_two_tokens_are_enough(ids):
    arguments = SimpleNamespace(text=None, ids_file="ids")
    if len(ids) == 1:
        with pytest.raises(InputError, match="found 1 tokens in ids, expected at least 2"):
            tokens_of(arguments, Given(ids))
    else:
        assert tokens_of(arguments, Given(ids)) is ids


@pytest.mark.launcher
def test_text(folder):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 3, "b": 4, "?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "text").write_text("a b b a", encoding="utf-8")
    (folder / "same").write_text("3 4 4 3")
    of_text, ids = (command(2, folder, *what).stdout.splitlines()[0] for what in (("--text", folder / "text"),
                                                                                  ("--ids-file", folder / "same")))
    loss = float(ids.split()[1])
    assert of_text == f"{ids}, {loss * 3 / math.log(2) / len('a b b a'):.4f} bits a byte"  # of 3 tokens that count


@pytest.mark.launcher
@pytest.mark.parametrize("arguments, said", [
    ([], "found neither --text nor --ids-file, expected one of them"),
    (["--text", "x", "--ids-file", "y"], "found --text and --ids-file, expected one of them"),
    (["--ids-file", "/gone/x"], "/gone/x: found No such file or directory"),
    (["--ids-file", "/dev/null"], "/dev/null: found a device, expected a file"),
    (["--ids-file", "IDS", "--window", "0"], "found window = 0"),
    (["--ids-file", "IDS", "--window", "4", "--stride", "5"], "found stride = 5, expected at most 4, the window"),
    (["--ids-file", "IDS", "--model", "/gone"], "/gone"),
])
def test_bad_input(folder, arguments, said):
    done = command(2, folder, *[folder / "ids" if argument == "IDS" else argument for argument in arguments])
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert done.stderr.count("mpitp: ") == 1 and "Traceback" not in done.stderr and not done.stdout
