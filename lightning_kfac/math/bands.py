"""How strongly a text excites each band of curvature, from its second moments A_text alone.

The components (i, j) of a weight in the curvature basis, C = U_G^T W U_A, fall into bands b of equal count in
descending importance. With W_b = U_G (C * M_b) U_A^T, the mean of ||W_b x||^2 over the text's inputs x is
tr(W_b A_text W_b^T); its root is the root mean square of ||W_b x||, where arXiv 2510.24256 takes the mean.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_kfac.math.selection import select_count
from lightning_kfac.math.statistics import middle_95, resampled_sums


class Bands(NamedTuple):
    """A figure of each band, its 95 % interval (bootstrap over a text's shards; NaN for one). float64 [n_bands]."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def band_masks(importance: Tensor, n_bands: int) -> list[Tensor]:
    """Bands of equal component count (up to rounding), the most important first.

    Args:
        importance: [d_out, d_in].

    Returns:
        n_bands bool [d_out, d_in]; every component is in exactly one.

    Example:
        >>> [mask.tolist() for mask in band_masks(torch.tensor([[4.0, 1.0], [3.0, 2.0]]), 2)]
        [[[True, False], [True, False]], [[False, True], [False, True]]]
    """
    below = torch.zeros_like(importance, dtype=torch.bool)
    masks = []
    for number in range(1, n_bands + 1):
        upto = select_count(importance, round(importance.numel() * number / n_bands))
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


def _with_interval(value: np.ndarray, resampled: np.ndarray) -> Bands:
    """A figure of each band [n_bands], and the same of every resample [RESAMPLES, n_bands]."""
    low, high = zip(*map(middle_95, resampled.T), strict=True)
    return Bands(value, np.array(low), np.array(high))
