"""Importance of each component (i, j) of a weight in its curvature basis.

With the eigenbases G = U_G diag(lambda) U_G^T and A = U_A diag(mu) U_A^T, the weight's components are
C = U_G^T W U_A, and the K-FAC curvature along component (i, j) is lambda_i mu_j
(Martens and Grosse, 2015).
"""

from typing import Literal, get_args

from torch import Tensor

Formula = Literal["original", "modified"]
FORMULAS = get_args(Formula)


def components(weight: Tensor, vectors_G: Tensor, vectors_A: Tensor) -> Tensor:
    """C = U_G^T W U_A, the weight [d_out, d_in] in the curvature basis. [d_out, d_in]."""
    return vectors_G.T @ weight @ vectors_A


def original(lambda_G: Tensor, mu_A: Tensor) -> Tensor:
    """S_ij = lambda_i mu_j: curvature alone (arXiv 2510.24256). [d_out, d_in]."""
    return lambda_G[:, None] * mu_A[None, :]


def modified(lambda_G: Tensor, mu_A: Tensor, c: Tensor) -> Tensor:
    """S_ij = lambda_i mu_j C_ij^2: second-order estimate of the loss change when (i, j) is removed.

    The saliency of Optimal Brain Damage (LeCun et al., 1990), taken in the curvature basis.
    [d_out, d_in].
    """
    return original(lambda_G, mu_A) * c**2
