"""The timeline as a picture: a strip a rank, by matplotlib."""
from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from .places import MPI, PRODUCTS, PYTHON
from .spans import Span
from .waiting import Waiting, collectives_of

COLORS = {PYTHON: "#9ecae1", PRODUCTS: "#3182bd", "transfer": "#e6550d", "waiting": "#fdd0a2"}
LONGEST = 4000          # spans of a track that are drawn; the rest would be thinner than a pixel


def require_matplotlib() -> Any:
    """Return matplotlib's pyplot. Raises InputError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("found no matplotlib, expected it, to draw a timeline: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def draw(path: str, of_ranks: Sequence[Sequence[Span]], waiting: Waiting, title: str) -> None:
    """Draw all ranks, one under the other, each with a row for Python, products and MPI.

    Parameters
    ----------
    path : str
        Of the picture.
    of_ranks : list of list of Span
        Of each rank, on one clock.
    waiting : Waiting
    title : str
    """
    plt = require_matplotlib()
    first = min((span.start for spans in of_ranks for span in spans), default=0)
    figure, axes = plt.subplots(figsize=(12, 1.5 + 1.1 * len(of_ranks)), layout="constrained")
    ticks = []
    for rank, spans in enumerate(of_ranks):
        collectives = collectives_of(spans)
        lost = [] if len(of_ranks) == 1 else [(collectives[n].start, float(waited)) for n, waited in
                                              zip(waiting.number[rank], waiting.waited[rank]) if n >= 0]
        rows = {PYTHON: pieces(spans, PYTHON), PRODUCTS: pieces(spans, PRODUCTS),
                "transfer": pieces(spans, MPI), "waiting": lost}
        for row, color in COLORS.items():
            at = -4 * rank - {PYTHON: 0, PRODUCTS: 1}.get(row, 2)
            bars = sorted(rows[row], key=lambda bar: -bar[1])[:LONGEST]
            axes.broken_barh([((start - first) * 1e-6, length * 1e-6) for start, length in bars], (at - 0.45, 0.9),
                             facecolors=color, label=row if rank == 0 else None)
        ticks.append((-4 * rank - 1, f"rank {rank}"))
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks])
    axes.set_xlabel("milliseconds")
    axes.set_title(title, fontsize=9, wrap=True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def pieces(spans: Sequence[Span], track: str) -> list[tuple[float, float]]:
    """Return (start, length) of the spans of a track."""
    return [(span.start, span.end - span.start) for span in spans if span.track == track]
