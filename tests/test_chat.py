"""Chat templates: the texts of transformers, from each place of a folder; hostile ones end with one line."""
import fcntl
import json
import os
import pty
import subprocess
import sys
import termios
from functools import partial
from pathlib import Path

import pytest

import make_tiny_checkpoints as tiny
from mpitp import commands
from mpitp.commands import chat, generate, prompts, rendering
from mpitp.errors import InputError
from spmd import ROOT, job, job_environment, mpirun

pytest.importorskip("jinja2")
tokenizers = pytest.importorskip("tokenizers")
GOLDEN = json.loads((Path(__file__).parent / "data/chat/golden.json").read_text(encoding="utf-8"))
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("data/chat/*.jinja")}
HELLO = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_the_texts_of_transformers(name):
    assert len(TEMPLATES) >= 12
    for number, messages in enumerate(GOLDEN["conversations"]):
        expected = GOLDEN["found"][f"{name}/{number}"]
        if "error" in expected:
            with pytest.raises(Exception) as found:
                rendering.render(TEMPLATES[name], [messages], GOLDEN["variables"])
            kind = type(found.value).__name__               # ours of raise_exception and of what cannot be continued
            assert expected["error"] in (("TemplateError", "ValueError") if kind == "InputError" else (kind,))
        else:
            texts, undefined = rendering.render(TEMPLATES[name], [messages], GOLDEN["variables"])
            assert texts == [expected["text"].encode()] and not undefined


@pytest.mark.parametrize("template, content, said", [
    ("{{ messages[0].content }}", "y", "the assistant that the chat template leaves out or changes"),
    ("{{ messages|length }}", "y", "expected a chat template that uses its content"),
    ("{% for m in messages %}{{ m.content }}{% endfor %}", [{"type": "image"}], "of the assistant without a text"),
    ("{% for m in messages %}{{ m.content|upper }}{% endfor %}", "y", "leaves out or changes"),
])
def test_a_last_message_that_cannot_be_continued(template, content, said):
    with pytest.raises(InputError, match=said):
        rendering.render(template, [[*HELLO, {"role": "assistant", "content": content}]], {})


def test_the_time_of_now():
    import datetime
    (found,), _ = rendering.render("{{ strftime_now('%Y-%m-%d') }}", [HELLO], {})
    assert abs((datetime.date.fromisoformat(found.decode()) - datetime.date.today()).days) <= 1


# --- where a folder has it -----------------------------------------------------------------------------------------

def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        name = name.replace("_jinja", ".jinja") if name.endswith("_jinja") else f"{name}.json"
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(folder)


def test_the_places_of_a_template(tmp_path):
    places = dict(chat_template=dict(chat_template="processor"), tokenizer_config=dict(chat_template="config"),
                  chat_template_jinja="file")
    found = {name: chat.ChatTemplate(write(tmp_path, **{name: content})).template
             for name, content in places.items()}                   # each before those written earlier
    assert found == dict(chat_template="processor", tokenizer_config="config", chat_template_jinja="file")
    named = [dict(name="tool_use", template="x"), dict(name="default", template="named")]
    assert chat.ChatTemplate(write(tmp_path / "named", tokenizer_config=dict(chat_template=named))).template == "named"


def test_special_tokens(tmp_path):
    folder = write(tmp_path, special_tokens_map=dict(bos_token=dict(content="<s>", lstrip=False), other="x"),
                   tokenizer_config=dict(chat_template="[{{ bos_token }}{{ eos_token }}{{ unk_token }}]",
                                         unk_token=None,
                                         eos_token="</s>", pad_token={"__type": "AddedToken", "content": "<pad>"}))
    template = chat.ChatTemplate(folder)
    assert template.variables == dict(bos_token="<s>", eos_token="</s>", unk_token=None, pad_token="<pad>")
    assert template.render([HELLO, HELLO]) == ["[<s></s>]"] * 2


def test_a_token_that_the_folder_does_not_name(tmp_path, capfd):
    folder = write(tmp_path, tokenizer_config=dict(chat_template="[{{ bos_token }}]"))
    assert chat.ChatTemplate(folder).render([HELLO]) == ["[]"]
    assert "the chat template uses bos_token, which tokenizer_config.json does not have" in capfd.readouterr().err


@pytest.mark.parametrize("config, said", [
    ({}, "found no chat template in "),
    (dict(chat_template=5), "found a chat template that is int in "),
    (dict(chat_template=[dict(name="rag", template="x")]), "found chat templates rag in "),
    (dict(chat_template=["x"]), "found chat templates without a name"),
    (dict(chat_template="x" * (1 << 20) + "x"), "found a chat template of 1048577 characters"),
    (dict(chat_template="x", bos_token=7), "found bos_token 7 in "),
])
def test_folders_without_a_good_template(tmp_path, config, said):
    with pytest.raises(InputError, match=said):
        chat.ChatTemplate(write(tmp_path, tokenizer_config=config))


