"""What the pages show of runs that no test repeats: whole outputs (`not run`), and times, which are the moment's.

    python docs/recorded.py             exit with 1 if the pages differ from benchmarks/results/recorded.json
    python docs/recorded.py --write     write that file: for whoever has copied another run's output into a page

A figure that is changed in a page alone is found so. Everything else that a page prints is run and compared by a test.
"""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmarks" / "results" / "recorded.json"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONSOLE = re.compile(r"^(?:<!-- (?P<mark>[^\n]*?) -->\n)?```console\n(?P<text>.*?)^```$", re.S | re.M)


def recorded(text: str) -> list[str]:
    """Return the lines of a page's console blocks that no test compares with a run."""
    lines: list[str] = []
    for block in CONSOLE.finditer(text):
        whole = (block["mark"] or "").startswith("not run")
        lines += [line for line in block["text"].splitlines() if whole or line.startswith("  time ")]
    return lines


def of_pages() -> dict[str, list[str]]:
    """Return {page: such lines} of all pages that have some."""
    found = {page.relative_to(ROOT).as_posix(): recorded(page.read_text(encoding="utf-8")) for page in PAGES}
    return {page: lines for page, lines in found.items() if lines}


def main(arguments: list[str]) -> int:
    if arguments == ["--write"]:
        FILE.write_text(json.dumps(of_pages(), indent=1) + "\n", encoding="utf-8")
        return 0
    there, shown = json.loads(FILE.read_text(encoding="utf-8")), of_pages()
    for page in sorted(there.keys() | shown.keys()):
        for line in sorted(set(there.get(page, [])) ^ set(shown.get(page, []))):
            where = "shown, but not recorded" if line in shown.get(page, []) else "recorded, but not shown"
            print(f"{page}: {where}: {line}")
    return int(there != shown)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
