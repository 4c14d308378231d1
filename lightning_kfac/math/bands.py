"""How strongly a text excites each band of curvature, from its second moments A_text alone.

The components (i, j) of a weight in the curvature basis, C = U_G^T W U_A, fall into bands b of equal count in
descending importance. With W_b = U_G (C * M_b) U_A^T, the mean of ||W_b x||^2 over the text's inputs x is
tr(W_b A_text W_b^T); its root is the root mean square of ||W_b x||, where arXiv 2510.24256 takes the mean.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_kfac.math.selection import select_count
from lightning_kfac.math.statistics import RESAMPLES, middle_95, resampled_sums

# Directions with less of the largest energy are rounding.
NO_ENERGY = 1e-9


class Bands(NamedTuple):
    """A figure of each band, its 95 % interval (bootstrap over a text's shards; NaN for one). float64 [n_bands]."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def band_masks(importance: Tensor, bands: int | Sequence[float]) -> list[Tensor]:
    """Bands of components, the most important first.

    Args:
        importance: [d_out, d_in].
        bands: How many of equal count (up to rounding), or the share of all components at which each ends, ascending:
            arXiv 2510.24256 cuts at 0.1, 0.25, 0.5 and 1 in its figure 2.

    Returns:
        bool [d_out, d_in] each; every component is in at most one, and in exactly one where the last ends at 1.

    Example:
        >>> [mask.tolist() for mask in band_masks(torch.tensor([[4.0, 1.0], [3.0, 2.0]]), 2)]
        [[[True, False], [True, False]], [[False, True], [False, True]]]
    """
    below = torch.zeros_like(importance, dtype=torch.bool)
    masks = []
    for end in [k / bands for k in range(1, bands + 1)] if isinstance(bands, int) else bands:
        upto = select_count(importance, round(importance.numel() * end))
        masks.append(upto & ~below)
        below = upto
    return masks


def band_forms(C: Tensor, basis_A: Tensor, masks: list[Tensor]) -> Tensor:
    """Quadratic forms Q with x^T Q x = ||W_b x||^2, and last that of the whole weight.

    Args:
        C: [d_out, d_in], the weight in the curvature basis.
        basis_A: [d_in, d_in], columns are eigenvectors of A.
        masks: bool [d_out, d_in] each.

    Returns:
        float32 [n_bands + 1, d_in, d_in]. (U_G drops out: it turns outputs without changing their length.)
    """
    forms = []
    for part in (*(C * mask for mask in masks), C):
        rotated = part @ basis_A.T
        forms.append((rotated.T @ rotated).float())
    return torch.stack(forms)


def singular_forms(W: Tensor, bands: int | Sequence[float]) -> Tensor:
    """The same for bands of singular directions instead of components, the largest singular values first.

    Args:
        W: [d_out, d_in].
        bands: As for ``band_masks``, of the min(d_out, d_in) directions.

    Returns:
        float32 [n_bands + 1, d_in, d_in].
    """
    _, sigma, V = torch.linalg.svd(W, full_matrices=False)
    masks = [*band_masks(sigma[None], bands), torch.ones_like(sigma[None], dtype=torch.bool)]
    return torch.stack([((V.T * (sigma**2 * mask[0])) @ V).float() for mask in masks])


def energies(forms: Tensor, A_sum: Tensor) -> Tensor:
    """Sum over inputs x of ||W_b x||^2, from the sum of x x^T [d_in, d_in]. float64 [n_bands + 1]."""
    return (forms.flatten(1) @ A_sum.float().flatten()).double()


def band_shares(shards: np.ndarray) -> Bands:
    """Share of each band in the whole output: root of (its energy over that of the whole weight).

    Args:
        shards: [n_shards, n_bands + 1], energies of parts of a text.
    """
    sums = np.concatenate([shards.sum(0, keepdims=True), resampled_sums(shards)])
    shares = np.sqrt(sums[:, :-1] / sums[:, -1:])
    return _with_interval(shares[0], shares[1:])


def band_ratios(shards: np.ndarray, counts: np.ndarray, others: np.ndarray, other_counts: np.ndarray) -> Bands:
    """Root mean square output of each band on one text over that on another. The shards of both are resampled apart.

    Args:
        shards, others: [n_shards, n_bands + 1].
        counts, other_counts: [n_shards], number of inputs.
    """
    draws: list[np.ndarray] = []
    for values, numbers in ((shards, counts), (others, other_counts)):
        columns = np.concatenate([values[:, :-1], numbers[:, None]], axis=1)
        # The first row is the text itself. Shifted draws, so that the two texts are not resampled alike.
        sums = np.concatenate([columns.sum(0, keepdims=True), np.roll(resampled_sums(columns), len(draws), axis=0)])
        draws.append(sums[:, :-1] / sums[:, -1:])
    ratios = np.sqrt(draws[0] / draws[1])
    return _with_interval(ratios[0], ratios[1:])


class Exponent(NamedTuple):
    """A whitening exponent with its 95 % interval (bootstrap over the shards of both texts; NaN for one shard)."""

    value: float
    low: float
    high: float


def whitening_exponent(
    shards: np.ndarray, counts: np.ndarray, others: np.ndarray, other_counts: np.ndarray
) -> Exponent:
    """Slope of log(E / E_other) on log(E_other) over directions, E the mean squared activation along each.

    0 where a text excites directions as the other does, below 0 where it prefers those that the other leaves idle.
    (Public journal of the repository smarter/memorization_kfac.) Directions without energy are left out.

    Args:
        shards, others: float64 [n_shards, d], summed squares along each direction, of a text and of an ordinary one.
        counts, other_counts: [n_shards], number of activations.

    Example:
        >>> ordinary = np.array([[4.0, 1.0, 0.25]])
        >>> round(whitening_exponent(ordinary**0.5, np.ones(1), ordinary, np.ones(1)).value, 6)
        -0.5
    """
    text = _resampled_means(shards, counts, seed=0)
    other = _resampled_means(others, other_counts, seed=1)
    excited = (text[0] > NO_ENERGY * text[0].max()) & (other[0] > NO_ENERGY * other[0].max())
    x = np.log(other[:, excited])
    y = np.log(text[:, excited]) - x
    x -= x.mean(1, keepdims=True)
    slopes = (x * y).sum(1) / (x * x).sum(1)
    return Exponent(float(slopes[0]), *middle_95(slopes[1:]))


def _resampled_means(shards: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """Means per direction of the text itself, and of every resample of its shards. [RESAMPLES + 1, d]."""
    n = len(shards)
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)
    if n < 2:
        times[:] = np.nan
    times = np.concatenate([np.ones((1, n)), times])
    return (times @ shards) / (times @ counts)[:, None]


def _with_interval(value: np.ndarray, resampled: np.ndarray) -> Bands:
    """A figure of each band [n_bands], and the same of every resample [RESAMPLES, n_bands]."""
    low, high = zip(*map(middle_95, resampled.T), strict=True)
    return Bands(value, np.array(low), np.array(high))
