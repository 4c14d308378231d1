"""What a study of crystallized attention is told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_kfac.attention.crystallized import check_rank
from lightning_kfac.attention.interface import resolve_layers
from lightning_kfac.errors import InputError


@dataclass(frozen=True)
class CrystallizeConfig:
    """Which attention layers to crystallize, and with which ranks.

    Args:
        layers: By number, negative from the end.
        ranks: Of the low-rank residual; by default 1, 2, 4, ... and the width of a head.
    """

    layers: Sequence[int]
    ranks: Sequence[int] | None = None

    def resolve(self, shapes: Mapping[int, tuple[int, int]]) -> tuple[list[int], list[int]]:
        """The layers and the ascending ranks for a model.

        Args:
            shapes: Number of heads and width of a head, by layer.

        Raises:
            InputError: A layer does not exist, or a rank is not between 0 and the width of a head.

        Example:
            >>> CrystallizeConfig(layers=[-1]).resolve({0: (4, 12), 1: (4, 12)})
            ([1], [1, 2, 4, 8, 12])
        """
        layers = resolve_layers(self.layers, shapes)
        width = min(shapes[layer][1] for layer in layers)
        ranks = self.ranks
        if ranks is None:
            ranks = [*(2**power for power in range(width.bit_length()) if 2**power < width), width]
        if not ranks or min(ranks) < 0:
            raise InputError(f"crystallize.ranks is {list(ranks)}; name at least one rank, 0 or more")
        for layer in layers:
            check_rank(max(ranks), shapes[layer][1], layer)
        return layers, sorted(set(ranks))
