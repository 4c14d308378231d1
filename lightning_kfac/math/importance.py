"""Importance of each component of a weight, as pure functions; ``editing/formulas.py`` names them and their sources.

With the eigenbases G = U_G diag(lambda) U_G^T and A = U_A diag(mu) U_A^T, the weight's components are
C = U_G^T W U_A. Each formula gives a matrix S [d_out, d_in]; an edit keeps the components with the
largest S.
"""

import hashlib

import torch
from torch import Tensor


def components(weight: Tensor, vectors_G: Tensor, vectors_A: Tensor) -> Tensor:
    """C = U_G^T W U_A, the weight [d_out, d_in] in the curvature basis. [d_out, d_in]."""
    return vectors_G.T @ weight @ vectors_A


def original(lambda_G: Tensor, mu_A: Tensor) -> Tensor:
    """S_ij = lambda_i mu_j: curvature alone. [d_out, d_in]."""
    return lambda_G[:, None] * mu_A[None, :]


def modified(curvature: Tensor, c: Tensor) -> Tensor:
    """S_ij = curvature_ij C_ij^2: second-order estimate of the loss change when (i, j) is removed. [d_out, d_in]."""
    return c.double().square().mul_(curvature)


def coupled(rows: Tensor, columns: Tensor) -> Tensor:
    """S_ij = r_i c_j / sum r, the moments m_ij of which r and c are the sums over rows and over columns, if they were
    of rank one: no measured moments are needed. float64 [d_out, d_in].

    Args:
        rows: float64 [d_out], r_i = sum over j of m_ij = u_i^T G_coupled u_i.
        columns: float64 [d_in], c_j = sum over i of m_ij = v_j^T A_coupled v_j. Its sum is that of ``rows``.
    """
    total = rows.sum()
    return rows[:, None] * (columns / total if total > 0 else columns)


def random(shape: tuple[int, int], seed: int, name: str) -> Tensor:
    """Uniform noise in [0, 1), fixed by the seed and the layer's name alone. float64 [d_out, d_in]."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def curvature_along(matrix: Tensor, vectors: Tensor) -> Tensor:
    """u_k^T M u_k for each column of ``vectors`` [d, d]: a factor's curvature in another's basis. float64 [d]."""
    return (vectors * (matrix.to(vectors.dtype) @ vectors)).sum(0).double().clamp(min=0)
