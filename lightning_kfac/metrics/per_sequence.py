"""PerSequence: the base of metrics that keep a value for every sequence, with several figures or with one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from lightning_kfac.math.statistics import Figure
from lightning_kfac.metrics.described import Described


class PerSequence(Described):
    """Keeps some numbers of every sequence, so that intervals and paired differences can be computed.

    Values are gathered over ranks and sorted by the number of their sequence, so neither batches nor ranks change a
    sum by a bit. Of text in packed rows, documents are the sequences: what several rows hold of one is added up.

    Attributes:
        index, values: The states: numbers of the sequences, and float64 [n, number of columns].
        rows: The state: where a sequence comes in several rows, which one this is.
        columns: Names of the numbers.
        counted: Name under which the number of sequences is given, if it is.
        figures: After ``compute``: every figure with the values behind it, from all ranks.
        numbers: After ``compute``: int64 [n], the numbers of the sequences.
    """

    index: list[Tensor]
    rows: list[Tensor]
    values: list[Tensor]
    full_state_update = False
    columns: tuple[str, ...] = ()
    counted: str | None = None

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("index", [], dist_reduce_fx="cat")
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.add_state("values", [], dist_reduce_fx="cat")
        self.figures: dict[str, Figure] = {}
        self.numbers = torch.empty(0, dtype=torch.long)

    def add(
        self, values: Tensor, index: Sequence[int] | Tensor | None, rows: Sequence[int] | Tensor | None = None
    ) -> None:
        """Adds sequences. Without numbers they count on from those before.

        Args:
            values: [n, number of columns].
            index: n numbers.
            rows: n numbers of the rows that they were found in, where there may be several of one.
        """
        if index is None:
            seen = sum(map(len, self.index))
            index = torch.arange(seen, seen + len(values))
        index = torch.as_tensor(index, dtype=torch.long).to(self.device)
        self.index.append(index)
        self.rows.append(torch.zeros_like(index) if rows is None else torch.as_tensor(rows).to(index))
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
        index = dim_zero_cat(self.index).cpu().numpy()
        values = dim_zero_cat(self.values).view(-1, len(self.columns)).double().cpu().numpy()
        order = np.lexsort((dim_zero_cat(self.rows).cpu().numpy(), index))
        numbers, first = np.unique(index[order], return_index=True)
        return torch.from_numpy(numbers), torch.from_numpy(np.add.reduceat(values[order], first))

    def figures_of(self, values: dict[str, Tensor]) -> dict[str, Figure]:
        """The figures of the columns, each float64 [n]."""
        raise NotImplementedError


def by_document(
    values: Tensor, valid: Tensor, rows: Tensor, documents: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over what each row holds of each document.

    Args:
        values: [B, T].
        valid: bool [B, T], what counts.
        rows: int64 [B], their numbers.
        documents: int64 [B, T].

    Returns:
        float64 [n] sums and int64 [n] counts, of documents [n] in rows [n]; on the CPU, in an order of their own.

    Example:
        >>> losses, valid = torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool)
        >>> found = by_document(losses, valid, torch.tensor([7]), torch.tensor([[2, 2, 2, 3]]))
        >>> [part.tolist() for part in found]
        [[3.0, 1.0], [3, 1], [2, 3], [7, 7]]
    """
    valid = valid.cpu()
    numbers = rows.cpu()[:, None].expand_as(valid)[valid].numpy()
    found = documents.cpu()[valid].numpy()
    first = np.flatnonzero(np.append(len(found) > 0, (np.diff(found) != 0) | (np.diff(numbers) != 0)))
    sums = np.add.reduceat(values.cpu().double()[valid].numpy(), first) if len(first) else np.empty(0)
    counts = np.diff(np.append(first, len(found)))
    return (
        torch.from_numpy(sums),
        torch.from_numpy(counts),
        torch.from_numpy(found[first]),
        torch.from_numpy(numbers[first]),
    )


class SeveralFigures(PerSequence):
    """Its result has all figures by name."""

    @override
    def compute(self) -> dict[str, Tensor]:
        """All figures (float64, NaN before any update) and the number of sequences."""
        return self.gathered()


class OneFigure(PerSequence):
    """Its result is its only figure."""

    def add_tokens(
        self,
        values: Tensor,
        valid: Tensor,
        index: Sequence[int] | Tensor | None,
        documents: Tensor | None,
    ) -> None:
        """Adds a batch of what tokens give, as sum and count of each row or, where they are known, of each document.

        Rows without a valid token are left out.

        Args:
            values: float64 [B, T].
            valid: bool [B, T].
            index: Numbers of the rows.
            documents: int64 [B, T], the document of each token.
        """
        if documents is not None and index is not None:
            sums, counts, found, rows = by_document(values, valid, torch.as_tensor(index), documents)
            self.add(torch.stack([sums, counts.double()], dim=1), found, rows)
            return
        counts = valid.sum(1)
        some = counts > 0
        sums = torch.stack([values.double().masked_fill(~valid, 0).sum(1), counts.double()], dim=1)[some]
        self.add(sums, None if index is None else torch.as_tensor(index).to(some.device)[some])

    @override
    def compute(self) -> Tensor:
        """float64 scalar; NaN before anything that counts."""
        (figure,) = self.gathered().values()
        return figure
