"""The verdict for people: three lines first, then the table."""
from __future__ import annotations

import textwrap
from collections.abc import Iterator

from .. import tables
from .dump import EPS
from .inputs import listed
from .patterns import full_name
from .verdict import Row, Verdict

WIDTH = 100
KINDS = {"column_linear": "column-parallel linear layer", "row_linear": "row-parallel linear layer",
         "mlp": "feed-forward block", "attention": "attention layer", "norm": "norm", "embedding": "embedding",
         "loss": "cross entropy", "block": "decoder block", "decoder": "decoder", "gradient_norm": "gradient norm"}
# Where to look, by what the name of a mistake begins with.
LOOK = (("row bias", "where the bias is added, and what its gradient is summed over"),
        ("bias gradient", "the reduction of the bias's gradient, under sequence parallelism"),
        ("g ", "the all-reduce behind the row-parallel product, forward"), ("f ", "the all-reduce of dx, backward"),
        ("dy", "the backward of the all-reduce behind the row-parallel product: it is the identity"),
        ("all sums", "the group that sums are taken over, and how many ranks it has"),
        ("kv", "which key/value heads a rank uses, and the sum of their gradients over the ranks that share one"),
        ("norm gradient", "the reduction of gradients of what every rank has, under sequence parallelism"),
        ("q/k norm", "the reduction of gradients of what every rank has, while heads are split"),
        ("gradient norm", "the sum of squares: what every rank has counts once"),
        ("gradient not cleared", "when gradients are cleared"), ("stale", "when gradients are communicated"),
        ("gradient", "the reduction of gradients over the ranks"),
        ("label smoothing", "the mean over the vocabulary in the loss"),
        ("ids", "the comparison of ids with the ends of a rank's range"),
        ("cross entropy", "the sums over the vocabulary and the number of tokens that divide the loss"),
        ("attention scale", "what the scores are divided by"),
        ("rotary", "the table of cos and sin, its positions, and the turn back"),
        ("attention mask", "which keys a query may attend to"), ("norm", "the norm's settings"),
        ("activation", "the activation's name"), ("gate", "how the fused matrix of gate and up is cut"),
        ("fused", "how the fused matrix is cut"), ("slice", "which range of the weight a rank loads"),
        ("weights swapped", "the names under which weights are loaded"),
        ("transposed", "the memory order of the weight: [out, in]"),
        ("16 bits", "the dtype of products, sums and messages"),
        ("parts", "which range a rank writes, and the order in which parts are gathered"),
        ("gathered", "the order in which parts are gathered"), ("embedding", "the embedding's sum and multiplier"),
        ("a branch", "what is added up to dx"), ("residual", "where x is added: once, after the sum"),
        ("tied", "the two gradients of the tied weight"), ("replicas", "what makes it the same on every rank"),
        ("same dropout", "the seed of dropout: one a shard"),
        ("other dropout", "the seed of dropout: one for replicas"))


def lines(verdict: Verdict) -> Iterator[str]:
    """Yield the lines of a verdict, none wider than 100 columns."""
    for line in head(verdict):
        yield from textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_long_words=True)
    yield ""
    yield from table(verdict)
    for note in verdict.notes:
        yield from textwrap.wrap(f"NOTE: {note}", WIDTH, subsequent_indent="  ")


def head(verdict: Verdict) -> list[str]:
    """Return the three lines."""
    first, what = verdict.first, KINDS[verdict.kind]
    on = tables.count(verdict.ranks, "rank")
    if first is None:
        return right(verdict, what, on)
    wrong = [row.title for row in verdict.rows if row.verdict == "wrong"]
    ranks = f"on {listed(first.wrong_ranks)}" if 0 < len(first.wrong_ranks) < verdict.ranks else "on every rank"
    after = f"; wrong after it: {some(wrong[1:])}" if wrong[1:] else "; everything else is right"
    return [f"WRONG: {article(what)} on {on}: the first wrong tensor is {first.title}, {ranks}{after}.",
            mistake_line(verdict), look_line(verdict, first)]


