"""Run the zoo: each mistake in its program, the dump of its ranks to the judge, and what the judge answers.

    python examples/zoo/run.py                      the programs in plain NumPy and mpitp's layers
    python examples/zoo/run.py --torch              those of torch besides: pip install -r examples/zoo/requirements.txt
    python examples/zoo/run.py --correct 300        that many right programs: nothing may be found
    python examples/zoo/run.py --only bias          the cases with this in their name, kind or source
    python examples/zoo/run.py --mpi                the plain programs on the ranks of mpirun, not on threads
    python examples/zoo/run.py --json               for programs
    python examples/zoo/run.py --torch --write docs/zoo.md      the tables of that page

A case is found if the judge calls every run of it wrong, on each number of ranks; named if the mistake that the judge
puts first is the one that was made.
"""
import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from case import Case
from hosts import HOSTS, cases_of, dump_cases, dump_of
from mpitp.court.dump import read_dump
from mpitp.court.verdict import judge
from mpitp.errors import InputError


@dataclass
class Result:
    """What the judge answers to a case.

    Parameters
    ----------
    case : Case
    found, named : bool
    answers : list of str
        On each number of ranks: the name and the sentence of what it put first, or why it could not judge.
    first : list of str
        The first wrong tensors.
    seconds : float
        Of the runs and of the judge.
    """
    case: Case
    found: bool
    named: bool
    answers: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)
    seconds: float = 0.0


def judged(folder: str | Path) -> tuple[bool, str, str]:
    """Return (whether a dump is wrong, "name: sentence" of what is put first, the first wrong tensor)."""
    try:
        verdict = judge(read_dump(folder))
    except InputError as error:
        return False, f"not judged: {error}", ""
    first = verdict.first
    if first is None:
        return False, "right", ""
    best = verdict.explanations[0] if verdict.explanations else None
    return True, "not a mistake that it knows" if best is None else f"{best.name}: {best.text}", first.title


def run_case(case: Case, folder: Path) -> Result:
    """Judge the dumps of a case on each number of ranks, after making those that are made in this process."""
    start = time.perf_counter()
    result = Result(case, True, True)
    for ranks in case.ranks:
        where = dump_of(folder, case, ranks)
        try:
            if not where.exists():
                HOSTS[case.host].make(case, ranks, where)
            wrong, answer, first = judged(where)
        except subprocess.CalledProcessError as error:
            wrong, answer, first = False, f"did not run: {(error.stderr or '').strip().splitlines()[-1:]}", ""
        result.found &= wrong
        result.named &= wrong and re.search(case.named, answer) is not None
        result.answers.append(answer)
        result.first.append(first)
    result.seconds = time.perf_counter() - start
    return result


def run_cases(cases: list[Case], on_mpi: bool = False) -> list[Result]:
    """Run cases: those that need ranks of their own together, one job for each number of ranks."""
    folder = Path(tempfile.mkdtemp(prefix="mpitp-zoo-"))
    try:
        seconds = dump_cases(cases, folder, on_mpi)
        results = [run_case(case, folder) for case in cases]
        for result in results:
            result.seconds += seconds.get(result.case.host, 0.0)
        return results
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- what is printed -----------------------------------------------------------------------------------------------

def share(part: int, of: int) -> str:
    """Return "39 of 40 (98%)"."""
    return f"{part} of {of} ({100 * part // max(1, of)}%)"


def table(results: list[Result]) -> list[str]:
    """Return the lines of the table, for Markdown."""
    lines = ["| case | host | ranks | found | named | seconds | source |",
             "| --- | --- | --- | --- | --- | ---: | --- |"]
    for r in results:
        c = r.case
        lines.append(f"| {c.name} | {c.host} | {', '.join(map(str, c.ranks))} | {'yes' if r.found else '**no**'} | "
                     f"{'yes' if r.named else '**no**'} | {r.seconds:.1f} | {c.source} |")
    return lines


def confusion(results: list[Result]) -> list[str]:
    """Return the confusion matrix: for each family of mistakes what the judge answered how often, over all runs."""
    counts_of: dict[str, Counter] = {}
    for r in results:
        counts_of.setdefault(r.case.family, Counter()).update(
            "**right**" if one == "right" else f"**{one.split(':')[0]}**" if one.startswith(("not ", "did not"))
            else one.split(":")[0] if re.search(r.case.named, one) else f"**{one.split(':')[0]}**" for one in r.answers)
    lines = ["| made | runs | what the judge put first |", "| --- | ---: | --- |"]
    for made, counts in sorted(counts_of.items()):
        lines.append(f"| {made} | {sum(counts.values())} | "
                     f"{', '.join(f'{name} {count}' for name, count in counts.most_common())} |")
    return lines


