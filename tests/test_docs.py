"""The pages of docs/: what they print, their tables, their links, and the site that is built of them."""
import importlib.util
import json
import re
import subprocess
import sys

import pytest

import mpitp.oracle
import pages
from mpitp.commands.verify_all import ratio_text
from spmd import ROOT, job, job_environment

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
SITE = ("sphinx", "furo", "myst_parser", "numpydoc")                # docs/requirements.txt


def load_page_script(name):
    found = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.launcher
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_outputs(page, tmp_path):
    pages.check(page, tmp_path)


def test_every_block_is_run_or_says_why_not():
    """The few that are only shown are known here, so that a new one is seen."""
    found = {page.name: [pages.kind(block) for block in pages.blocks(page)] for page in PAGES}
    left_out = {name: kinds.count("not run") for name, kinds in found.items() if "not run" in kinds}
    assert left_out == {"checkpoints.md": 2, "faults.md": 1, "sharp_bits.md": 3, "timeline.md": 1}
    assert sum(kinds.count("console") for kinds in found.values()) >= 15
    assert found["tutorial.md"].count("python") >= 10


@pytest.mark.launcher
@pytest.mark.parametrize("text", [
    "```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n",
    "```python\nprint(1 + 1)\n```\n",                               # prints what the page does not show
    "```console\n$ echo 0.1250\n0.1251\n```\n",
    "```console\n$ false\n```\n",
    "```console\n$ false | cat\n```\n",
    "<!-- fails -->\n```console\n$ true\n```\n",
    "<!-- rounding -->\n```console\n$ echo y 0.1250\ny 0.1252\n```\n",
    "<!-- machine -->\n```console\n$ echo 0123456789abcdef x\nfedcba9876543210 y\n```\n",
    "<!-- verdicts -->\n```console\n$ echo 'mlp  6  2  ok'\nmlp  6  3  ok\n```\n",
    "<!-- shown in LICENSE -->\n```python\nnot = there\n```\n",
    "<!-- no such mark -->\n```console\n$ true\n```\n",
    "```ruby\nputs 1\n```\n",
])
def test_a_page_that_is_wrong_is_found(text, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text)
    (tmp_path / "work").mkdir()
    with pytest.raises(AssertionError):
        pages.check(page, tmp_path / "work")


def test_tables_are_those_of_the_result_files(tmp_path):
    figures = load_page_script("figures")
    for page in figures.PAGES:
        assert figures.filled(page.read_text()) == page.read_text(), f"{page.name}: python docs/figures.py"
    names = [name for page in figures.PAGES for _, name, _ in figures.MARKED.findall(page.read_text())]
    assert sorted(names) == sorted(figures.TABLES)                  # each once, and none without its end
    assert sum(page.read_text().count("<!-- figures:") for page in figures.PAGES) == len(names)


def test_recorded_lines_are_those_of_their_runs():
    """Outputs that no test repeats, and times: another figure in a page than in benchmarks/results is found."""
    recorded = load_page_script("recorded")
    assert recorded.of_pages() == json.loads(recorded.FILE.read_text()), "python docs/recorded.py"
    readme = (ROOT / "README.md").read_text()
    assert re.search(r"\d+% of it in communication", readme)
    assert recorded.recorded(re.sub(r"\d+% of it", "61% of it", readme)) != recorded.recorded(readme)


def test_the_layers_that_verify_shows_are_those_of_the_accuracy_table():
    """Two runs of the same numbers: what does not depend on the number of ranks is equal, and so is what is of 3."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "accuracy.json").read_text())["rows"]
    text = (DOCS / "accuracy.md").read_text()
    shown = {line.strip().split("  ")[0]: line.split()[-7:-2] for line in text.splitlines() if line.endswith("  ok")}
    assert shown.keys() == rows.keys() and len(rows) == 25
    for title, (_, error, dense, of_norm, of_norm_dense) in shown.items():
        row = rows[title]
        assert of_norm == f"{row['of_norm']['3']:.2f}" and of_norm_dense == f"{row['of_norm_dense']:.2f}", title
        assert dense == ratio_text(row["error_dense"]) and float(error) <= 1.05 * row["error"], title


def steps_of_the_walk():
    """[(file:line, the line)] as the design page shows them."""
    section = (DOCS / "design.md").read_text().split("## The walk of x")[1]
    return re.findall(r"^\| `([^`]+:\d+)` \| `(.+?)` \| .+ \|$", section, re.M)


def test_each_step_of_the_walk_is_the_line_that_it_names():
    steps = steps_of_the_walk()
    assert steps[0][0].startswith("__main__.py:") and ".Allreduce(" in steps[-1][1] and len(steps) >= 15
    for place, shown in steps:
        file, number = place.split(":")
        line = (ROOT / "mpitp" / file).read_text().splitlines()[int(number) - 1]
        assert line.strip().startswith(shown.replace(r"\|", "|")), place


@pytest.mark.launcher
def test_verify_takes_the_walk():
    """The lines are executed in this order, on two ranks."""
    done = job(2, ROOT / "tests" / "support" / "walk_job.py")
    assert done.returncode == 0, done.stderr
    executed = [line for line in done.stdout.splitlines() if re.fullmatch(r"\S+\.py:\d+", line)]
    steps, at = [place for place, _ in steps_of_the_walk()], 0
    for place in steps:
        assert place in executed[at:], f"{place} is not executed behind the step before it"
        at = executed.index(place, at) + 1
    entry = next(place for place in steps if place.startswith("layers/mlp.py"))
    assert executed[:at].count(entry) == 1, "the walk is that of one forward, the first"


def test_a_table_that_was_changed_by_hand_is_found():
    figures = load_page_script("figures")
    text = (DOCS / "performance.md").read_text()
    assert "| 1.03 | 2.17 |" in text or figures.filled(text) == text
    wrong = re.sub(r"(\| \*\*mpitp\*\* \| )(\d)", r"\g<1>9\2", text, count=1)
    assert wrong != text and figures.filled(wrong) == text


def test_the_api_page_has_every_public_name():
    listed = {"mpitp": [], "mpitp.oracle": []}
    for module, names in re.findall(r"currentmodule:: (\S+)\n.*?:nosignatures:\n\n((?:   \S+\n)+)",
                                    (DOCS / "api.md").read_text(), re.S):
        listed[module] += names.split()
    assert sorted(listed["mpitp"]) == sorted(mpitp.__all__)
    assert sorted(listed["mpitp.oracle"]) == sorted(mpitp.oracle.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (DOCS / link).exists(), link


def test_no_page_is_lost():
    index = (DOCS / "index.md").read_text()
    listed = [name for names in re.findall(r":hidden:\n\n((?:\w+\n)+)", index) for name in names.split()]
    assert sorted([*listed, "index"]) == [page.stem for page in PAGES]


@pytest.mark.launcher
@pytest.mark.slow
@pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in SITE), reason="needs docs/requirements.txt")
def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run([sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", tmp_path],
                          cwd=ROOT, env=job_environment(), capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tutorial.html").exists() and (tmp_path / "generated" / "mpitp.ParallelMLP.html").exists()