# --- hostile templates ---------------------------------------------------------------------------------------------

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("template, said", [
    (LOOP, "found no end, expected a chat template that needs at most 3 s and 512 MiB"),
    ("{{ 'x' * 10 ** 10 }}", "found a chat template that takes more than 512 MiB"),
    ("{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "found a chat template that makes more than 16777216"),
    ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__' of 'str'"),
    ("{{ messages.append(1) }}", "SecurityError"),
    ("{% set ns = namespace(__x=1) %}", "SecurityError: namespace attribute '__x'"),
    ("{% for a in range(10 ** 9) %}{% endfor %}", "OverflowError: Range too big"),
    ("{{ " + "(" * 100000, "RecursionError"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("x\n{% if %}", "found a chat template that fails in line 2 .TemplateSyntaxError"),
    ("{{ raise_exception('roles\nmust alternate') }}", r"found messages that the chat template refuses .roles\\nmust"),
    ("{{ '\ud800' }}", "UnicodeEncodeError"),
])
def test_hostile_templates(tmp_path, template, said):
    with pytest.raises(InputError, match=said) as found:
        chat.ChatTemplate(write(tmp_path, tokenizer_config=dict(chat_template=template))).render([HELLO])
    assert "\n" not in str(found.value) and "tokenizer_config.json: found" in str(found.value)


def test_a_template_that_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "WALL_SECONDS", 0.2)
    with pytest.raises(InputError, match="found no end, expected a chat template"):
        chat.ChatTemplate(write(tmp_path, tokenizer_config=dict(chat_template=LOOP))).render([HELLO])


def test_without_jinja2(tmp_path, monkeypatch):
    (tmp_path / "jinja2.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"found no jinja2, expected it for --chat: pip install 'mpitp\[chat\]'"):
        chat.ChatTemplate(write(tmp_path, tokenizer_config=dict(chat_template="x"))).render([HELLO])


def test_a_jinja2_whose_sandbox_does_not_hold(monkeypatch):
    monkeypatch.setattr(rendering.metadata, "version", lambda name: "3.1.5")
    with pytest.raises(InputError, match="found jinja2 3.1.5, expected 3.1.6 or newer"):
        rendering.render("x", [HELLO], {})


# --- messages ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("content, said", [
    ("{", "found something that is not JSON"),
    ("{}", "found no list of messages"),
    ("[]", "found no list of messages"),
    ('[{"content": "x"}]', "found message 0 of .* without a role"),
    ('[{"role": "user", "content": 5}]', "found message 0 of .* with content 5"),
    ('[{"role": "user", "role": "x"}]', "found 'role' twice"),
])
def test_messages_that_are_none(tmp_path, content, said):
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(InputError, match=said):
        chat.read_messages(str(tmp_path / "m.json"))


