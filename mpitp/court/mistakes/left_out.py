"""Mistakes in what is added together: a branch of dx left out, a residual counted P times, tokens moved."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import permutations

import numpy as np

from ..case import Case
from ..layouts import take
from ..ranks import Local
from .mistake import Mistake, Planted, left_out, times_ranks

BRANCHES = {"mlp": ("up", "gate"), "attention": ("query", "key", "value")}


def branches_of_dx(case: Case) -> Planted:
    """Leave one of the products that make up dx out."""
    for part, names in BRANCHES.items():
        if case.kind not in (part, "block", "decoder"):
            continue
        for name in names:
            if name != "gate" and part == "mlp" and not any(w.endswith("gate.weight") for w in case.whole):
                continue
            if any(w.endswith(f"{name}.weight") for w in case.whole):
                yield f"dx leaves out the part that comes through {name}", case.with_faults({f"dx_{name}": left_out})


def rotary_back(case: Case) -> Planted:
    """Do not turn gradients back, or turn them further."""
    if case.kind not in ("attention", "block", "decoder") or case.config.position_embedding != "rotary":
        return
    yield "the gradients of queries and keys are not turned back by their rotary positions", \
        case.with_faults({"turns_back": no_turn})
    yield "the gradients of queries and keys are turned on by their rotary positions, not back", \
        case.with_faults({"turns_back": turn_on})


def no_turn(turns: Local) -> Local:
    """Keep the norm, forget the rotation."""
    return [(saved_norm, None) for saved_norm, _ in turns]


def turn_on(turns: Local) -> Local:
    """Change the sign of the angle."""
    return [(saved_norm, saved and (saved[0], -saved[1], saved[2])) for saved_norm, saved in turns]


def residuals(case: Case) -> Planted:
    """Count what every rank has P times, or not at all."""
    if case.kind not in ("block", "decoder"):
        return
    ways: list[tuple[str, Callable, str]] = [("left out", left_out, "is left out")]
    if case.ranks > 1:
        ways.append(("P times", times_ranks, f"is added on every rank before the sum: {case.ranks} times"))
    for _, fault, how in ways:
        yield f"the residual x {how}", case.with_faults({"residual_x": fault})
        yield f"the residual x {how}, and so is its gradient", \
            case.with_faults({"residual_x": fault, "residual_dx": fault})
        yield f"the gradient of the residual {how}", case.with_faults({"residual_dx": fault})
        if case.kind == "decoder" and case.config.position_embedding == "learned":
            yield f"the learned position {how}", case.with_faults({"position_y": fault})


def tied(case: Case) -> Planted:
    """Leave one of the two gradients of a tied embedding out."""
    if case.kind == "decoder" and case.config.tie_word_embeddings:
        yield "the gradient of the tied embedding leaves out the head's part", case.with_faults({"tied_head": left_out})
        yield "the gradient of the tied embedding leaves out the embedding's part", \
            case.with_faults({"tied_embedding": left_out})


def gathered(case: Case) -> Planted:
    """Put the ranks' tokens together in another order, or use only one's own."""
    kinds = ("mlp", "attention", "column_linear")
    if case.tokens is None or case.by_tokens or case.ranks == 1 or case.kind not in kinds:
        return
    ranks = range(case.ranks)
    for order in permutations(ranks) if case.ranks < 5 else [tuple(ranks)[::-1]]:
        if order == tuple(ranks):
            continue
        index = np.concatenate([case.tokens.parts[rank] for rank in order])
        moved = partial(reordered, index=index, axis=case.tokens.axis)
        said = ", ".join(map(str, order))
        yield f"the tokens of the ranks are gathered in the order {said}", case.with_faults({"input_x": moved})
        yield f"dy is gathered over the ranks in the order {said}", case.with_faults({"input_dy": moved})
        yield f"the tokens of the ranks are gathered in the order {said}, and so is dy", \
            case.with_faults({"input_x": moved, "input_dy": moved})


def reordered(values: Local, index: np.ndarray, axis: int) -> Local:
    """Take the tokens in another order."""
    return [take(value, index, axis) for value in values]


MISTAKES = (Mistake("a branch of dx left out", branches_of_dx), Mistake("rotary backward", rotary_back),
            Mistake("residual", residuals), Mistake("tied embedding gradient", tied),
            Mistake("parts gathered in another order", gathered))
