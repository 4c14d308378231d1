"""Eigenbases of Kronecker factors."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_kfac.errors import InputError

# Eigenvalues below zero by less than this share of the largest are rounding.
NEGATIVE_TOLERANCE = 1e-4
# Share of the mean eigenvalue; float32 factors are only right to 1e-7.
JITTER = 1e-9


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
        InputError: The matrix has a NaN or infinite entry or a clearly negative eigenvalue, or no solver
            converges.
    """
    if not matrix.isfinite().all():
        raise InputError(f"{name} has NaN or infinite entries; collect it again")
    values, vectors = _eigh(matrix.double(), name)
    largest = values.abs().max()
    if values.min() < -NEGATIVE_TOLERANCE * largest:
        raise InputError(
            f"{name} has the eigenvalue {values.min():.3g} beside a largest of {largest:.3g}: "
            "a Kronecker factor has none below zero, so this is not one, or it is damaged"
        )
    return Spectrum(values.flip(0).clamp(min=0), vectors.flip(1))


def _eigh(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues and eigenvectors. Solvers fail now and then: on a GPU for no visible reason,
    anywhere on matrices of low rank; the CPU and a jitter far below rounding of the input help.
    """
    matrix = (matrix + matrix.T) / 2
    jitter = JITTER * matrix.diagonal().mean().abs() * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for attempt in (matrix, matrix.cpu(), (matrix + jitter).cpu()):
        try:
            values, vectors = torch.linalg.eigh(attempt)
        except torch.linalg.LinAlgError:
            continue
        if values.isfinite().all() and vectors.isfinite().all():
            return values.to(matrix.device), vectors.to(matrix.device)
    raise InputError(f"{name}: its eigendecomposition does not converge; collect it again on more text")
