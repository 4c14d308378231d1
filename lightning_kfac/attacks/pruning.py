"""Pruning: does a model without its smallest weights recite again what an edit suppressed?"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_kfac.attacks.attack import WeightAttack, check_share


@dataclass(frozen=True)
class Pruning(WeightAttack):
    """Sets the smallest weights of every linear layer but the head to zero.

    Args:
        share: Of each layer's weights, those of the smallest magnitude.
    """

    name: ClassVar[str] = "pruning"

    share: float = 0.3

    def __post_init__(self) -> None:
        check_share("share", self.share)

    @property
    @override
    def label(self) -> str:
        return f"pruning, {self.share:.0%} of the weights"

    @override
    def changed(self, W: Tensor, layer: str) -> Tensor:
        return pruned(W, self.share)


def pruned(W: Tensor, share: float) -> Tensor:
    """The weight without its round(share * d_out * d_in) smallest entries; of equal ones the first in (i, j) order go.

    Args:
        W: [d_out, d_in].
        share: In [0, 1].

    Returns:
        [d_out, d_in].

    Example:
        >>> import torch
        >>> pruned(torch.tensor([[1.0, -1.0], [3.0, 1.0]]), 0.5)
        tensor([[0., 0.],
                [3., 1.]])
    """
    flat = W.flatten().clone()
    smallest = flat.abs().sort(stable=True).indices[: round(share * len(flat))]
    flat[smallest] = 0
    return flat.view(W.shape)
