"""Importance of each component of a weight: every formula that an edit can select by.

With the eigenbases G = U_G diag(lambda) U_G^T and A = U_A diag(mu) U_A^T, the weight's components are
C = U_G^T W U_A. Each formula gives a matrix S [d_out, d_in]; an edit keeps the components with the
largest S.

========================  =====================  ============================================================
formula                   S_ij                   source
========================  =====================  ============================================================
``original``              lambda_i mu_j          K-FAC curvature (Martens and Grosse, 2015) as arXiv
                                                 2510.24256 uses it
``modified``              lambda_i mu_j C_ij^2   the loss that removing (i, j) costs to second order: the
                                                 saliency of Optimal Brain Damage (LeCun et al., 1990)
``corrected``             m_ij                   curvature measured in the basis: EK-FAC (George et al., 2018)
``corrected_modified``    m_ij C_ij^2            both
``random``                uniform noise          control: as many components, none preferred
``magnitude``             C_ij^2                 control: the basis without the curvature
``weights``               W_ij^2                 control: no basis (magnitude pruning)
``lowest``                -lambda_i mu_j         control: ``original`` from the other end
``svd``                   sigma_k^2              control: the leading singular directions, the same share of
                                                 directions as ``original`` keeps of components
``svd_parameters``        sigma_k^2              control: as many directions as have the parameter count of
                                                 the components that ``original`` keeps
========================  =====================  ============================================================
"""

import hashlib
from typing import Literal, get_args

import torch
from torch import Tensor

Formula = Literal[
    "original",
    "modified",
    "corrected",
    "corrected_modified",
    "random",
    "magnitude",
    "weights",
    "lowest",
    "svd",
    "svd_parameters",
]
FORMULAS = get_args(Formula)
CURVATURE_FORMULAS = FORMULAS[:4]
CONTROLS = FORMULAS[4:]
# Selected by the moments of a second pass over the text.
MEASURED = ("corrected", "corrected_modified")
# Their importance is a mass of which a share rho can be kept; the other controls only keep a number.
WITH_MASS = (*CURVATURE_FORMULAS, "magnitude", "weights")


def components(weight: Tensor, vectors_G: Tensor, vectors_A: Tensor) -> Tensor:
    """C = U_G^T W U_A, the weight [d_out, d_in] in the curvature basis. [d_out, d_in]."""
    return vectors_G.T @ weight @ vectors_A


def original(lambda_G: Tensor, mu_A: Tensor) -> Tensor:
    """S_ij = lambda_i mu_j: curvature alone. [d_out, d_in]."""
    return lambda_G[:, None] * mu_A[None, :]


def modified(curvature: Tensor, c: Tensor) -> Tensor:
    """S_ij = curvature_ij C_ij^2: second-order estimate of the loss change when (i, j) is removed. [d_out, d_in]."""
    return curvature * c.double() ** 2


def random(shape: tuple[int, int], seed: int, name: str) -> Tensor:
    """Uniform noise in [0, 1), fixed by the seed and the layer's name alone. float64 [d_out, d_in]."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def curvature_along(matrix: Tensor, vectors: Tensor) -> Tensor:
    """u_k^T M u_k for each column of ``vectors`` [d, d]: a factor's curvature in another's basis. float64 [d]."""
    return (vectors * (matrix.to(vectors.dtype) @ vectors)).sum(0).double().clamp(min=0)
