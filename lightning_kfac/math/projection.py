"""Edited weights from components and a keep-mask."""

from torch import Tensor


def suppress(c: Tensor, keep: Tensor, vectors_G: Tensor, vectors_A: Tensor) -> Tensor:
    """W' = U_G (C * M) U_A^T: only the kept components remain (arXiv 2510.24256).

    Args:
        c: [d_out, d_in], the weight's components in the basis.
        keep: bool [d_out, d_in].
        vectors_G: [d_out, d_out].
        vectors_A: [d_in, d_in].

    Returns:
        [d_out, d_in] in the dtype of ``c``.
    """
    return vectors_G @ (c * keep) @ vectors_A.T
