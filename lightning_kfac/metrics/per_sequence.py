"""PerSequence: the base of metrics that keep a value for every sequence."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_kfac.math.statistics import Figure
from lightning_kfac.metrics.described import Described


class PerSequence(Described, Metric):
    """Keeps some numbers of every sequence, so that intervals and paired differences can be computed.

    Values are gathered over ranks and sorted by the number of their sequence, so neither batches nor ranks change a
    sum by a bit.

    Attributes:
        columns: Names of the numbers.
        counted: Name under which the number of sequences is given, if it is.
        figures: After ``compute``: every figure with the values behind it, from all ranks.
        numbers: After ``compute``: int64 [n], the numbers of the sequences.
    """

    full_state_update = False
    columns: tuple[str, ...] = ()
    counted: str | None = None

    def __init__(self, **kwargs):
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

    def compute(self) -> dict[str, Tensor]:
        """All figures (float64, NaN before any update) and the number of sequences."""
        if len(self.index):
            index, order = dim_zero_cat(self.index).long().sort()
            values = dim_zero_cat(self.values).view(-1, len(self.columns))[order].double()
        else:
            index, values = torch.empty(0, dtype=torch.long), torch.empty(0, len(self.columns), dtype=torch.float64)
        self.numbers = index.cpu()
        by_column = values.cpu().unbind(1)
        self.figures = self.figures_of(dict(zip(self.columns, by_column, strict=True)))
        values = {name: torch.tensor(f.value, dtype=torch.float64) for name, f in self.figures.items()}
        return values | {self.counted: torch.tensor(len(index))} if self.counted else values

    def figures_of(self, values: dict[str, Tensor]) -> dict[str, Figure]:
        """The figures of the columns, each float64 [n]."""
        raise NotImplementedError
