"""Weights from components and a mask."""

import torch
from torch import Tensor


def suppress(c: Tensor, keep: Tensor, vectors_G: Tensor, vectors_A: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """W' = U_G (C * M) U_A^T: only the kept components remain (arXiv 2510.24256).

    Rows and columns after the last kept component are not multiplied at all. The others are cut into upper rows, which
    meet U_A^T first, and lower rows, which meet U_G first and only in the columns that they have kept components in:
    of a staircase, wide at the top, most of what is not kept is not multiplied either. The cut is where all
    products together cost least.

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
    rows, columns, cut, width = _cheapest_cut(keep)
    kept = c[:rows, :columns].to(dtype, copy=True).mul_(keep[:rows, :columns])
    left = vectors_G[:, :rows].to(dtype)
    right = vectors_A[:, :columns].to(dtype).T
    if cut == rows:
        return left @ (kept @ right)
    lower = left[:, cut:] @ kept[cut:, :width]
    if cut == 0:
        return lower @ right
    return torch.addmm(lower @ right[:width], left[:, :cut], kept[:cut] @ right)


def _cheapest_cut(keep: Tensor) -> tuple[int, int, int, int]:
    """The last kept row and column, the number of upper rows, and the last kept column of the rows below them."""
    d_out, d_in = keep.shape
    numbers = torch.arange(1, d_in + 1, dtype=torch.int32, device=keep.device)
    last = (keep * numbers).amax(1).long()
    widths = last.flip(0).cummax(0).values.flip(0)  # of a row and all below it
    rows = int(widths.count_nonzero())
    if not rows:
        return 0, 0, 0, 0
    columns = int(widths[0])
    widths = torch.cat([widths[:rows], widths.new_zeros(1)])
    cuts = torch.arange(rows + 1, device=keep.device)
    products = cuts * columns * d_in + (rows - cuts) * widths * d_out + (cuts + widths) * d_out * d_in
    cut = rows - int(products.flip(0).argmin())  # where costs are equal, the right side comes first
    return rows, columns, cut, int(widths[cut])
