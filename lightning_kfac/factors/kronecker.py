"""Kronecker factors of one layer."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class KroneckerFactors:
    """Curvature of one layer: its Fisher is approximated by G (x) A.

    Attributes:
        A: float32 [d_in, d_in], mean of a a^T over valid positions.
        G: float32 [d_out, d_out], mean of g g^T over valid positions.
        n_tokens: Number of valid positions.

    Example:
        >>> import torch
        >>> factors = KroneckerFactors(torch.eye(3), torch.eye(2), n_tokens=10)
        >>> factors.shape
        (2, 3)
    """

    A: Tensor
    G: Tensor
    n_tokens: int

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in), the shape of the layer's weight."""
        return len(self.G), len(self.A)
