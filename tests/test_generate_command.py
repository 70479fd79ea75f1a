"""python -m mpitp generate on tiny checkpoints that transformers made; text a token at a time; bad input, one line."""
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

import make_tiny_checkpoints as tiny
import mpitp
from mpitp.commands import text, tokenizer, tokenizing
from spmd import ROOT, SUPPORT, job, job_environment

GOLDEN = tiny.load("gemma3_text")
IDS = ",".join(map(str, GOLDEN["ids"]))
SMILE = "\N{SLIGHTLY SMILING FACE}"         # four bytes in UTF-8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint; where `tokenizers` is installed, with a tokenizer of letters, space, and one character's bytes."""
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
    assert report["prefill_seconds"] > 0 and report["decode_seconds"] > 0
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


@pytest.mark.launcher
def test_log_probabilities(folder, tmp_path):
    """In reproducible mode the same bits on any number of ranks; printed with the tokens."""
    found = []
    for ranks in (1, 2, 3):
        done = command(ranks, folder, "--ids", IDS, "--ids", "3,1", "--max-new-tokens", 4, "--logprobs",
                       "--reproducible", "--json", tmp_path / "r.json")
        found.append([one["logprobs"] for one in json.loads((tmp_path / "r.json").read_text())["sequences"]])
    assert found[0] == found[1] == found[2] and [len(row) for row in found[0]] == [4, 4] and max(map(max, found[0])) < 0
    printed = done.stdout.splitlines()
    total = sum(found[0][1])
    at = printed.index(f"[1] natural logarithms of the probabilities of 4 new tokens: sum {total:.6f}, "
                       f"mean {total / 4:.6f}")
    assert [line.split()[1] for line in printed[at + 1:at + 6]] == ["log", *(f"{one:.6f}" for one in found[0][1])]
    assert max(map(len, printed)) <= 100


def test_a_tokenizer_that_begins_to_load_early(folder):
    pytest.importorskip("tokenizers")
    for words in (["--ids", "1", "--model", str(folder)], ["--model=/gone", "--prompt", "x"], ["--prompt", "x"],
                  ["--model", str(folder), "--ids=1"], ["--help", "--model", str(folder)], ["--model"]):
        tokenizer.begin(words)
        assert not tokenizer._begun
    words = ["--prompt", "x", "--model", str(folder)]
    for environment in ({}, {"PMI_RANK": "1"}, {"PMI_RANK": "2", "PMIX_RANK": "0"}):        # not rank 0, or not known
        tokenizer.begin_before_mpi(words, environment)
        assert not tokenizer._begun
    tokenizer.begin_before_mpi(words, {"OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"})
    begun = tokenizer._begun[str(folder)]
    tokenizer.begin(words)                                  # after MPI: it has begun
    assert tokenizer._begun == {str(folder): begun}
    assert tokenizer.tokenizer_of(str(folder)) is begun and not tokenizer._begun
    other = tokenizer.tokenizer_of(str(folder))
    assert other is not begun and list(begun.encode("ab")[0]) == list(other.encode("ab")[0]) == [0, 1]
    assert begun.decode([7, 8]) == "hi" and begun.find("a") is None
    for one in (begun, other):
        one.close()
        assert one.child.process.returncode is not None


