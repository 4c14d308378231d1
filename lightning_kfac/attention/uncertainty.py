"""Perplexities with their uncertainty: a paired bootstrap over held-out rows (Efron, 1979).

Every draw resamples the rows once for all models, so that what makes a row hard cancels in differences.
"""

from dataclasses import dataclass

import numpy as np

DRAWS = 2000
INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class Estimate:
    """A figure with the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, draws: np.ndarray) -> "Estimate":
        """With the percentiles of bootstrap draws [n]."""
        return cls(float(value), *map(float, np.percentile(draws, INTERVAL, method="nearest")))


def perplexity(losses: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """exp(sum of losses / number of targets).

    Args:
        losses: float64 [..., R], summed loss of each row.
        counts: [R], number of targets of each row.

    Returns:
        float64 [...].
    """
    return np.exp(losses.sum(-1) / counts.sum())


def resampled_perplexities(losses: np.ndarray, counts: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Perplexities of M models on ``draws`` resamples of the same R rows.

    Args:
        losses: float64 [M, R].
        counts: [R].

    Returns:
        float64 [draws, M].

    Example:
        >>> resampled_perplexities(np.log([[2.0, 2.0], [4.0, 4.0]]), np.ones(2), draws=1)
        array([[2., 4.]])
    """
    n_rows = losses.shape[1]
    times = np.random.default_rng(seed).multinomial(n_rows, np.full(n_rows, 1 / n_rows), size=draws)
    return np.exp(times @ losses.T / (times @ counts)[:, None])
