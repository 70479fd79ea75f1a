"""Mistakes in what is split by vocabulary: the embedding, the cross entropy; and in norms of gradients."""
from __future__ import annotations

import dataclasses
from functools import partial
from math import prod

import numpy as np

from ..case import Case
from ..ranks import Local, add_up
from .mistake import Mistake, Planted, doubled, left_out, mean, missing, times_ranks

LOSSES = ("loss", "decoder")


def vocabulary(case: Case) -> tuple:
    """Return each rank's ids of the vocabulary, none where it is not split."""
    place = case.places.get("logits" if case.kind == "loss" else "embedding.weight" if case.kind == "decoder" else
                            "weight")
    axis = 0 if place is None else place.axis
    return () if place is None or case.ranks == 1 or (axis != 0 and case.kind != "loss") else place.parts


def smoothing(case: Case) -> Planted:
    """Smooth labels over a rank's own vocabulary, or over the other ids alone, or not."""
    s = case.options["label_smoothing"]
    if case.kind not in LOSSES or not s:
        return
    parts = vocabulary(case)
    V = case.inputs["logits"].shape[-1] if case.kind == "loss" else case.config.vocab_size
    others = s * V / (V - 1) if V > 1 else s
    yield "label smoothing is spread over the other ids, the target not among them: V - 1", smoothed(case, [others])
    yield "label smoothing is missing", smoothed(case, [0.0])
    yield "label smoothing is missing in the gradient", case.with_faults({"smoothing_back": left_out})
    yield "label smoothing is missing in the loss, not in its gradient", \
        smoothed(case, [0.0]).with_faults({"smoothing_back": partial(each, found=list(case.smoothing))})
    if not parts:
        return
    sizes = [max(2, len(part)) for part in parts]
    local = partial(local_means, sizes=sizes, V=V)
    over = {"smooth": local, "smooth_size": partial(each, found=sizes)}
    # Megatron-LM spreads a over the other ids: s = a V / (V - 1) of them all, and a n / (n - 1) of a rank's n.
    for of_ranks in ([s * (V - 1) / V * n / (n - 1) for n in sizes], [s * n / (n - 1) for n in sizes],
                     [s] * case.ranks, [others] * case.ranks):
        yield "label smoothing is over the rank's own part of the vocabulary, not over all of it", \
            smoothed(case, of_ranks).with_faults(over)
    sums = partial(own_sums_over, sizes=sizes, V=V)
    yield "label smoothing adds up all logits but divides by the rank's own part of the vocabulary", \
        case.with_faults({"smooth": sums, "smooth_size": partial(each, found=sizes)})


def smoothed(case: Case, of_ranks: list[float]) -> Case:
    """Return the case with another label smoothing."""
    return dataclasses.replace(case, smoothing=tuple(of_ranks) if len(of_ranks) > 1 else
                               tuple(of_ranks) * case.ranks)


def local_means(summands: Local, sizes: list[int], V: int) -> Local:
    """Give every rank V times the mean over its own ids."""
    return [summand * (V / n) for summand, n in zip(summands, sizes)]


def own_sums_over(summands: Local, sizes: list[int], V: int) -> Local:
    """Give every rank the sum over all ids, as if it were a mean over its own number of ids."""
    return [add_up(summands) * (V / n) for n in sizes]


def each(values: Local, found: Local) -> Local:
    """Give every rank its own of a list."""
    return found


def masked_ids(case: Case) -> Planted:
    """Take the last or the first id of a rank's range for another rank's, or all ids as numbers of the next rank."""
    parts = vocabulary(case)
    if not parts:
        return
    for role, names in (("target_rows", LOSSES), ("embedding_rows", ("embedding", "decoder"))):
        if case.kind not in names:
            continue
        what = "target" if role == "target_rows" else "embedded token"
        for column, which in ((-1, "last"), (0, "first")):
            yield f"the {which} id of a rank's range is masked as another rank's: an {what} with it counts as 0" \
                .replace("an target", "a target"), case.with_faults({role: partial(without, column=column)})
        yield f"ids outside of a rank's range are not masked: an {what} takes the rank's first row".replace(
            "an target", "a target"), case.with_faults({role: unmasked})
        for step, how in ((1, "one too late"), (-1, "one too early")):
            yield f"each rank's range of ids begins {how}", case.with_faults({role: partial(rolled, step=step)})
    if case.kind in LOSSES:
        for column, which in ((-1, "last"), (0, "first")):
            yield (f"the {which} id of a rank's range is masked as another rank's in the loss, not in its gradient: a "
                   f"target with it counts as 0"), \
                case.with_faults({"target_rows_forward": partial(without, column=column)})
    if case.kind == "loss":
        yield ("the last id of a rank's range is masked as another rank's before the maximum is taken off: its logit "
               "counts as 0"), case.with_faults({"target_logit": partial(as_zero, case=case, parts=parts)})


def without(rows: Local, column: int) -> Local:
    """Mask one id of every rank."""
    out = []
    for row in rows:
        row = row.copy()
        if row.shape[-1]:
            row[..., column] = 0
        out.append(row)
    return out


def unmasked(rows: Local) -> Local:
    """Take the first row of a rank for every id that is not its own."""
    out = []
    for row in rows:
        row = row.copy()
        if row.shape[-1]:
            row[..., 0] += row.sum(axis=-1) == 0
        out.append(row)
    return out


