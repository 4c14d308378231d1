"""What an edit leaves of an ability: two models on the same questions, compared question by question.

Scores are in [0, 1], mostly right or wrong. Of right and wrong only the questions that one model answers and the other
does not tell the two apart.
"""

import math
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike

from lightning_kfac.errors import InputError
from lightning_kfac.math.separation import Z95
from lightning_kfac.math.statistics import Estimate, resampled_sums, wilson


def retention(before: ArrayLike, after: ArrayLike) -> Estimate | None:
    """Share of an ability that is left, mean after / mean before, with a 95 % interval of the paired ratio.

    Of right and wrong answers the interval is Bonett and Price's (2006): Wilson intervals of both rates among the
    questions that either model answers, narrowed by what the pairing is worth; so it has a width at 0 and at 1 too. In
    simulations 95 to 97 % hold the truth, more where no answer is gained (tests/math/test_paired.py). Of other scores
    it is a percentile bootstrap over questions; a resample without any score before has no ratio and counts as
    unbounded.

    Args:
        before, after: [n] in the same order.

    Returns:
        None where there is nothing to keep: no score before.

    Raises:
        InputError: Not as many after as before, or a score outside [0, 1].

    Example:
        >>> left = retention([1, 1, 1, 0], [1, 0, 1, 0])
        >>> round(left.value, 3), left.low < left.value < left.high
        (0.667, True)
    """
    scores = _paired(before, after)
    first, second = scores.sum(0)
    if not first > 0:
        return None
    value = float(second / first)
    if is_binary(scores):
        return Estimate(value, *_ratio_bounds(int(first), int(second), int(scores.all(1).sum())))
    sums = resampled_sums(scores)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = sums[:, 1] / sums[:, 0]
    if np.isnan(sums).all():
        return Estimate(value, math.nan, math.nan)
    empty = sums[:, 0] <= 0
    low = Estimate.of(value, np.where(empty, 0.0, ratios)).low
    return Estimate(value, low, Estimate.of(value, np.where(empty, np.inf, ratios)).high)


def _ratio_bounds(first: int, second: int, both: int) -> tuple[float, float]:
    """Bonett and Price's interval of second / first.

    Args:
        first, second: Questions answered before and after.
        both: Answered both times.
    """
    either = first + second - both
    apart = first + second - 2 * both
    joint = math.sqrt((apart + 2) / ((first + 1) * (second + 1)))
    alone = (math.sqrt((1 - (count + 1) / (either + 2)) / (count + 1)) for count in (first, second))
    z = Z95 * joint / sum(alone)
    (low_first, high_first), (low, high) = (wilson(count, either, z) for count in (first, second))
    return low / high_first, high / low_first


def mcnemar(before: ArrayLike, after: ArrayLike) -> float:
    """Exact two-sided p of McNemar's test (1947): could as many answers have changed in one direction by chance?

    Of the n questions that exactly one model answers, the smaller side is binomial with n and 1/2 where the edit does
    not matter; 1 where no answer changed.

    Args:
        before, after: [n] of 0 and 1, in the same order.

    Raises:
        InputError: Not as many after as before, or other scores than 0 and 1.

    Example:
        >>> mcnemar([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0])
        0.0625
    """
    scores = _paired(before, after)
    if not is_binary(scores):
        raise InputError("McNemar's test compares right and wrong answers, scores of 0 and 1")
    lost = int((scores[:, 0] > scores[:, 1]).sum())
    changed = lost + int((scores[:, 0] < scores[:, 1]).sum())
    tail = sum(math.comb(changed, k) for k in range(min(lost, changed - lost) + 1))
    return float(min(Fraction(1), Fraction(2 * tail, 2**changed)))


def is_binary(scores: ArrayLike) -> bool:
    """Whether every score is 0 or 1."""
    return bool(np.isin(np.asarray(scores), (0, 1)).all())


def _paired(before: ArrayLike, after: ArrayLike) -> np.ndarray:
    """float64 [n, 2]."""
    columns = [np.asarray(scores, dtype=np.float64) for scores in (before, after)]
    if columns[0].shape != columns[1].shape:
        raise InputError(f"{len(columns[0])} answers before, {len(columns[1])} after: not of the same questions")
    scores = np.stack(columns, 1)
    if not ((scores >= 0) & (scores <= 1)).all():
        raise InputError("a score lies outside [0, 1], so that no share of it can be kept")
    return scores