@pytest.mark.launcher
def test_a_tokenizer_that_takes_too_much_memory(tmp_path):
    """One line, and no rank waits: it takes it in a process of its own, which has a limit."""
    tokenizers = pytest.importorskip("tokenizers")
    tiny.write(tmp_path, GOLDEN)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    grows = tokenizers.normalizers.Replace("a", "a" * 1000)
    tokenizer.normalizer = tokenizers.normalizers.Sequence([grows] * 3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    done = command(2, tmp_path, "--prompt", "a")
    assert done.returncode == 2 and done.stderr.count("mpitp: ") == 1 and not done.stdout, done.stderr
    assert "tokenizer.json: found what ends its process by SIGABRT, expected a tokenizer that needs " in done.stderr


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
    (["--batch-file", "/dev/null"], "/dev/null: found a device, expected a file"),
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
    out, err = running.communicate(timeout=300)
    assert running.returncode == 1 and err == b"mpitp: interrupted\n"
    assert (first + out).decode().startswith(",".join(map(str, GOLDEN["greedy"])))


# --- byte-fallback tokens ------------------------------------------------------------------------------------------

def fallback(ids):
    """As a byte-fallback decoder: ids below 256 are bytes, a run of which is spoilt by one that is no character."""
    text, run = "", b""
    for i in [*ids, None]:
        if i is not None and i < 256:
            run += bytes([i])
            continue
        try:
            text += run.decode()
        except UnicodeDecodeError:
            text += "\N{REPLACEMENT CHARACTER}" * len(run)
        text, run = text + ("" if i is None else chr(i)), b""
    return text


EURO = "\N{EURO SIGN}".encode()
WORD = ord("\N{GREEK SMALL LETTER ALPHA}")      # a token that is no byte


@pytest.mark.parametrize("prompt", [EURO * 4, EURO * 40, SMILE.encode() * 3 + EURO, [WORD, *EURO * 3], EURO * 2])
def test_a_prompt_whose_last_tokens_begin_inside_a_character(prompt):
    new = [*EURO, WORD, *SMILE.encode(), *EURO]
    found = push_all(fallback, prompt, new)
    assert "".join(found) == fallback(new) == f"\N{EURO SIGN}{chr(WORD)}{SMILE}\N{EURO SIGN}"


@pytest.mark.parametrize("unfinished, signs", [(EURO[:1], 1), (EURO[:2], 2), (SMILE.encode()[:3], 3)])
def test_bytes_of_an_unfinished_character_are_as_many_signs(unfinished, signs):
    for before in (EURO, EURO * 3, b""):
        found = push_all(fallback, [WORD], [*before, *unfinished])
        assert "".join(found) == before.decode() + "\N{REPLACEMENT CHARACTER}" * signs


def test_characters_after_a_byte_that_is_none():
    found = push_all(fallback, [WORD], [0x9F, *EURO, *SMILE.encode(), WORD])
    assert "".join(found).endswith(chr(WORD)) and "".join(found).startswith("\N{REPLACEMENT CHARACTER}")
    found = push_all(of_bytes, b"x", [0x9F, 0x9F, *SMILE.encode()])
    assert "".join(found) == "\N{REPLACEMENT CHARACTER}" * 2 + SMILE


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("decode", [of_bytes, fallback])
def test_what_a_prompt_shows_and_what_is_new_are_the_whole_text(decode, inside):
    """Where the prompt ends inside a character, the new text has all of it; U+FFFD in a text is itself."""
    rng, signs = random.Random(0), ["x", chr(WORD), SMILE, "\N{EURO SIGN}", "\u2028"]
    signs += [] if inside else ["\N{REPLACEMENT CHARACTER}"]
    for _ in range(200):
        said = [rng.choice(signs) for _ in range(rng.randint(1, 13))]
        tokens = [[WORD] if sign == chr(WORD) and decode is fallback else list(sign.encode()) for sign in said]
        ids, size = sum(tokens, []), len(sum(tokens[:rng.randint(1, len(said))], []))
        size, whole = rng.randint(1, len(ids)) if inside else size, "".join(said)
        shown = [decode(ids[:end]) for end in (range(size + 1) if inside else [size])]
        before = max(filter(whole.startswith, shown), key=len)
        assert before + "".join(push_all(decode, ids[:size], ids[size:])) == whole, size


# --- files and streams -----------------------------------------------------------------------------------------------

def test_lines_end_at_newlines_alone():
    assert text.lines_of("a\u2028b\x0cc\x85d\ne\r\nf\rg") == ["a\u2028b\x0cc\x85d", "e", "f", "g"]


def test_files_as_editors_write_them(tmp_path):
    (tmp_path / "marked").write_bytes("\N{EURO SIGN}".encode("utf-8-sig"))
    assert text.read_text(tmp_path / "marked") == "\N{EURO SIGN}"
    for content, said in (("x".encode("utf-16"), "found UTF-16, by its byte order mark"),
                          (b"ab\xff", "found bytes that are not UTF-8 at 2")):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(mpitp.InputError, match=said):
            text.read_text(tmp_path / "other")
    (tmp_path / "generation_config.json").write_bytes(b'\xef\xbb\xbf{"eos_token_id": 3}')
    assert text.end_tokens(tmp_path) == [3]


def test_a_tokenizer_has_no_truncation_and_no_padding(folder):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    other = folder / os.fsdecode(b"of \xff")                     # a name that is not UTF-8
    other.mkdir()
    tokenizer.enable_truncation(6)
    tokenizer.enable_padding(length=40)
    (other / "tokenizer.json").write_bytes(b"\xef\xbb\xbf" + tokenizer.to_str().encode())
    assert tokenizing.load_tokenizer(other).encode("hello world").ids == \
        tokenizing.load_tokenizer(folder).encode("hello world").ids
    (other / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(mpitp.InputError, match="found a Git LFS pointer"):
        tokenizing.load_tokenizer(other)


@pytest.mark.launcher
def test_a_terminal_that_cannot_hold_a_character(folder):
    pytest.importorskip("tokenizers")
    plain = command(2, folder, "--prompt", f"to {SMILE}", "--max-new-tokens", 40)
    done = command(2, folder, "--prompt", f"to {SMILE}", "--max-new-tokens", 40,
                   environment={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    expected = plain.stdout.split("\n\n")[0].encode("ascii", "backslashreplace").decode()
    assert done.stdout.startswith(expected + "\n\n") and "\\U0001f642" in expected
    # A locale that does not know UTF-8 changes nothing in what the arguments' bytes mean.
    done = command(2, folder, "--prompt", f"to {SMILE}", "--max-new-tokens", 40, environment={
        "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0 and done.stdout.split("\n\n")[0] == plain.stdout.split("\n\n")[0], done.stderr


@pytest.mark.launcher
def test_a_prompt_of_bytes_that_are_no_text(folder):
    done = command(2, folder, "--prompt", os.fsdecode(b"a\xff"))
    assert done.returncode == 2 and "--prompt: found bytes that are not UTF-8 at 1" in done.stderr, done.stderr
    assert done.stderr.count("mpitp: ") == 1 and "Traceback" not in done.stderr


@pytest.mark.launcher
def test_a_batch_file_with_other_separators(folder, tmp_path):
    (tmp_path / "batch").write_bytes(b"\xef\xbb\xbfab\r\nc\n")
    pytest.importorskip("tokenizers")
    done = command(1, folder, "--batch-file", tmp_path / "batch", "--max-new-tokens", 2)
    assert done.stdout.startswith("[0] ab") and "[1] c" in done.stdout and "[2]" not in done.stdout, done.stderr