def not_found(results: list[Result]) -> list[str]:
    """Return a line for every case that was not found or not named, with the answer."""
    return [f"{'NOT FOUND' if not r.found else 'NOT NAMED'}: {r.case.name} ({r.case.host}, {ranks} ranks): {answer}"
            for r in results for ranks, answer in zip(r.case.ranks, r.answers)
            if answer == "right" or not re.search(r.case.named, answer)]


def summary(results: list[Result], seconds: float) -> str:
    """Return the last lines."""
    found, named = sum(r.found for r in results), sum(r.named for r in results)
    return f"found {share(found, len(results))}, named {share(named, len(results))}\n  time {seconds:.0f} s"


def write(page: Path, results: list[Result], seconds: float) -> None:
    """Put the tables of the results between the marks of a page."""
    missed = not_found(results)
    parts = table(results), confusion(results), [f"- {line}" for line in missed] or ["Nothing."]
    heads = summary(results, seconds).replace("\n  time", ", in"), "## What the judge put first", \
        "## What was not found, or called by another name"
    text = f"{heads[0]}.\n\n" + "\n".join(parts[0]) + "".join(
        f"\n\n{head}\n\n" + "\n".join(part) for head, part in zip(heads[1:], parts[1:]))
    old = page.read_text(encoding="utf-8")
    new = re.sub(r"(<!-- the zoo -->\n).*(\n<!-- end of the zoo -->)", lambda m: m[1] + text + m[2], old, flags=re.S)
    page.write_text(new, encoding="utf-8")


def as_dict(r: Result) -> dict[str, Any]:
    """Return a result by the keys of the JSON."""
    return {"case": r.case.name, "host": r.case.host, "kind": r.case.kind, "source": r.case.source,
            "ranks": list(r.case.ranks), "found": r.found, "named": r.named, "answers": r.answers,
            "first_wrong": r.first, "seconds": round(r.seconds, 3)}


def main() -> int:
    """Run what the command line asks for. Returns 0 if all is as it must be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--torch", action="store_true", help="the cases on gloo ranks of torch besides")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this in their name, kind or source")
    parser.add_argument("--host", choices=tuple(HOSTS), help="cases of this host alone")
    parser.add_argument("--ranks", type=int, metavar="P", help="on P ranks alone")
    parser.add_argument("--mpi", action="store_true", help="run the plain programs under mpirun")
    parser.add_argument("--correct", type=int, metavar="N", help="run N right programs in place of the mistakes")
    parser.add_argument("--seed", type=int, default=0, help="of the right programs")
    parser.add_argument("--write", metavar="PAGE", help="put the tables into a page, such as docs/zoo.md")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    start = time.perf_counter()
    if arguments.correct is not None:
        from correct import main_correct
        return main_correct(arguments.correct, arguments.seed, judged, arguments.json)
    wanted = arguments.only.lower()
    cases = [case for case in cases_of(arguments.torch or arguments.host == "torch")
             if wanted in f"{case.name} {case.kind} {case.source}".lower() and arguments.host in (None, case.host)]
    if arguments.ranks:
        cases = [replace(case, ranks=(arguments.ranks,)) for case in cases]
    results = run_cases(cases, arguments.mpi)
    seconds = time.perf_counter() - start
    if arguments.json:
        print(json.dumps({"schema": "mpitp.zoo/1", "cases": [as_dict(r) for r in results],
                          "found": sum(r.found for r in results), "named": sum(r.named for r in results),
                          "of": len(results), "seconds": round(seconds, 1)}, indent=1))
    else:
        for r in results:
            print(f"{'found' if r.found else 'MISSED':7}{'named' if r.named else 'MISNAMED':9}{r.case.host:6} "
                  f"{r.case.name}")
        print(*not_found(results), summary(results, seconds), sep="\n")
    if arguments.write:
        write(Path(arguments.write), results, seconds)
    enough = sum(r.found for r in results) >= 0.95 * len(results) and \
        sum(r.named for r in results) >= 0.85 * len(results)
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main())
