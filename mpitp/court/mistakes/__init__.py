"""All mistakes that the court knows, the likelier ones first: of two that give the same numbers, the first is named."""
from . import choices, fused, left_out, shards, sums, vocabulary
from .mistake import Mistake

MISTAKES: tuple[Mistake, ...] = (*sums.MISTAKES, *vocabulary.MISTAKES, *choices.MISTAKES,
                                 *left_out.MISTAKES, *fused.MISTAKES, *shards.MISTAKES)

__all__ = ["MISTAKES", "Mistake"]
