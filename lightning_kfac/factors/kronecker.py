"""Kronecker factors of one layer."""

from collections.abc import Callable, Iterable, Mapping
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
        A_coupled: float32 [d_in, d_in], mean of ||g||^2 a a^T; None where it was not collected.
        G_coupled: float32 [d_out, d_out], mean of ||a||^2 g g^T; None where it was not collected.

    Example:
        >>> import torch
        >>> factors = KroneckerFactors(torch.eye(3), torch.eye(2), n_tokens=10)
        >>> factors.shape
        (2, 3)
    """

    A: Tensor
    G: Tensor
    n_tokens: int
    A_coupled: Tensor | None = None
    G_coupled: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in), the shape of the layer's weight."""
        return len(self.G), len(self.A)

    @property
    def matrices(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        named = {"G": self.G, "A": self.A, "G_coupled": self.G_coupled, "A_coupled": self.A_coupled}
        return {name: matrix for name, matrix in named.items() if matrix is not None}

    def each(self, change: Callable[[Tensor], Tensor], **given: Tensor) -> "KroneckerFactors":
        """The same layer with another form of each matrix.

        Args:
            change: Gives it.
            given: Matrices that are there already, by name.
        """
        changed = {name: given[name] if name in given else change(matrix) for name, matrix in self.matrices.items()}
        return KroneckerFactors(n_tokens=self.n_tokens, **changed)


def most_tokens(factors: Mapping[str, KroneckerFactors]) -> int:
    """Positions of the layer that saw most: of all of them where each layer sees every one."""
    return max(layer.n_tokens for layer in factors.values())


def pooled_input(factors: Mapping[str, KroneckerFactors], names: Iterable[str]) -> Tensor:
    """The A of all inputs that came to some layers: their mean, weighted by tokens. float32 [d_in, d_in]."""
    layers = [factors[name] for name in names]
    tokens = sum(layer.n_tokens for layer in layers)
    return torch.stack([layer.A * (layer.n_tokens / tokens) for layer in layers]).sum(dim=0)
