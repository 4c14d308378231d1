"""Mixing the curvature of general text with that of domains ("Hessian Union")."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_kfac.errors import InputError


def add_scores(curvatures: Sequence[Tensor], alphas: Sequence[float], normalize: bool = True) -> Tensor:
    """Weighted sum of curvatures [d_out, d_in], each divided by its total first unless told otherwise.

    Raises:
        InputError: A curvature is zero everywhere.
    """
    total = torch.zeros_like(curvatures[0])
    for curvature, alpha in zip(curvatures, alphas, strict=True):
        mass = curvature.sum()
        if not mass > 0:
            raise InputError("a domain's curvature, or the general one, is zero everywhere")
        total += curvature * (alpha / mass if normalize else alpha)
    return total


def add_factors(factors: Sequence[Tensor], alphas: Sequence[float]) -> Tensor:
    """Weighted sum of factors [d, d], each divided by its trace. float64.

    Raises:
        InputError: A factor has no trace.
    """
    total = torch.zeros_like(factors[0], dtype=torch.float64)
    for factor, alpha in zip(factors, alphas, strict=True):
        trace = factor.double().trace()
        if not trace > 0:
            raise InputError("a domain's factor, or the general one, is zero everywhere")
        total += factor.double() * (alpha / trace)
    return total


def mass_before(importance: Tensor) -> Tensor:
    """For each component the share of the total in the components selected before it, [d_out, d_in].

    Selection at rho takes those whose share is below rho (to the rounding of ``selection.SLACK``).
    """
    descending, order = importance.flatten().sort(descending=True, stable=True)
    sums = descending.cumsum(0)
    shares = torch.empty_like(descending)
    shares[order] = torch.cat([sums.new_zeros(1), sums[:-1]]) / sums[-1]
    return shares.view(importance.shape)


def union_of_count(importances: Sequence[Tensor], rho: float, count: int) -> Tensor:
    """The union of the selections at one rho' <= rho, the largest at which it has at most ``count`` components.

    Args:
        importances: Each [d_out, d_in]; each is selected from on its own.
        rho: What rho' may not exceed.
        count: Size of the union at most.

    Returns:
        bool [d_out, d_in].
    """
    # A component is in the union at rho' exactly where the least of its shares lies below rho'.
    shares = torch.stack([mass_before(importance) for importance in importances]).amin(0)
    flat = shares.flatten()
    if count >= len(flat):
        return shares < rho
    first_out = flat.kthvalue(count + 1).values
    return shares < first_out.clamp(max=rho)
