"""Eigenbases of Kronecker factors."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_kfac.errors import InputError
from lightning_kfac.math.finite import all_finite

# Eigenvalues below zero by less than this share of the largest are rounding.
NEGATIVE_TOLERANCE = 1e-4
# Share of the mean eigenvalue (trace / d), far below what the factors themselves are right to.
JITTER = {torch.float32: 1e-6, torch.float64: 1e-9}


class Spectrum(NamedTuple):
    """Eigendecomposition M = U diag(values) U^T.

    Attributes:
        values: float64 [d], descending, not negative.
        vectors: [d, d], eigenvectors in columns, in the precision they were computed in.
    """

    values: Tensor
    vectors: Tensor

    def to(self, device: torch.device | str) -> "Spectrum":
        """The same on another device."""
        return Spectrum(self.values.to(device), self.vectors.to(device))


def eigenbasis(matrix: Tensor, name: str = "matrix", dtype: torch.dtype = torch.float64) -> Spectrum:
    """Eigendecomposition of a positive semi-definite matrix, on the matrix's device.

    Where a solver fails, others are tried: with a jitter on the diagonal, in float64, on the CPU.

    Args:
        matrix: [d, d], symmetric.
        name: For the error message.
        dtype: Precision of the solver: float64, or float32 where time or memory is short.

    Raises:
        InputError: The matrix has a NaN or infinite entry or a clearly negative eigenvalue, or no solver
            converges.
    """
    if not all_finite(matrix):
        raise InputError(f"{name} has NaN or infinite entries; collect it again")
    scale = matrix.abs().max().double()
    if not scale:
        return Spectrum(
            matrix.new_zeros(len(matrix), dtype=torch.float64), torch.eye(len(matrix)).to(matrix.device, dtype)
        )
    # At a largest entry of 1 nothing inside the solver over- or underflows.
    values, vectors = _eigh((matrix.double() / scale).to(dtype), name)
    largest = values.abs().max()
    if values.min() < -NEGATIVE_TOLERANCE * largest:
        raise InputError(
            f"{name} has the eigenvalue {values.min() * scale:.3g} beside a largest of {largest * scale:.3g}: "
            "a Kronecker factor has none below zero, so this is not one, or it is damaged"
        )
    # Products depend on the order in memory to the last bit; this is the one that a file gives back.
    vectors = vectors.flip(1).to(dtype).contiguous()
    return Spectrum(values.double().flip(0).clamp(min=0) * scale, vectors)


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the eigenvalues [d] over their sum: between 1 and d (Roy and Vetterli, 2007); 1 for zeros.

    Example:
        >>> round(effective_rank(torch.tensor([1.0, 1.0, 0.0])), 6)
        2.0
    """
    shares = values.double() / values.double().sum().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.special.entr(shares).sum().exp().item()


def _eigh(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues and eigenvectors. Solvers fail now and then: on a GPU for no visible reason
    (PyTorch issues 92141 and 105359), anywhere on matrices of low rank.
    """
    for attempt in _attempts((matrix + matrix.T) / 2):
        try:
            values, vectors = torch.linalg.eigh(attempt)
        except RuntimeError:  # LinAlgError is one; cuSOLVER's own failures are not LinAlgErrors
            continue
        if all_finite(values) and all_finite(vectors):
            return values.to(matrix.device), vectors.to(matrix.device)
    raise InputError(f"{name}: its eigendecomposition does not converge; collect it again on more text")


def _attempts(matrix: Tensor) -> Iterator[Tensor]:
    """The matrix as it is and with jitter, then in float64, then on the CPU; made one by one."""
    yield matrix
    yield _jittered(matrix)
    if matrix.dtype != torch.float64:
        yield matrix.double()
        yield _jittered(matrix.double())
    if not matrix.is_cpu:
        yield matrix.cpu().double()
        yield _jittered(matrix.cpu().double())


def _jittered(matrix: Tensor) -> Tensor:
    jittered = matrix.clone()
    jittered.diagonal().add_(JITTER[matrix.dtype] * matrix.diagonal().mean().abs())
    return jittered
