"""Windows that say the same, and windows that say nothing."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

NGRAM = 5


def entropy_bits(ids: Sequence[int]) -> float:
    """Entropy of the tokens of a text, in bits: 0 for one token repeated, log2 n for n different ones.

    Example:
        >>> entropy_bits([7, 7, 7, 7]), entropy_bits([1, 2, 3, 4])
        (0.0, 2.0)
    """
    counts = Counter(ids).values()
    return abs(-sum(count / len(ids) * math.log2(count / len(ids)) for count in counts))


def first_of_each(texts: Sequence[Sequence[int]], threshold: float) -> tuple[list[int], int, int]:
    """Numbers of the texts that no earlier kept one repeats, and how many were left out.

    Two texts are near-duplicates where the Jaccard overlap of their sets of 5-grams reaches the threshold.

    Args:
        texts: Token ids.
        threshold: In [0, 1]; 1 leaves out only texts with the same 5-grams.

    Returns:
        Numbers of the texts to keep, number of exact repetitions, number of near-duplicates.

    Example:
        >>> first_of_each([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4]], 0.7)
        ([0, 2], 1, 0)
    """
    kept: list[int] = []
    exact = 0
    near = 0
    seen: set[tuple[int, ...]] = set()
    having: dict[tuple[int, ...], list[int]] = defaultdict(list)
    sizes: list[int] = []
    for number, text in enumerate(texts):
        if tuple(text) in seen:
            exact += 1
            continue
        seen.add(tuple(text))
        grams = ngrams(text)
        shared = Counter(other for gram in grams for other in having.get(gram, ()))
        if any(count >= threshold * (len(grams) + sizes[other] - count) for other, count in shared.items()):
            near += 1
            continue
        for gram in grams:
            having[gram].append(len(kept))
        sizes.append(len(grams))
        kept.append(number)
    return kept, exact, near


def ngrams(text: Sequence[int]) -> set[tuple[int, ...]]:
    """The set of 5-grams; of a shorter text, the text itself."""
    return {tuple(text[i : i + NGRAM]) for i in range(max(1, len(text) - NGRAM + 1))}