def rolled(rows: Local, step: int) -> Local:
    """Take for each id of a rank the row beside its own."""
    return [np.roll(row, step, axis=-1) for row in rows]


def as_zero(summands: Local, case: Case, parts: tuple) -> Local:
    """Add up logits of targets, those of the last ids of ranges being 0."""
    logits, targets = case.inputs["logits"], case.inputs["targets"]
    highest, total = logits.max(axis=-1), add_up(summands)
    last = np.isin(targets, [part[-1] for part in parts if len(part)])
    return [np.where(last, -highest, total)] * len(summands)


def sums_of_loss(case: Case) -> Planted:
    """Take a sum of the cross entropy wrongly, or divide by another number of tokens."""
    if case.kind not in LOSSES:
        return
    P = case.ranks
    if vocabulary(case):
        for role, what in (("sum_exp", "the sum of e^z"), ("target_logit", "the target's logit")):
            yield f"{what} is not summed over the ranks", case.with_faults({role: missing})
            more = f": the loss is log {P} too large" if role == "sum_exp" else ""
            yield f"{what}, complete on every rank, is summed over the ranks: {P} times{more}", \
                case.with_faults({role: doubled})
            yield f"{what} is a mean over the ranks: divided by {P}", case.with_faults({role: mean})
    if case.kind == "loss" and vocabulary(case):
        own = [case.inputs["logits"][..., part].max(axis=-1, initial=-np.inf) for part in vocabulary(case)]
        yield "the maximum that is taken off the logits is that of the rank's own part of the vocabulary", \
            case.with_faults({"highest": partial(each, found=own)})
    targets = case.inputs["targets"]
    every = prod(targets.shape)
    counted = int((targets != case.options["ignore_index"]).sum())
    if counted != every:
        yield "the mean is over all tokens, those that do not count among them", \
            case.with_faults({"count": partial(constant, value=every), "count_tokens": partial(constant, value=every)})
    yield "the loss is the sum over the tokens, not their mean", \
        case.with_faults({"count": partial(constant, value=1), "count_tokens": partial(constant, value=1)})
    if P > 1:
        yield f"the loss is divided by {P}, the ranks", case.with_faults(
            {"count": times_ranks, "count_tokens": times_ranks})
    if case.tokens is not None and case.by_tokens:
        own = [max(1, int((np.take(targets, part, case.tokens.axis) != case.options["ignore_index"]).sum()))
               for part in case.tokens.parts]
        local = partial(each, found=own)
        yield "each rank averages over its own valid tokens, and the ranks' means are averaged", case.with_faults(
            {"count_tokens": partial(each, found=[n * P for n in own])})
        yield "each rank averages over its own valid tokens, and keeps its own mean", case.with_faults(
            {"count_tokens": local, "loss_tokens": missing})
        yield "each rank averages over its own valid tokens, and the means are added up", case.with_faults(
            {"count_tokens": local})
        yield "the loss is not summed over the ranks", case.with_faults({"loss_tokens": missing})
    scale = case.options["loss_scale"]
    if scale != 1:
        for factor, what in ((scale, "twice"), (1 / scale, "not at all")):
            yield f"the loss scale, {scale:g}, is applied {what}", case.with_faults(
                {"d_logits": partial(multiplied, factor=factor)})


def constant(values: Local, value: float) -> Local:
    """Give every rank the same number."""
    return [value] * len(values)


def multiplied(values: Local, factor: float) -> Local:
    """Multiply by a number."""
    return [value * factor for value in values]


def multipliers(case: Case) -> Planted:
    """Forget the embedding's multiplier, or apply it twice."""
    m = case.config.embedding_multiplier
    if case.kind in ("embedding", "decoder") and m != 1:
        yield f"the embedding's multiplier, {m:g}, is missing", case.with_config(embedding_multiplier=1.0)
        yield f"the embedding's multiplier, {m:g}, is applied twice", case.with_config(embedding_multiplier=m * m)


def norm_of_gradients(case: Case) -> Planted:
    """Count replicated gradients on every rank, or only this rank's share."""
    if case.kind != "gradient_norm":
        return
    P = case.ranks
    yield f"the gradient norm counts what every rank has {P} times", case.with_faults({"norm_replicated": times_ranks})
    yield "the gradient norm is not summed over the ranks: each has its own share", \
        case.with_faults({"norm_squares": missing})
    yield "the gradient norm leaves out what every rank has", case.with_faults({"norm_replicated": left_out})
    yield "the gradient norm is averaged over the ranks", case.with_faults({"norm_squares": mean})
    yield "all gradients, split or not, are counted P times", case.with_faults(
        {"norm_squares": doubled, "norm_replicated": times_ranks})
    yield "the square root is not taken", case.with_faults({"norm_value": squared})
    yield "the ranks' norms are added up, not their squares", case.with_faults(
        {"norm_squares": roots_summed})


def squared(values: Local) -> Local:
    """Return squares."""
    return [value * value for value in values]


def roots_summed(summands: Local) -> Local:
    """Return the square of the sum of square roots."""
    return [add_up([np.sqrt(summand) for summand in summands]) ** 2] * len(summands)


MISTAKES = (Mistake("label smoothing", smoothing), Mistake("ids of a range", masked_ids),
            Mistake("cross entropy", sums_of_loss), Mistake("embedding multiplier", multipliers),
            Mistake("gradient norm", norm_of_gradients))