# --- the command ---------------------------------------------------------------------------------------------------

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}model "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a tokenizer of letters, a space and <s>, which the tokenizer adds in front of a text."""
    folder = tmp_path_factory.mktemp("chat")
    tiny.write(folder, tiny.load("gemma3_text"))
    parts = "abcdefghijklmnopqrstuvwxyz "
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({part: i for i, part in enumerate(parts)}, []))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 27)])
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder, tokenizer_config=dict(chat_template=TEMPLATE, bos_token="<s>"))
    write(folder / "doubled", tokenizer_config=dict(chat_template="<s>" + TEMPLATE, bos_token="<s>"))
    (folder / "doubled" / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    return folder


def command(ranks, folder, *arguments):
    return job(ranks, "-m", "mpitp", "generate", "--model", folder, "--max-new-tokens", 4, *arguments)


def ids_of(folder, text):
    """As transformers encodes what a template has made: nothing is added."""
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids


@pytest.mark.launcher
def test_a_chat(folder, tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"},
                {"role": "user", "content": "why"}]
    (tmp_path / "m.json").write_text(json.dumps(messages))
    text = "<s>user hi assistant yes user why model "
    done = command(2, folder, "--chat", "--messages", tmp_path / "m.json", "--json", tmp_path / "r.json")
    assert done.returncode == 0 and not done.stderr, done.stderr
    found, = json.loads((tmp_path / "r.json").read_text())["sequences"]
    assert found["prompt"] == text and found["prompt_ids"] == ids_of(folder, text) and found["prompt_ids"][0] == 27
    alone = command(1, folder, "--ids", ",".join(map(str, found["prompt_ids"])))
    assert ",".join(map(str, found["new_ids"])) == alone.stdout.splitlines()[0]
    assert done.stdout.startswith(found["text"] + "\n")                        # the answer alone
    several = command(2, folder, "--chat", "--prompt", "hi", "--prompt", "you", "--json", tmp_path / "r.json")
    assert [one["prompt"] for one in json.loads((tmp_path / "r.json").read_text())["sequences"]] == [
        "<s>user hi model ", "<s>user you model "], several.stderr
    assert several.stdout.startswith("[0] ") and "\n[1] " in several.stdout


@pytest.mark.launcher
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_typed(folder, ranks, tmp_path):
    """At a pseudo-terminal: each line is answered, with all that was said before; an empty line ends it, or the end."""
    ours, theirs = pty.openpty()
    starter = mpirun(ranks) if ranks > 1 else []
    running = subprocess.Popen([*starter, sys.executable, "-m", "mpitp", "generate", "--model", folder, "--chat",
                                "--max-new-tokens", "3", "--json", str(tmp_path / "r.json"), "--stall-limit", "1"],
                               env=job_environment(MPIEXEC_TIMEOUT="120"), cwd=ROOT, stdin=theirs,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                               preexec_fn=partial(fcntl.ioctl, 0, termios.TIOCSCTTY, 0))   # Open MPI reads no other
    os.close(theirs)
    seen = b""
    for line in (b"hi\n", b"why\n", b"\n" if ranks > 1 else b"\x04"):
        while not seen.rstrip().endswith(b">"):
            seen += os.read(running.stdout.fileno(), 1000) or pytest.fail(running.stderr.read().decode())
        seen = b""
        if line == b"why\n":
            with pytest.raises(subprocess.TimeoutExpired):                     # a pause is longer than --stall-limit
                running.wait(2.5)
        os.write(ours, line)
    out, err = running.communicate(timeout=120)
    os.close(ours)
    assert running.returncode == 0 and not err, err
    first, second = json.loads((tmp_path / "r.json").read_text())["sequences"]
    assert first["prompt"] == "<s>user hi model "
    assert second["prompt"] == f"<s>user hi assistant {first['text']} user why model "
    assert b"prefill" in out


def options(folder, *words):
    """The options of a command line, which are checked."""
    parser = commands.command_parser("generate", generate)
    found = parser.parse_args(["--model", str(folder), *map(str, words)])
    prompts.check_arguments(found)
    return found


@pytest.mark.parametrize("arguments, said", [
    (["--chat"], "found no prompt, and no terminal as standard input"),
    (["--chat", "--ids", "1"], "found --chat with --ids, expected text"),
    (["--chat", "--prompt", "x", "--no-bos"], "found --no-bos with --chat"),
    (["--ids", "1", "--no-bos"], "found --no-bos with --ids"),
    (["--messages", "x"], "found --messages without --chat"),
    (["--chat", "--messages", "/gone/x"], "/gone/x: found No such file or directory"),
    (["--chat", "--messages", "/dev/zero"], "/dev/zero: found a device, expected a file"),
])
def test_bad_input(folder, arguments, said, monkeypatch):
    monkeypatch.setattr(prompts, "is_at_terminal", lambda: False)
    with pytest.raises(InputError, match=said):
        prompts.Prompts(options(folder, *arguments))


@pytest.mark.launcher
def test_a_template_that_fails_ends_all_ranks(folder, tmp_path):
    tiny.write(tmp_path, tiny.load("gemma3_text"))
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    write(tmp_path, tokenizer_config=dict(chat_template="{{ raise_exception('no') }}"))
    done = command(2, tmp_path, "--chat", "--prompt", "x")
    assert done.returncode == 2 and done.stderr.count("mpitp: ") == 1 and not done.stdout, done.stderr
    assert "found messages that the chat template refuses (no), expected others" in done.stderr


def test_a_bos_that_comes_twice(folder, capfd):
    def ids(*arguments):
        given = prompts.Prompts(options(folder, *arguments))
        found = given.encode(given.texts)
        given.tokenizer.close()
        return found[0], capfd.readouterr().err
    twice = "prompt 0 begins with token 27 twice: the text has one, and the tokenizer adds one; --no-bos leaves out"
    assert ids("--prompt", "ab") == ([27, 0, 1], "")
    assert ids("--prompt", "ab", "--no-bos") == ([0, 1], "")
    found, said = ids("--prompt", "<s>ab")
    assert found == [27, 27, 0, 1] and said.count(twice) == 1
    assert ids("--prompt", "<s>ab", "--no-bos") == ([27, 0, 1], "")
    found, said = ids("--chat", "--prompt", "ab")
    assert found == ids_of(folder, "<s>user ab model ") and not said
    found, said = ids("--chat", "--prompt", "ab", "--model", str(folder / "doubled"))
    assert found[:2] == [27, 27] and "prompt 0 begins with <s> twice: the chat template writes one" in said
