"""python -m mpitp generate on tiny checkpoints of transformers' making; text a token at a time; bad input is one line."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

import make_tiny_checkpoints as tiny
import mpitp
from mpitp.commands import text
from spmd import ROOT, SUPPORT, job, job_environment

GOLDEN = tiny.load("gemma3_text")
IDS = ",".join(map(str, GOLDEN["ids"]))
SMILE = "\N{SLIGHTLY SMILING FACE}"         # four bytes in UTF-8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint; where `tokenizers` is installed, with a tokenizer: letters, space, and the bytes of one character."""
    folder = tmp_path_factory.mktemp("gemma")
    tiny.write(folder, GOLDEN)
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        return folder
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    parts = list(split.pre_tokenize_str("abcdefghijklmnopqrstuvwxyz" + " " + SMILE)[0][0])
    tokenizer = Tokenizer(models.BPE({part: i for i, part in enumerate(parts)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def command(ranks, folder, *arguments, environment=None):
    return job(ranks, "-m", "mpitp", "generate", "--model", folder, *arguments, environment=environment)


@pytest.mark.launcher
@pytest.mark.parametrize("mode", [[], ["--reproducible"], ["--dtype", "float64"]], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_greedy_ids_of_transformers(folder, ranks, mode, tmp_path):
    done = command(ranks, folder, "--ids", IDS, "--max-new-tokens", 6, "--json", tmp_path / "r.json", *mode)
    assert done.returncode == 0 and not done.stderr, done.stderr
    printed = done.stdout.splitlines()
    assert printed[0] == ",".join(map(str, GOLDEN["greedy"])) and max(map(len, printed)) <= 100
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["schema"] == "mpitp.generate/1" and report["ranks"] == ranks
    assert report["sequences"] == [dict(prompt_ids=GOLDEN["ids"], new_ids=GOLDEN["greedy"], prompt=None, text=None)]
    assert (report["prefill_tokens"], report["decode_tokens"]) == (len(GOLDEN["ids"]), 5)
    assert len(report["bytes_read_of_ranks"]) == ranks and min(report["bytes_read_of_ranks"]) > 0
    assert 0 < report["prefill_seconds"] and 0 < report["decode_seconds"]
    assert 0 < report["communication_share_of_prefill"] < 1 and 0 < report["communication_share_of_decode"] < 1
    if sys.platform == "linux":
        assert report["load_seconds"] + report["prefill_seconds"] < report["first_token_seconds"] < 60


@pytest.mark.launcher
def test_several_prompts(folder):
    alone = [command(1, folder, "--ids", ids, "--max-new-tokens", 4).stdout.splitlines()[0] for ids in (IDS, "3,1")]
    together = command(2, folder, "--ids", IDS, "--ids", "3 1", "--max-new-tokens", 4).stdout.splitlines()
    assert together[:2] == [f"[{b}] {ids}" for b, ids in enumerate(alone)]


@pytest.mark.launcher
def test_one_token(folder):
    done = command(2, folder, "--ids", IDS, "--max-new-tokens", 1)
    assert done.returncode == 0 and done.stdout.splitlines()[0] == str(GOLDEN["greedy"][0])
    assert "prefill" in done.stdout and "decode" not in done.stdout


@pytest.mark.launcher
@pytest.mark.parametrize("file, value", [("config.json", "one"), ("generation_config.json", "one"),
                                         ("generation_config.json", "list")])
def test_end_token(tmp_path, file, value):
    tiny.write(tmp_path, GOLDEN)
    end = GOLDEN["greedy"][2]
    until = GOLDEN["greedy"][:GOLDEN["greedy"].index(end) + 1]
    config = GOLDEN["config"] if file == "config.json" else {}
    (tmp_path / file).write_text(json.dumps({**config, "eos_token_id": [36, end] if value == "list" else end}))
    for more, expected in ([], until), (["--ignore-eos"], GOLDEN["greedy"]):
        done = command(2, tmp_path, "--ids", IDS, "--max-new-tokens", 6, *more)
        assert done.stdout.splitlines()[0] == ",".join(map(str, expected))


@pytest.mark.launcher
def test_drawn_ids_do_not_depend_on_the_ranks(folder):
    options = "--temperature", 3, "--top-k", 20, "--top-p", 0.9, "--reproducible", "--max-new-tokens", 30
    def first_line(ranks, seed):
        return command(ranks, folder, "--ids", IDS, *options, "--seed", seed).stdout.splitlines()[0]
    assert first_line(1, 5) == first_line(2, 5) == first_line(3, 5) != first_line(1, 6)


# --- text ------------------------------------------------------------------------------------------------------

@pytest.mark.launcher
def test_text(folder, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt = f"to {SMILE}"
    ids = tokenizer.encode(prompt).ids
    assert len(ids) == 7
    new = json.loads("[" + command(1, folder, "--ids", ",".join(map(str, ids)), "--max-new-tokens", 40).stdout
                     .splitlines()[0] + "]")
    expected = tokenizer.decode(ids + new)
    done = command(2, folder, "--prompt", prompt, "--max-new-tokens", 40, "--json", tmp_path / "r.json")
    assert done.stdout.startswith(expected + "\n\n"), done.stderr
    found = json.loads((tmp_path / "r.json").read_text())["sequences"]
    assert found == [dict(prompt_ids=ids, new_ids=new, prompt=prompt, text=expected[len(prompt):])]
    (tmp_path / "batch").write_text(f"{prompt}\n\nhello\n", encoding="utf-8")
    several = command(2, folder, "--batch-file", tmp_path / "batch", "--max-new-tokens", 40)
    assert several.stdout.startswith(f"[0] {expected}\n[1] hello"), several.stderr


def push_all(decode, prompt, tokens):
    stream = text.TextStream(decode, prompt)
    return [stream.push(token) for token in tokens] + [stream.rest()]


def of_bytes(ids):
    return bytes(ids).decode("utf-8", "replace")


def test_characters_of_several_tokens():
    """Held back until they are whole; together the text that decoding everything at once gives."""
    said = f"a{SMILE}\N{EURO SIGN}\N{LATIN SMALL LETTER E WITH ACUTE}b{SMILE}{SMILE}"
    found = push_all(of_bytes, b"x", said.encode())
    assert found == ["a", "", "", "", SMILE, "", "", "\N{EURO SIGN}", "", "\N{LATIN SMALL LETTER E WITH ACUTE}", "b",
                     "", "", "", SMILE, "", "", "", SMILE, ""]


def test_bytes_that_are_no_character_do_not_hold_for_ever():
    found = push_all(of_bytes, b"x", [0x9F] * 6 + [0x61])
    assert "".join(found) == of_bytes([0x9F] * 6 + [0x61]) and any(found[:5])
    assert push_all(of_bytes, b"x", SMILE.encode()[:2]) == ["", "", "\N{REPLACEMENT CHARACTER}"]


def test_spaces_that_a_decoder_strips_at_the_start():
    """As sentencepiece decoders do: a word has its space unless it is the first one."""
    words = [" a", " b", "c", " d"]
    found = push_all(lambda ids: "".join(words[i] for i in ids).removeprefix(" "), [0], [1, 2, 3, 1])
    assert found == [" b", "c", " d", " b", ""]


def test_a_stream_decodes_a_few_tokens_at_a_time():
    lengths = []
    def decode(ids):
        lengths.append(len(ids))
        return of_bytes(ids)
    push_all(decode, b"x" * 500, b"y" * 500)
    assert max(lengths) <= 12


# --- bad input, interruption -------------------------------------------------------------------------------------

@pytest.mark.launcher
@pytest.mark.parametrize("arguments, said", [
    ([], "found no prompt, expected one of --prompt, --ids, --batch-file"),
    (["--ids", "1", "--prompt", "x"], "found --prompt and --ids, expected one of"),
    (["--ids", "1,x"], "found ids '1,x', expected integers"),
    (["--ids", ""], "expected at least one token id in each"),
    (["--ids", "1,37"], "found token id 37 in prompt 0, expected 0 to 36"),
    (["--ids", "1", "--max-new-tokens", "0"], "found max_new_tokens = 0"),
    (["--ids", "1", "--top-k", "5"], "found top_k or top_p with temperature 0"),
    (["--ids", "1", "--temperature", "-1"], "found temperature -1.0"),
    (["--ids", "1", "--dtype", "float16"], "dtype 'float16'"),
    (["--ids", "1", "--json", "/gone/x"], "'/gone/x'"),
    (["--batch-file", "/gone/x"], "/gone/x: found No such file or directory, expected a file"),
    (["--batch-file", "/dev/null"], "found no text in /dev/null, expected a text a line"),
    (["--ids", "1", "--model", "/gone"], "/gone"),
    (["--prompt", "x", "--model", "/gone"], "/gone"),
])
def test_bad_input(folder, arguments, said):
    done = command(2, folder, *arguments)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert done.stderr.count("mpitp: ") == 1 and "Traceback" not in done.stderr and not done.stdout


@pytest.mark.launcher
def test_text_without_a_tokenizer(folder, tmp_path):
    (tmp_path / "tokenizers.py").write_text("raise ImportError")
    without = {"PYTHONPATH": f"{tmp_path}:{ROOT}:{SUPPORT}"}
    done = command(2, folder, "--ids", IDS, "--max-new-tokens", 2, environment=without)
    assert done.returncode == 0, done.stderr
    tiny.write(tmp_path / "model", GOLDEN)
    done = command(2, tmp_path / "model", "--prompt", "x")
    assert done.returncode == 2 and "tokenizer.json, expected the tokenizer of the checkpoint" in done.stderr
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    done = command(2, tmp_path / "model", "--prompt", "x", environment=without)
    assert done.returncode == 2 and "found no tokenizers, expected it for text: pip install" in done.stderr
    if "tokenizers" in sys.modules:
        done = command(2, tmp_path / "model", "--prompt", "x")
        assert done.returncode == 2 and done.stderr.count("mpitp: ") == 1 and "expected a tokenizer" in done.stderr


@pytest.mark.launcher
def test_a_weight_that_is_not_finite(tmp_path):
    import numpy as np
    from safetensors.numpy import load_file, save_file
    tiny.write(tmp_path, GOLDEN)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    weights[name] = weights[name].copy()
    weights[name][0, 0] = np.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    done = command(2, tmp_path, "--ids", IDS)
    assert done.returncode == 2 and done.stderr.count("mpitp: found logits that are not finite") == 1, done.stderr


@pytest.mark.parametrize("said", ["[1]", "{", '{"eos_token_id": "x"}', '{"eos_token_id": [1, true]}'])
def test_damaged_generation_config(tmp_path, said):
    (tmp_path / "generation_config.json").write_text(said)
    with pytest.raises(mpitp.InputError, match="generation_config.json"):
        text.end_tokens(tmp_path)


@pytest.mark.launcher
def test_interrupted(folder):
    """Control-C leaves the text so far, and one line."""
    running = subprocess.Popen([sys.executable, "-m", "mpitp", "generate", "--model", folder, "--ids", IDS,
                                "--max-new-tokens", "1000000", "--ignore-eos"], env=job_environment(), cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first = os.read(running.stdout.fileno(), 10)
    time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=30)
    assert running.returncode == 1 and err == b"mpitp: interrupted\n"
    assert (first + out).decode().startswith(",".join(map(str, GOLDEN["greedy"])))
