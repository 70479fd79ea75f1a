"""The table of docs/families.md: what the families of checkpoints have, read off the tiny checkpoints of the tests.

docs/figures.py writes it. A family is what its cases in tests/support/make_tiny_checkpoints.py are together, with "or"
between what some of them have and others not.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import make_tiny_checkpoints as tiny

from mpitp.checkpoints.families import MODULES, config_json, family_named
from mpitp.checkpoints.families.family import Family
from mpitp.checkpoints.families.keys import Keys
from mpitp.commands import Parser, train
from mpitp.config import DecoderConfig
from mpitp.errors import InputError

PLACES = {"before": "before", "after": "after", "both": "before and after", "after_residual": "after the residual"}


def norms(config: DecoderConfig) -> str:
    """Return which norms there are, and where."""
    kind = {"layernorm": "layer", "rmsnorm": "RMS"}[config.normalization]
    kind += " 1 + w" if config.zero_centered_gamma else ""
    kind += " without bias" if config.normalization == "layernorm" and not config.has_norm_bias else ""
    return f"{kind}, {PLACES[config.norm_placement]}"


def positions(config: DecoderConfig) -> str:
    """Return what says where a token stands."""
    turns = [rotary for rotary in config.rotaries if rotary]
    if not turns:
        return {"alibi": "ALiBi"}.get(config.position_embedding, config.position_embedding)
    found = "rotary, pairs of neighbours" if turns[0].interleaved else "rotary"
    found += " of a part" if any(rotary.dim not in (None, config.head_dim) for rotary in turns) else ""
    return found + (", not in all layers" if len(turns) < config.num_layers else "")


def attention(config: DecoderConfig) -> list[str]:
    """Return what is special about attention, and about how it is joined with the rest."""
    norm = "q/k norm over all heads" if config.qk_norm_over_heads else \
        "q/k norm of each head's own" if config.qk_norm_by_head else \
        "q/k norm after rotary" if config.qk_norm_after_rotary else "q/k norm" if config.qk_norm else ""
    return list(filter(None, [norm, "windows" if any(config.windows) else "",
                              "beside feed-forward" if config.parallel_residual else "",
                              "softcaps" if config.attention_softcap else ""]))


def feed_forward(config: DecoderConfig) -> str:
    """Return what the feed-forward block is."""
    return f"{'gated ' if config.gated else ''}{config.activation}"


def factors(config: DecoderConfig) -> list[str]:
    """Return what is multiplied."""
    return [name for name, factor in (("embedding", config.embedding_multiplier),
                                      ("branches", config.residual_multiplier), ("logits", config.logits_multiplier))
            if factor != 1]


def directions(family: Family, case: dict) -> str:
    """Return the keys that have attention see later positions, too."""
    found = []
    for key, value in (("is_causal", False), (family.both_directions, True)):
        try:
            if key and not family.config(Keys({**case, key: value})).causal:
                found.append(f"`{key}`")
        except InputError:
            pass
    return ", ".join(found)


def exports(family: Family) -> str:
    """Return whether a run of `train` can be exported as this family."""
    parser = Parser()
    train.add_arguments(parser)
    try:
        config_json(train.config_of(parser.parse_args([])), family)
    except InputError:
        return ""
    return "" if family.saved_as else "yes"


def either(found: list[str]) -> str:
    """Return the different ones, in their order."""
    return " or ".join(dict.fromkeys(found))


def table() -> str:
    """Return the table, a row for each family."""
    lines = ["| model_type | norms | positions | attention | feed-forward | factors of | in both directions by | "
             "`train` exports as |", "| --- " * 8 + "|"]
    for model_type in MODULES:
        family = family_named(model_type)
        cases = [tiny.load(case)["config"] for case, (of_case, _) in tiny.CASES.items() if of_case == model_type]
        configs = [family.config(Keys(case)) for case in cases]
        columns = [either(list(map(column, configs))) for column in (norms, positions)]
        columns += [", ".join(dict.fromkeys(one for config in configs for one in attention(config)))]
        columns += [either(list(map(feed_forward, configs)))]
        columns += [", ".join(dict.fromkeys(one for config in configs for one in factors(config)))]
        columns += [directions(family, cases[0]), exports(family)]
        lines.append(f"| {' | '.join([model_type, *columns])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