def right(verdict: Verdict, what: str, on: str) -> list[str]:
    """Return the three lines of a right run."""
    judged = [row for row in verdict.rows if row.reading is not None]
    if not judged:
        return [f"RIGHT so far: {article(what)} on {on}.", "No result could be judged.", "Look at the inputs."]
    worst = max(judged, key=lambda row: row.reading.excess if row.reading else 0)
    reading = worst.reading
    assert reading is not None
    dense = f", the dense run {reading.dense_error:.2g}" if reading.dense_error == reading.dense_error else ""
    return [f"RIGHT: {article(what)} on {on}: all {len(judged)} results are those of a dense run in float64.",
            f"What differs is rounding: at most {reading.error:.2g} eps of {full_name(coarser(worst))} times the "
            f"magnitude (limit {reading.limit:.2g}{dense}), in {worst.title}.",
            "Nothing to do. Sums in another order give other last digits, and so do other numbers of ranks."]


def coarser(row: Row) -> str:
    """Return the dtype of a row."""
    return row.dtype if row.dtype in EPS else "F64"


def mistake_line(verdict: Verdict) -> str:
    """Return the line that names the mistake, or says that it is not known."""
    first = verdict.first
    assert first is not None
    if not verdict.explanations:
        return f"Not a mistake that I know; first wrong at {first.title}."
    best = verdict.explanations[0]
    if not best.is_named:
        return f"Not a mistake that I know; first wrong at {first.title}: {best.text}."
    line = f"The mistake: {best.text}."
    also = [other.text for other in verdict.explanations[1:] if other.complete == best.complete
            and best.complete and other.name not in (best.name, "all sums")]
    if also:
        line += f" The same numbers: {also[0]}."
    if best.leaves and best.explains and not best.complete:
        line += f" It does not account for {some(best.leaves)}."
    return line


def look_line(verdict: Verdict, first: Row) -> str:
    """Return the line that says where to look, with the number that is farthest off."""
    at = ""
    if first.reading is not None and first.reading.worst is not None:
        r = first.reading
        at = f"{first.title} on rank {r.rank} at {list(r.worst or ())}: found {r.found:.9g}, expected {r.expected:.9g}."
    if verdict.explanations:
        name = verdict.explanations[0].name
        where = next((text for start, text in LOOK if name.startswith(start)), "")
        if where:
            return f"Look at {where}. {at}".rstrip()
    known = [row.title for row in verdict.rows if row.verdict == "right" and row.reading is not None]
    before = f"what computes {first.title} of what is right before it"
    last = f" ({known[-1]})" if known and verdict.rows.index(first) > 0 and known_before(verdict, first) else ""
    return f"Look at {before}{last}. {at}".rstrip()


def known_before(verdict: Verdict, first: Row) -> bool:
    """Return whether a right result stands before the first wrong one."""
    return any(row.verdict == "right" and row.reading is not None for row in verdict.rows[:verdict.rows.index(first)])


def article(what: str) -> str:
    """Return a noun with its article."""
    return f"an {what}" if what[0] in "aeiou" else f"a {what}"


def some(names: list[str]) -> str:
    """Return a few names."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def table(verdict: Verdict) -> list[str]:
    """Return the table of all tensors, in the order of computation."""
    rows = []
    for row in verdict.rows:
        r = row.reading
        numbers = ("", "", "", "") if r is None else (f"{r.error:.2g}", f"{r.limit:.2g}", f"{r.normwise:.2g}",
                                                      f"{r.normwise_limit:.2g}")
        mark = row.verdict if row.verdict != "wrong" else f"WRONG, {listed(row.wrong_ranks)}" \
            if 0 < len(row.wrong_ranks) < verdict.ranks else "WRONG"
        first = "  <- first" if row is verdict.first else ""
        rows.append((row.title[:36], row.layout, row.dtype, *numbers, f"{mark}{first}"[:32]))
    return tables.table(("tensor", "layout", "dtype", "error", "limit", "norm", "limit", ""), rows)
