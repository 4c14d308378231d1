"""Eigenbases of Kronecker factors."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_kfac.errors import InputError

# Eigenvalues below zero by less than this share of the largest are rounding.
NEGATIVE_TOLERANCE = 1e-4


class Spectrum(NamedTuple):
    """Eigendecomposition M = U diag(values) U^T.

    Attributes:
        values: float64 [d], descending, not negative.
        vectors: float64 [d, d], eigenvectors in columns.
    """

    values: Tensor
    vectors: Tensor


def eigenbasis(matrix: Tensor, name: str = "matrix") -> Spectrum:
    """Eigendecomposition of a positive semi-definite matrix, in float64.

    Args:
        matrix: [d, d], symmetric.
        name: For the error message.

    Raises:
        InputError: The matrix has a NaN or infinite entry, or a clearly negative eigenvalue.
    """
    if not matrix.isfinite().all():
        raise InputError(f"{name} has NaN or infinite entries; collect it again")
    matrix = matrix.double()
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    largest = values.abs().max()
    if values.min() < -NEGATIVE_TOLERANCE * largest:
        raise InputError(
            f"{name} has the eigenvalue {values.min():.3g} beside a largest of {largest:.3g}: "
            "a Kronecker factor has none below zero, so this is not one, or it is damaged"
        )
    return Spectrum(values.flip(0).clamp(min=0), vectors.flip(1))
