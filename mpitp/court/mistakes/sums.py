"""Mistakes in sums over ranks, and in what is added beside them."""
from __future__ import annotations

from functools import partial

import numpy as np

from ..case import Case
from ..ranks import Fault, Local
from .mistake import (Mistake, Planted, doubled, first_alone, largest, left_out, mean, missing, on_first,
                      over_ranks, times_ranks)

WHERE = {"attention": "attention's ", "mlp": "feed-forward block's ", "head": "head's ", "": ""}


def parts(case: Case) -> tuple[str, ...]:
    """Return the parts of which one alone may have a mistake: the whole code first."""
    return {"block": ("", "attention", "mlp"), "decoder": ("", "attention", "mlp", "head")}.get(case.kind, ("",))


def at_role(case: Case, role: str, fault: Fault, sentence: str) -> Planted:
    """Make a mistake at a role of every part, then of one part alone; {} in the sentence names the part."""
    for part in parts(case):
        key = f"{part}.{role}" if part else role
        yield sentence.format(WHERE[part], P=case.ranks), case.with_faults({key: fault})


def role_mistake(name: str, role: str, fault: Fault, sentence: str) -> Mistake:
    """Return the mistake of one fault at one role."""
    return Mistake(name, partial(at_role, role=role, fault=fault, sentence=sentence))


def twice(values: Local) -> Local:
    """Count everything twice."""
    return [value * 2.0 for value in values]


def bias_twice(case: Case) -> Planted:
    """Add the bias twice; on two ranks that is once a rank."""
    if case.ranks != 2:
        yield from at_role(case, "row_bias", twice, "the {}row-parallel bias is added twice")


def bias_divided(case: Case) -> Planted:
    """Divide the bias by P, so that the sum has it once, and forget its gradient."""
    yield (f"each rank adds 1/{case.ranks} of the row-parallel bias: y is right, its gradient {case.ranks} times too "
           f"small"), case.with_faults({"row_bias_value": over_ranks})


def both_biases(case: Case) -> Planted:
    """Add the bias P times, and take its gradient P times."""
    yield (f"the row-parallel bias is added on each of {case.ranks} ranks before the sum, and its gradient summed over "
           f"them"), case.with_faults({"row_bias": times_ranks, "row_bias_value": times_ranks})


def both_divided(case: Case) -> Planted:
    """Divide the bias by P though it is added after the sum, and with it its gradient."""
    yield (f"the row-parallel bias is divided by {case.ranks}, the ranks, and so is its gradient"), \
        case.with_faults({"row_bias": over_ranks, "row_bias_value": over_ranks})


def summed_everywhere(case: Case) -> Planted:
    """Forget all sums, as a group of one rank does."""
    for sentence, fault in (("no sum over the ranks is taken, forward or backward", missing),
                            (f"every sum over the ranks is taken twice: {case.ranks} times too large", doubled),
                            (f"every sum over the ranks is divided by {case.ranks}: a mean", mean)):
        yield sentence, case.with_faults(dict.fromkeys(("row", "column_dx", "embedding"), fault))


def one_gradient(case: Case) -> Planted:
    """Forget the sum of one gradient of a weight that all ranks have, while each rank has its own tokens."""
    role = "norm_grad" if case.kind == "norm" else "token_grad"
    if case.by_tokens and case.ranks > 1 and len(case.whole) > 1:
        for name in case.whole:
            yield f"the gradient of {name} is not summed over the ranks, each of which has its own tokens", \
                case.with_faults({f"{name}.{role}": missing})
            yield f"the gradient of {name} is averaged over the ranks, not summed: divided by {case.ranks}", \
                case.with_faults({f"{name}.{role}": mean})


def holders_summed(case: Case) -> Planted:
    """Sum the gradients of shared key/value heads over their holders before the projection: dx counts them again."""
    if case.kind not in ("attention", "block", "decoder") or not case.kv_heads:
        return
    used = [np.unique(heads) for heads in case.kv_heads]
    if all(len(np.intersect1d(a, b)) == 0 for i, a in enumerate(used) for b in used[:i]):
        return
    summed = partial(sum_over_holders, used=used)
    yield ("a shared key/value head's gradient is summed over its holders, and each of them carries all of it into dx: "
           "counted once a holder"), case.with_faults({"dk": summed, "kv_grad": missing})
    yield ("a shared key/value head's gradient is summed over its holders before the projection and after it: counted "
           "once a holder"), case.with_faults({"dk": summed})


def sum_over_holders(values: Local, used: list) -> Local:
    """Give every rank the sum over all ranks of each key/value head's gradient."""
    out = []
    for rank, value in enumerate(values):
        total = np.array(value)
        for other, theirs in enumerate(values):
            if other != rank:
                _, mine, at = np.intersect1d(used[rank], used[other], return_indices=True)
                total[:, :, mine] += theirs[:, :, at]
        out.append(total)
    return out


