"""Kronecker factors of one layer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
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


def most_tokens(factors: Mapping[str, KroneckerFactors]) -> int:
    """Positions of the layer that saw most: of all of them where each layer sees every one."""
    return max(layer.n_tokens for layer in factors.values())


def pooled_input(factors: Mapping[str, KroneckerFactors], names: Iterable[str]) -> Tensor:
    """The A of all inputs that came to some layers: their mean, weighted by tokens. float32 [d_in, d_in]."""
    layers = [factors[name] for name in names]
    tokens = sum(layer.n_tokens for layer in layers)
    return torch.stack([layer.A * (layer.n_tokens / tokens) for layer in layers]).sum(dim=0)
