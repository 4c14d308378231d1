"""PerSequence: the base of metrics that keep a value for every sequence, with several figures or with one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from lightning_kfac.math.statistics import Figure
from lightning_kfac.metrics.described import Described


class PerSequence(Described):
    """Keeps some numbers of every sequence, so that intervals and paired differences can be computed.

    Values are gathered over ranks and sorted by the number of their sequence, so neither batches nor ranks change a
    sum by a bit.

    Attributes:
        index, values: The states: numbers of the sequences, and float64 [n, number of columns].
        columns: Names of the numbers.
        counted: Name under which the number of sequences is given, if it is.
        figures: After ``compute``: every figure with the values behind it, from all ranks.
        numbers: After ``compute``: int64 [n], the numbers of the sequences.
    """

    index: list[Tensor]
    values: list[Tensor]
    full_state_update = False
    columns: tuple[str, ...] = ()
    counted: str | None = None

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("index", [], dist_reduce_fx="cat")
        self.add_state("values", [], dist_reduce_fx="cat")
        self.figures: dict[str, Figure] = {}
        self.numbers = torch.empty(0, dtype=torch.long)

    def add(self, values: Tensor, index: Sequence[int] | Tensor | None) -> None:
        """Adds sequences. Without numbers they count on from those before.

        Args:
            values: [n, number of columns].
            index: n numbers.
        """
        if index is None:
            seen = sum(map(len, self.index))
            index = torch.arange(seen, seen + len(values))
        self.index.append(torch.as_tensor(index, dtype=torch.long).to(self.device))
        self.values.append(values.to(self.device, torch.float64))

    def gathered(self) -> dict[str, Tensor]:
        """All figures (float64, NaN before any update) and the number of sequences; sets figures and numbers."""
        index, values = self._sorted()
        self.numbers = index.cpu()
        by_column = values.cpu().unbind(1)
        self.figures = self.figures_of(dict(zip(self.columns, by_column, strict=True)))
        found = {name: torch.tensor(f.value, dtype=torch.float64) for name, f in self.figures.items()}
        return found | {self.counted: torch.tensor(len(index))} if self.counted else found

    def _sorted(self) -> tuple[Tensor, Tensor]:
        if not len(self.index):
            return torch.empty(0, dtype=torch.long), torch.empty(0, len(self.columns), dtype=torch.float64)
        index, order = dim_zero_cat(self.index).long().sort()
        return index, dim_zero_cat(self.values).view(-1, len(self.columns))[order].double()

    def figures_of(self, values: dict[str, Tensor]) -> dict[str, Figure]:
        """The figures of the columns, each float64 [n]."""
        raise NotImplementedError


class SeveralFigures(PerSequence):
    """Its result has all figures by name."""

    @override
    def compute(self) -> dict[str, Tensor]:
        """All figures (float64, NaN before any update) and the number of sequences."""
        return self.gathered()


class OneFigure(PerSequence):
    """Its result is its only figure."""

    @override
    def compute(self) -> Tensor:
        """float64 scalar; NaN before anything that counts."""
        (figure,) = self.gathered().values()
        return figure
