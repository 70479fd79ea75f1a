"""What the README shows is what happens: its commands are run, its output compared; and it is short."""
import re

import pytest

import pages
from pages import require_alike, run
from spmd import ROOT

PAGE = ROOT / "README.md"
README = PAGE.read_text()


def shown(command):
    """The output under `$ command` in the README."""
    (text,) = [text for block in pages.blocks(PAGE) for found, text in block.commands if found == command]
    return text


@pytest.mark.launcher
def test_its_outputs(tmp_path):
    pages.check(PAGE, tmp_path)


def test_what_a_newcomer_meets_first():
    """One sentence, the figure, code, and the command with its real output, in this order and on the first screens."""
    text = "Tensor parallelism for transformers in plain NumPy and MPI"
    places = [README.index(found) for found in (text, "rows 0:20", "def mlp_forward", "by_hand.py\n", "$ ./run.sh\n")]
    assert places == sorted(places) and README.count("\n", 0, places[-1]) < 60
    kinds = [pages.kind(block) for block in pages.blocks(PAGE)]
    assert "python" not in kinds and "not run" not in kinds and kinds.count("console") >= 2
    assert "./run.sh test" in README


def test_it_is_short():
    assert len(README.splitlines()) <= 200
    printed = [text for block in pages.blocks(PAGE) for _, text in block.commands]
    assert max(len(line) for text in printed for line in text.splitlines()) <= 100


def test_the_reading_list_can_be_read():
    """At most 3,500 lines, each file once, and the student's first sitting of 600."""
    section = README[README.index("## Reading list"):README.index("## Scope")]
    files = re.findall(r"\]\(([^)]+\.py)\)", section)
    lines = [len((ROOT / file).read_text().splitlines()) for file in files]
    first = re.findall(r"\]\(([^)]+\.py)\)", section[:section.index("How the ranks add up:")])
    assert len(files) == len(set(files)) and files[0] == "examples/by_hand.py" and files[:len(first)] == first
    assert sum(lines) <= 3500 and sum(lines[:len(first)]) <= 600, list(zip(files, lines))


@pytest.mark.launcher
def test_a_decoder_of_ones_own_has_the_same_digits_on_any_number_of_ranks():
    """Three ranks are the page's own run of it, docs/own_program.md."""
    command = "./run.sh -n 2 examples/decoder.py"
    assert run(command) == run(command.replace("-n 2", "-n 1"))


@pytest.mark.launcher
@pytest.mark.weekly                                 # the commands of docs/same_bits.md, which test_docs.py runs
def test_the_same_bits():
    command = "./run.sh -n 3 verify --hidden-size 64 --reproducible | grep sha256"
    assert len({run(command.replace("-n 3", f"-n {ranks}")) for ranks in (1, 2, 3)}) == 1


def test_a_number_that_is_off_would_be_seen():
    text = shown("./run.sh")
    require_alike(text, text)
    for right, wrong in (("2 x all_reduce", "3 x all_reduce"), ("True", "False"), ("+0.127986", "-0.127986"),
                         ("-0.447968; dense", "-0.446968; dense"), ("  ok", "  FAILED"),
                         ("0.04   0.04", "0.64   0.04")):
        assert right in text
        with pytest.raises(AssertionError):
            require_alike(text.replace(right, wrong, 1), text)


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)
