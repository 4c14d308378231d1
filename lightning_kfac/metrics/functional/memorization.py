"""How much of a gold suffix a continuation recites."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from rapidfuzz.distance import Levenshtein

# Loose: similarity 1 - Levenshtein / L of at least this (arXiv 2510.24256).
LOOSE_SIMILARITY = 0.75


class Recitation(NamedTuple):
    """Verdict on one sequence: exact, close, and the edit distance in tokens over the gold length."""

    strict: bool
    loose: bool
    levenshtein_norm: float


def recitation(
    continuation: Sequence[int],
    gold: Sequence[int],
    end_of_text: Collection[int] = frozenset(),
    loose_similarity: float = LOOSE_SIMILARITY,
) -> Recitation:
    """Compares a continuation with the gold suffix, token by token.

    Both are cut after their first end-of-text token, and the continuation at the gold's length. Loose is a
    similarity 1 - distance / length of at least ``loose_similarity``.

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
    # A threshold such as 0.9 is no exact binary number: distances are whole, so a little slack decides nothing else.
    loose = distance <= (1 - loose_similarity) * len(gold) + 1e-9
    return Recitation(distance == 0, loose, distance / len(gold))


def cut_after_end(ids: Sequence[int], end_of_text: Collection[int]) -> Sequence[int]:
    """``ids`` up to and including its first end-of-text token."""
    for i, token in enumerate(ids):
        if token in end_of_text:
            return ids[: i + 1]
    return ids
