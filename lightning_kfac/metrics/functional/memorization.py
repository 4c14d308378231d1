"""How much of a gold suffix a continuation recites."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from rapidfuzz.distance import Levenshtein

# Loose: similarity 1 - Levenshtein / L of at least 0.75 (arXiv 2510.24256), kept in integers.
LOOSE_NUMERATOR = 4


class Recitation(NamedTuple):
    """Verdict on one sequence: exact, close, and the edit distance in tokens over the gold length."""

    strict: bool
    loose: bool
    levenshtein_norm: float


def recitation(
    continuation: Sequence[int], gold: Sequence[int], end_of_text: Collection[int] = frozenset()
) -> Recitation:
    """Compares a continuation with the gold suffix, token by token.

    Both are cut after their first end-of-text token, and the continuation at the gold's length.

    Raises:
        ValueError: The gold suffix is empty.

    Example:
        >>> recitation([1, 2, 3, 9], [1, 2, 3, 4])
        Recitation(strict=False, loose=True, levenshtein_norm=0.25)
    """
    if not gold:
        raise ValueError("the gold suffix is empty")
    gold = cut_after_end(gold, end_of_text)
    continuation = cut_after_end(continuation[: len(gold)], end_of_text)
    distance = Levenshtein.distance(continuation, gold)
    return Recitation(distance == 0, LOOSE_NUMERATOR * distance <= len(gold), distance / len(gold))


def cut_after_end(ids: Sequence[int], end_of_text: Collection[int]) -> Sequence[int]:
    """``ids`` up to and including its first end-of-text token."""
    for i, token in enumerate(ids):
        if token in end_of_text:
            return ids[: i + 1]
    return ids
