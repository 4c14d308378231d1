"""Noise: how far must the weights be moved at random until suppressed text shows again, if it does?"""

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_kfac.attacks.attack import WeightAttack, check_share


@dataclass(frozen=True)
class Noise(WeightAttack):
    """Adds normal noise to every linear layer but the head.

    Args:
        norm: Frobenius norm of the noise relative to that of each layer's weight. Narrow weights round it.
        seed: Of the noise, which depends on nothing else but the layer's name and shape.
    """

    name: ClassVar[str] = "noise"

    norm: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("norm", self.norm, most=10.0)

    @property
    @override
    def label(self) -> str:
        return f"noise, {self.norm:g} of the norm"

    @override
    def changed(self, W: Tensor, layer: str) -> Tensor:
        return W + noise(W, self.norm, f"{self.seed} {layer}")


def noise(W: Tensor, norm: float, key: str) -> Tensor:
    """Normal noise with ||N|| = norm * ||W||, drawn on the CPU, so that no device changes it.

    Args:
        W: [d_out, d_in].
        norm: Relative.
        key: Keys the draw.

    Returns:
        [d_out, d_in].

    Example:
        >>> W = torch.full((3, 4), 2.0)
        >>> round((noise(W, 0.25, "0 up").norm() / W.norm()).item(), 6)
        0.25
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    drawn = torch.randn(W.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    size = norm * W.to("cpu", torch.float64).norm() / drawn.norm()
    return (drawn * size).to(W)
