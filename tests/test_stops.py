"""--stop: the first stop that is complete, wherever tokens begin and end; each row by itself."""
import json

import pytest

import make_tiny_checkpoints as tiny
from mpitp.commands import stops
from mpitp.errors import InputError
from spmd import job

GOLDEN = tiny.load("gemma3_text")
IDS = ",".join(map(str, GOLDEN["ids"]))


def by_definition(text, found):
    """Character by character: the text up to the first stop that is complete."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in found if text[:end].endswith(stop)]
        if starts:
            return text[:min(starts)], True
    return text, False


@pytest.mark.parametrize("found", [["bc", "abcd"], ["abab"], ["aab"], ["abc", "bc", "c"], ["ba", "bab"], ["aaa"], []])
def test_the_same_text_for_all_pieces(found):
    for number in range(3 ** 6):
        text = "".join("abc"[number // 3 ** place % 3] for place in range(6)) + "d"
        expected = by_definition(text, found)
        for size in (1, 2, 3, 7):
            gate = stops.StopText(found)
            pieces = [gate.push(text[start:start + size]) for start in range(0, len(text), size)]
            assert ("".join(pieces) + gate.rest(), gate.is_met) == expected
            if size == 1 and not expected[1]:               # no more is held back than may be a stop
                assert len(text) - sum(map(len, pieces)) < max(map(len, found), default=1)


def test_what_the_options_say():
    assert stops.parse(["7", "x", '"7"', '"\\n"', '"', '"a', "\N{EURO SIGN}"], True) == (
        [7], ["x", "7", "\n", '"', '"a', "\N{EURO SIGN}"])
    for given, with_text, said in ((["x"], False, "found --stop 'x' beside --ids"), ([""], True, "an empty --stop"),
                                   (['""'], True, "an empty --stop")):
        with pytest.raises(InputError, match=said):
            stops.parse(given, with_text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a tokenizer of two letters a token, the last of which is special."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("stops")
    tiny.write(folder, GOLDEN)
    words = {f"{first}{second}": 6 * i + j for i, first in enumerate("abcdef") for j, second in enumerate("uvwxyz")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="au"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(".."), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def run(ranks, folder, path, *arguments):
    done = job(ranks, "-m", "mpitp", "generate", "--model", folder, "--max-new-tokens", 8, "--ignore-eos", *arguments,
               "--json", path)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text())


@pytest.mark.launcher
def test_each_row_stops_by_itself(folder, tmp_path):
    path = tmp_path / "r.json"
    drawn = "--temperature", 5, "--dtype", "float64"        # a small model repeats its last token
    prompts = "--prompt", "avaw", "--prompt", "fubvcx", *drawn
    _, report = run(1, folder, path, *prompts)
    free = [one["text"] for one in report["sequences"]]
    assert len(free[0]) == 16 and len(free[1]) > 8, free
    inside = free[0][3:6]                               # begins and ends inside of tokens
    expected = [by_definition(text, [inside]) for text in free]
    assert expected[0][1] and expected[0][0] == free[0][:free[0].index(inside)]
    for ranks in (1, 2, 3):
        out, report = run(ranks, folder, path, *prompts, "--stop", inside, "--stop", "never")
        for text, found, (said, is_met) in zip(free, report["sequences"], expected):
            assert found["text"] == said
            assert len(found["new_ids"]) == ((text.index(inside) + len(inside) + 1) // 2 if is_met else 8)
        assert out.startswith(f"[0] avaw{expected[0][0]}\n[1] fubvcx{expected[1][0]}\n")
    out, report = run(2, folder, path, "--prompt", "avaw", "--stop", inside, *drawn)
    assert out.startswith(f"avaw{expected[0][0]}\n\n") and report["decode_tokens"] + 1 == len(
        report["sequences"][0]["new_ids"])


@pytest.mark.launcher
def test_ids_and_special_tokens(folder, tmp_path):
    path = tmp_path / "r.json"
    until = GOLDEN["greedy"][:3]
    out, _ = run(2, folder, path, "--ids", IDS, "--stop", until[-1])
    assert out.splitlines()[0] == ",".join(map(str, GOLDEN["greedy"][:GOLDEN["greedy"].index(until[-1]) + 1]))
    _, report = run(1, folder, path, "--prompt", "avaw")
    free, = report["sequences"]
    stop = free["new_ids"][-1]
    first = free["new_ids"].index(stop)
    _, report = run(1, folder, path, "--prompt", "avaw", "--stop", stop)
    found, = report["sequences"]
    assert found["new_ids"] == free["new_ids"][:first + 1] and found["text"] == free["text"][:2 * first]
    # The text of a special token, which is never decoded, is that token.
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    content = next(word for word, token in tokenizer["model"]["vocab"].items() if token == stop)
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": stop, "content": content})
    special = tmp_path / "special"
    special.mkdir()
    tiny.write(special, GOLDEN)
    (special / "tokenizer.json").write_text(json.dumps(tokenizer))
    _, report = run(1, special, path, "--prompt", "avaw", "--stop", content)
    assert report["sequences"][0]["new_ids"] == free["new_ids"][:first + 1]


@pytest.mark.launcher
def test_a_stop_that_is_no_token(folder):
    done = job(2, "-m", "mpitp", "generate", "--model", folder, "--ids", IDS, "--stop", 37)
    assert done.returncode == 2 and "found --stop 37, expected a token id, 0 to 36, or a text" in done.stderr
    assert done.stderr.count("mpitp: ") == 1
