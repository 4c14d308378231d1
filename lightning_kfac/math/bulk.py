"""How much of a text's input to a layer lies in the flat directions of its curvature.

From a public research journal (github.com/smarter/memorization_kfac): of text that a model recites, more of what
reaches a layer lies in the bulk of the spectrum than of ordinary text. One forward shows it, without labels.
"""

import torch
from torch import Tensor

from lightning_kfac.errors import InputError

# Share of the input directions that count as flat.
FLAT = 0.6


def flattest(depth: Tensor, share: float = FLAT) -> Tensor:
    """The input directions of least curvature.

    Args:
        depth: [d_in], curvature along each direction: eigenvalues of A, or sums of measured moments over outputs.
        share: Of the directions, rounded to whole ones; of equal ones those behind are flatter.

    Returns:
        bool [d_in].

    Raises:
        InputError: The share lies outside (0, 1).

    Example:
        >>> flattest(torch.tensor([9.0, 1.0, 4.0, 2.0]), 0.5).tolist()
        [False, True, False, True]
    """
    if not 0 < share < 1:
        raise InputError(f"the share of flat directions is {share}; it must lie between 0 and 1")
    order = depth.argsort(descending=True, stable=True)
    chosen = torch.zeros(len(depth), dtype=torch.bool, device=depth.device)
    chosen[order[len(depth) - round(share * len(depth)) :]] = True
    return chosen


def gains(W: Tensor, basis: Tensor) -> Tensor:
    """||W v_i||^2 of each direction v_i.

    Args:
        W: [d_out, d_in].
        basis: [d_in, d_in], columns are directions.

    Returns:
        [d_in].

    Example:
        >>> gains(torch.tensor([[3.0, 0.0], [4.0, 1.0]]), torch.eye(2)).tolist()
        [25.0, 1.0]
    """
    return (W.to(basis.dtype) @ basis).square().sum(0)


def bulk_energies(inputs: Tensor, basis: Tensor, gains: Tensor, flat: Tensor) -> Tensor:
    """Sum of ||W v_i||^2 (v_i^T a)^2 over the flat directions, and over all.

    Args:
        inputs: [..., d_in], vectors a.
        basis: [d_in, d_in], columns are directions v_i.
        gains: [d_in], see ``gains``.
        flat: bool [d_in].

    Returns:
        [..., 2] in the basis' dtype.

    Example:
        >>> a = torch.tensor([1.0, 2.0])
        >>> bulk_energies(a, torch.eye(2), torch.tensor([25.0, 1.0]), torch.tensor([False, True])).tolist()
        [4.0, 29.0]
    """
    energy = (inputs.to(basis.dtype) @ basis).square()
    return energy @ torch.stack([gains * flat, gains], dim=1)


def bulk_share(inputs: Tensor, W: Tensor, basis: Tensor, flat: Tensor) -> float:
    """Share of the flat directions in what a layer makes of a text's tokens, added up over these.

    Args:
        inputs: [n, d_in], vectors a of the tokens.
        W: [d_out, d_in].
        basis: [d_in, d_in], eigenvectors of A.
        flat: bool [d_in], see ``flattest``.

    Returns:
        In [0, 1]; NaN where nothing reaches the layer.

    Example:
        >>> bulk_share(torch.eye(2), torch.eye(2), torch.eye(2), torch.tensor([False, True]))
        0.5
    """
    some, everything = bulk_energies(inputs, basis, gains(W, basis), flat).double().sum(0)
    return (some / everything).item()


def random_basis(size: int, seed: int = 0) -> Tensor:
    """A random orthonormal basis, for a control: float64 [size, size], the same for the same seed."""
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn)[0]
