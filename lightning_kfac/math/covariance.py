"""Sums of outer products, X^T X, added up over many batches."""

import torch
from torch import Tensor

# Columns are worked off in this many panels; each needs only the rows above its last column, so
# n panels cost (n + 1) / (2 n) of the full product.
PANELS = 4
# A float32 sum of thousands of terms loses digits: after this many batches the running sum moves to
# a second accumulator, so that neither ever adds a small number to a very large one.
BATCHES_TO_FLUSH = 64


class SecondMoment:
    """Running sum of X^T X in float32, of which only the upper triangle is computed.

    Args:
        size: Number of features d.
        device: Where the two [d, d] accumulators live.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu"):
        self._recent = torch.zeros(size, size, device=device)
        self._settled: Tensor | None = None
        self._batches = 0

    def add(self, x: Tensor) -> None:
        """Adds ``x^T x`` for x [n, d], in float32 whatever the dtype of x."""
        x = x.float()
        size = x.shape[1]
        for panel in range(PANELS):
            first, last = panel * size // PANELS, (panel + 1) * size // PANELS
            if first < last:
                self._recent[:last, first:last].addmm_(x[:, :last].T, x[:, first:last])
        self._batches += 1
        if self._batches % BATCHES_TO_FLUSH == 0:
            self._settle()

    def sum(self) -> Tensor:
        """The symmetric sum so far, float32 [d, d]."""
        self._settle()
        return mirror(self._settled)

    def packed(self) -> Tensor:
        """Upper triangle of the sum as a vector [d (d + 1) / 2]: what travels between ranks."""
        self._settle()
        return pack_upper(self._settled)

    def load_packed(self, packed: Tensor) -> None:
        """Replaces the sum."""
        self._recent.zero_()
        self._settled = unpack_upper(packed.to(self._recent), len(self._recent))

    def trace(self) -> Tensor:
        """Trace of the sum, a scalar tensor on the device: not finite once any feature was not."""
        trace = self._recent.diagonal().sum()
        return trace if self._settled is None else trace + self._settled.diagonal().sum()

    def _settle(self) -> None:
        if self._settled is None:
            self._settled = self._recent.clone()
        else:
            self._settled += self._recent
        self._recent.zero_()


def mirror(upper: Tensor) -> Tensor:
    """The symmetric matrix whose upper triangle is that of ``upper`` [d, d]."""
    return torch.triu(upper) + torch.triu(upper, 1).T


def pack_upper(matrix: Tensor) -> Tensor:
    """Upper triangle of [d, d], row after row, as a vector [d (d + 1) / 2]."""
    return torch.cat([matrix[i, i:] for i in range(len(matrix))])


def unpack_upper(packed: Tensor, size: int) -> Tensor:
    """The symmetric matrix [size, size] whose upper triangle is ``packed``."""
    matrix = packed.new_zeros(size, size)
    start = 0
    for i in range(size):
        matrix[i, i:] = packed[start : start + size - i]
        start += size - i
    return mirror(matrix)
