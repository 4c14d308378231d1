"""Weights from components and a mask."""

import math

import torch
from torch import Tensor

# So many places for the cut between wide and narrow rows are tried.
CUTS = 16


def suppress(c: Tensor, keep: Tensor, vectors_G: Tensor, vectors_A: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """W' = U_G (C * M) U_A^T: only the kept components remain (arXiv 2510.24256).

    Rows and columns after the last kept component are not multiplied at all. The others are cut into upper rows, which
    meet U_A^T first, and lower rows, which meet U_G first and only in the columns that they have kept components in:
    of a staircase, wide at the top, most of what is not kept is not multiplied either.

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
    flags = keep.view(torch.uint8)  # the largest byte is found far sooner than any True
    rows = int(_last(flags.amax(1)))
    if not rows:
        return 0, 0, 0, 0
    cuts = list(range(0, rows, math.ceil(rows / CUTS)))
    strips = torch.stack([strip.amax(0) for strip in flags[:rows].split(math.ceil(rows / CUTS))])
    widths = _last(strips).flip(0).cummax(0).values.flip(0).tolist()  # of a strip and all below it
    columns = widths[0]

    def products(cut: int, width: int) -> int:
        return cut * columns * d_in + d_out * (rows - cut) * width + d_out * d_in * (cut + width)

    # Where costs are equal, the right side comes first.
    places = [(rows, 0), *zip(cuts, widths, strict=True)]
    cut, width = min(places, key=lambda place: products(*place))
    return rows, columns, cut, width


def _last(flags: Tensor) -> Tensor:
    """One more than the place of the last 1 in [..., n] of 0 and 1."""
    return (flags * torch.arange(1, flags.shape[-1] + 1, device=flags.device)).amax(-1)