MISTAKES = (
    role_mistake("row bias P times", "row_bias", times_ranks,
                 "the {}row-parallel bias is added on every rank before the sum: {P} times"),
    role_mistake("row bias over P", "row_bias", over_ranks, "the {}row-parallel bias is divided by {P}, the ranks"),
    role_mistake("row bias missing", "row_bias", left_out, "the {}row-parallel bias is not added"),
    role_mistake("row bias on one rank", "row_bias", on_first,
                 "the {}row-parallel bias is added on rank 0 after the sum"),
    role_mistake("bias gradient not summed", "row_bias_grad", missing,
                 "the {}gradient of the row-parallel bias is not summed over the ranks, each of which has its own "
                 "tokens"),
    role_mistake("bias gradient mean", "row_bias_grad", mean,
                 "the {}gradient of the row-parallel bias is a mean over the ranks, each of which has its own "
                 "tokens: divided by {P}"),
    Mistake("row bias gradient over P", bias_divided),
    role_mistake("row bias gradient P times", "row_bias_value", times_ranks,
                 "the {}gradient of the row-parallel bias, complete on every rank, is summed over the ranks: {P} "
                 "times too large"),
    Mistake("row bias and its gradient P times", both_biases),
    Mistake("row bias and its gradient over P", both_divided),
    role_mistake("g missing", "row", missing,
                 "the {}all-reduce after the row-parallel product (g) is missing: each rank has its own summand"),
    role_mistake("g doubled", "row", doubled,
                 "the {}all-reduce after the row-parallel product (g) is taken twice: {P} times too large"),
    role_mistake("g mean", "row", mean,
                 "the {}all-reduce after the row-parallel product (g) is a mean: divided by {P}"),
    role_mistake("g rank 0's", "row", first_alone,
                 "the {}sum after the row-parallel product (g) is rank 0's summand alone"),
    role_mistake("f missing", "column_dx", missing,
                 "the {}all-reduce of dx in f's backward is missing: each rank has its own summand"),
    role_mistake("f doubled", "column_dx", doubled,
                 "the {}all-reduce of dx in f's backward is taken twice: {P} times too large"),
    role_mistake("f mean", "column_dx", mean, "the {}all-reduce of dx in f's backward is a mean: divided by {P}"),
    role_mistake("f rank 0's", "column_dx", first_alone, "the {}sum of dx in f's backward is rank 0's summand alone"),
    role_mistake("dy summed", "dy", times_ranks,
                 "the {}gradient of y, the same on every rank, is summed over the ranks in g's backward: {P} times "
                 "too large"),
    role_mistake("dy summed", "g_dy", times_ranks,
                 "the {}gradient of the row-parallel sum is summed over the ranks in g's backward (the bias's is "
                 "right): {P} times too large"),
    Mistake("row bias twice", bias_twice),
    role_mistake("dy over P", "dy", over_ranks, "the {}gradient of y is divided by {P}, the ranks"),
    role_mistake("norm gradient not summed", "norm_grad", missing,
                 "the {}gradients of the norm's weights are not summed over the ranks, each of which has its own "
                 "tokens"),
    role_mistake("norm gradient mean", "norm_grad", mean,
                 "the {}gradients of the norm's weights are averaged over the ranks, not summed: divided by {P}"),
    role_mistake("norm gradient doubled", "norm_grad", doubled,
                 "the {}gradients of the norm's weights are summed over the ranks twice: {P} times too large"),
    role_mistake("gradient not communicated", "token_grad", missing,
                 "the {}gradients are not summed over the ranks, each of which has its own tokens"),
    role_mistake("gradient mean", "token_grad", mean,
                 "the {}gradients are averaged over the ranks, not summed: divided by {P}"),
    role_mistake("kv gradient not summed", "kv_grad", missing,
                 "the {}gradient of a shared key/value head is not summed over the ranks that use it"),
    role_mistake("kv gradient mean", "kv_grad", mean,
                 "the {}gradient of a shared key/value head is a mean over the ranks: divided by {P}"),
    role_mistake("kv gradient doubled", "kv_grad", doubled,
                 "the {}gradient of a shared key/value head is summed twice: {P} times too large"),
    Mistake("gradient of one weight", one_gradient),
    Mistake("kv gradient once a holder", holders_summed),
    role_mistake("q/k norm gradient not summed", "qk_norm_grad", missing,
                 "the {}gradients of the query and key norms are not summed over the ranks, each of which has its "
                 "own heads"),
    role_mistake("q/k norm gradient mean", "qk_norm_grad", mean,
                 "the {}gradients of the query and key norms are averaged over the ranks, not summed: divided by "
                 "{P}"),
    role_mistake("embedding sum missing", "embedding", missing, "the {}all-reduce of the embedded tokens is missing"),
    role_mistake("embedding sum doubled", "embedding", doubled,
                 "the {}all-reduce of the embedded tokens is taken twice: {P} times too large"),
    role_mistake("embedding mean", "embedding", mean,
                 "the {}all-reduce of the embedded tokens is a mean: divided by {P}"),
    Mistake("all sums", summed_everywhere),
    role_mistake("g maximum", "row", largest,
                 "the {}all-reduce after the row-parallel product (g) takes the maximum, not the sum"),
)
