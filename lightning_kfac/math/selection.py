"""The smallest set of components that holds a share rho of the total importance.

The set is that of a full stable sort: components in descending importance, ties in (i, j) order,
taken until their sum, in float64, reaches rho * total * (1 - 1e-12). rho = 0 keeps none and rho = 1
keeps all, zeros too.
"""

import math
import struct

import torch
from torch import Tensor

from lightning_kfac.errors import InputError

# A sum of many float64 numbers is only right to about this.
SLACK = 1e-12
# Steps that a count may be off before it is looked for in another way.
FIX_UPS = 4
# So few components are sorted instead of being told apart by further steps.
FEW = 4096


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
    # Only the bucket of neighbouring numbers in which the sum reaches its target has to be sorted.
    buckets = _buckets(flat)
    buckets -= _buckets(flat.amin())
    masses = torch.bincount(buckets, weights=flat).flip(0)
    sums = masses.cumsum(0)
    target = rho * sums[-1] * (1 - SLACK)
    place = int((sums < target).sum())
    bucket = len(masses) - 1 - place
    inside = (buckets == bucket).nonzero().squeeze(1)
    descending, order = flat[inside].sort(descending=True, stable=True)
    n_kept = int((descending.cumsum(0) + (sums[place] - masses[place]) < target).sum()) + 1
    keep = buckets > bucket
    keep[inside[order[:n_kept]]] = True
    return keep.view(importance.shape)


def select_count(importance: Tensor, count: int) -> Tensor:
    """Selects the ``count`` most important components, ties in (i, j) order.

    Args:
        importance: [d_out, d_in], finite.
        count: Number of components to keep.

    Returns:
        bool [d_out, d_in], True where kept.
    """
    flat = importance.flatten()
    if not 0 < count < len(flat):
        return torch.full(importance.shape, count > 0, device=importance.device)
    threshold = flat.kthvalue(len(flat) - count + 1).values
    keep = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    keep[ties[: count - int(keep.sum())]] = True
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
    rows = lambda_G.double()
    columns = mu_A.double()
    for spectrum in (rows, columns):
        _check_importance(spectrum)
        if (spectrum.diff() > 0).any():
            raise InputError("a spectrum is not in descending order")
    prefix = torch.cat([columns.new_zeros(1), columns.cumsum(0)])

    def mass(counts: Tensor) -> float:
        return float((rows * prefix[counts]).sum())

    total = mass(torch.full_like(rows, len(columns), dtype=torch.long))
    target = rho * total * (1 - SLACK)
    # Invariant: {S >= low} reaches the target, {S >= high} does not. Positive floats order like
    # their bits, so halving the bits ends at two neighbouring numbers, or earlier at a few components.
    # (Components below half of (1 - rho) * mean cannot add up to the part that is dropped.)
    low = _bits((1 - rho) * total / (2 * len(rows) * len(columns)))
    high = _bits(float(rows[0] * columns[0])) + 1
    above = torch.zeros_like(rows, dtype=torch.long)
    reached = _counts_at_least(rows, columns, _from_bits(low))
    while high - low > 1 and int((reached - above).sum()) > FEW:
        middle = (low + high) // 2
        counts = _counts_at_least(rows, columns, _from_bits(middle))
        if mass(counts) >= target:
            low, reached = middle, counts
        else:
            high, above = middle, counts
    missing = target - mass(above)
    if high - low == 1:
        return above + _first_ties(reached - above, missing / _from_bits(low))
    return above + _first_of_few(rows, columns, above, reached, missing)


def _first_of_few(rows: Tensor, columns: Tensor, above: Tensor, reached: Tensor, missing: float) -> Tensor:
    """How many of the components between two staircases each row keeps until their sum is ``missing``."""
    per_row = reached - above
    i = torch.arange(len(rows), device=rows.device).repeat_interleave(per_row)
    within_row = torch.arange(len(i), device=rows.device) - (per_row.cumsum(0) - per_row)[i]
    values, order = (rows[i] * columns[above[i] + within_row]).sort(descending=True, stable=True)
    n_kept = int((values.cumsum(0) < missing).sum()) + 1
    return torch.bincount(i[order[:n_kept]], minlength=len(rows))


def _counts_at_least(rows: Tensor, columns: Tensor, threshold: float) -> Tensor:
    """For each i the number of j with rows_i * columns_j >= threshold. int64 [d_out]."""
    counts = torch.zeros_like(rows, dtype=torch.long)
    if threshold == 0:
        return counts + len(columns)
    n_rows = int((rows * columns[0] >= threshold).sum())  # rows descend, so the others count nothing
    counts[:n_rows] = _prefixes(rows[:n_rows], columns, threshold)
    return counts


def _prefixes(rows: Tensor, columns: Tensor, threshold: float) -> Tensor:
    """The same for rows that count at least one."""
    # Division and product round differently, so a quotient's place may be off by a step or two.
    counts = torch.searchsorted(-columns, -(threshold / rows), right=True).clamp(min=1)
    ended = torch.cat([columns, columns.new_full((1,), -1.0)])  # no threshold is reached behind the last column
    for _ in range(FIX_UPS):
        missing = rows * ended[counts] >= threshold
        too_many = rows * ended[counts - 1] < threshold
        if not (missing | too_many).any():
            return counts
        counts = counts + missing.long() - too_many.long()
    return _counts_by_bisection(rows, columns, threshold)


def _counts_by_bisection(rows: Tensor, columns: Tensor, threshold: float) -> Tensor:
    """The same by comparing products only: for products that underflow, where quotients tell little."""
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


def _buckets(values: Tensor) -> Tensor:
    """Numbers 0 to 2^19 in the order of the values, which share one if their upper 20 bits agree. int64."""
    return values.view(torch.int64) >> 44


def _bits(number: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def _from_bits(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


def _check_importance(values: Tensor) -> None:
    least, largest = map(float, values.aminmax())  # both are NaN where any entry is
    if not 0 <= least <= largest < math.inf:
        raise InputError("the importance has negative, NaN or infinite entries")
    if not largest:
        raise InputError("the importance is zero everywhere, so no share of it can be kept")
