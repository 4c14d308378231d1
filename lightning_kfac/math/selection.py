"""The smallest set of components that holds a share rho of the total importance.

The set is that of a full stable sort: components in descending importance, ties in (i, j) order,
taken until their sum, in float64, reaches rho * total * (1 - 1e-12). rho = 0 keeps none and rho = 1
keeps all, zeros too.
"""

import math

import torch
from torch import Tensor

from lightning_kfac.errors import InputError

# A sum of many float64 numbers is only right to about this.
SLACK = 1e-12


def check_rho(rho: float) -> float:
    """Returns rho; raises ``InputError`` outside [0, 1] (NaN included)."""
    if not isinstance(rho, (int, float)) or not 0 <= rho <= 1:
        raise InputError(f"rho is {rho}; it is a share of the curvature mass and must lie in [0, 1]")
    return float(rho)


def select_components(importance: Tensor, rho: float) -> Tensor:
    """Selects by any importance.

    Args:
        importance: [d_out, d_in], not negative, finite.
        rho: Share of the total to keep, in [0, 1].

    Returns:
        bool [d_out, d_in], True where kept.

    Raises:
        InputError: rho is outside [0, 1], or the importance is negative, not finite, or all zero.

    Example:
        >>> select_components(torch.tensor([[4.0, 1.0], [2.0, 3.0]]), 0.7).tolist()
        [[True, False], [False, True]]
    """
    check_rho(rho)
    if rho in (0, 1):
        return torch.full(importance.shape, rho == 1, device=importance.device)
    flat = importance.double().flatten()
    _check_importance(flat)
    descending, order = flat.sort(descending=True, stable=True)
    sums = descending.cumsum(0)
    n_kept = int((sums < rho * sums[-1] * (1 - SLACK)).sum()) + 1
    keep = torch.zeros_like(flat, dtype=torch.bool)
    keep[order[:n_kept]] = True
    return keep.view(importance.shape)


def select_products(lambda_G: Tensor, mu_A: Tensor, rho: float) -> Tensor:
    """Selects by S_ij = lambda_i mu_j without building S.

    Both spectra descend, so the kept part of each row is a prefix: a staircase. The threshold is
    found by bisection over the float64 numbers themselves, each step counting a row's prefix by
    binary search, so the result is exact. Memory O(d_out + d_in).

    Args:
        lambda_G: [d_out], descending, not negative.
        mu_A: [d_in], descending, not negative.
        rho: Share of the total to keep, in [0, 1].

    Returns:
        int64 [d_out]: how many leading columns row i keeps.

    Raises:
        InputError: rho is outside [0, 1], or a spectrum is negative, not finite, unsorted, or zero.

    Example:
        >>> select_products(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 1.0]), 0.7).tolist()
        [2, 0]
    """
    check_rho(rho)
    if rho in (0, 1):
        return torch.full((len(lambda_G),), int(rho) * len(mu_A), device=lambda_G.device)
    rows, columns = lambda_G.double(), mu_A.double()
    for spectrum in (rows, columns):
        _check_importance(spectrum)
        if (spectrum.diff() > 0).any():
            raise InputError("a spectrum is not in descending order")
    prefix = torch.cat([columns.new_zeros(1), columns.cumsum(0)])

    def mass(counts: Tensor) -> float:
        return float((rows * prefix[counts]).sum())

    target = rho * mass(torch.full_like(rows, len(columns), dtype=torch.long)) * (1 - SLACK)
    # Invariant: {S >= low} reaches the target, {S >= high} does not. Positive floats order like
    # their bits, so halving the bits ends at two neighbouring numbers.
    low, high = 0, _bits(float(rows[0] * columns[0])) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if mass(_counts_at_least(rows, columns, _from_bits(middle))) >= target:
            low = middle
        else:
            high = middle
    above = _counts_at_least(rows, columns, _from_bits(high))
    ties = _counts_at_least(rows, columns, _from_bits(low)) - above
    return above + _first_ties(ties, (target - mass(above)) / _from_bits(low))


def _counts_at_least(rows: Tensor, columns: Tensor, threshold: float) -> Tensor:
    """For each i the number of j with rows_i * columns_j >= threshold. int64 [d_out]."""
    low = torch.zeros_like(rows, dtype=torch.long)
    high = torch.full_like(low, len(columns))
    for _ in range(len(columns).bit_length()):
        middle = (low + high) // 2
        inside = (rows * columns[middle.clamp(max=len(columns) - 1)] >= threshold) & (middle < high)
        low = torch.where(inside, middle + 1, low)
        high = torch.where(inside, high, middle)
    return low


def _first_ties(ties: Tensor, wanted: float) -> Tensor:
    """Distributes the first ``wanted`` (rounded up) of the tied components over rows, in (i, j) order."""
    wanted = max(1, math.ceil(wanted * (1 - SLACK)))
    before = ties.cumsum(0) - ties
    return (wanted - before).clamp(min=0).minimum(ties)


def _bits(number: float) -> int:
    return int(torch.tensor(number, dtype=torch.float64).view(torch.int64))


def _from_bits(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int64).view(torch.float64))


def _check_importance(values: Tensor) -> None:
    if not values.isfinite().all() or (values < 0).any():
        raise InputError("the importance has negative, NaN or infinite entries")
    if not values.any():
        raise InputError("the importance is zero everywhere, so no share of it can be kept")
