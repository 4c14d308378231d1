"""Weights from components and a mask."""

import torch
from torch import Tensor


def suppress(c: Tensor, keep: Tensor, vectors_G: Tensor, vectors_A: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """W' = U_G (C * M) U_A^T: only the kept components remain (arXiv 2510.24256).

    Rows and columns after the last kept component are not multiplied at all.

    Args:
        c: [d_out, d_in], the weight's components in the basis.
        keep: bool [d_out, d_in].
        vectors_G: [d_out, d_out].
        vectors_A: [d_in, d_in].
        dtype: Of the products; by default that of ``c``.

    Returns:
        [d_out, d_in].
    """
    dtype = dtype or c.dtype
    rows = _last(keep.any(1))
    columns = _last(keep.any(0))
    kept = (c[:rows, :columns] * keep[:rows, :columns]).to(dtype)
    left = vectors_G[:, :rows].to(dtype)
    right = vectors_A[:, :columns].to(dtype).T
    d_out, d_in = c.shape
    if rows * d_in * (columns + d_out) <= d_out * columns * (rows + d_in):
        return left @ (kept @ right)
    return (left @ kept) @ right


def _last(flags: Tensor) -> int:
    """One more than the place of the last True."""
    return int((flags * torch.arange(1, len(flags) + 1, device=flags.device)).max())
