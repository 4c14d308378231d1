"""Kronecker factors spread over ranks: each layer's sums are kept by its owner alone."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_kfac.collection.sums import FactorSums
from lightning_kfac.distributed.ranks import Ranks
from lightning_kfac.math.covariance import SecondMoment, accumulate_upper, panel_edges
from lightning_kfac.models.layer import Layer


class ShardedMoment:
    """Running sum of X^T X over the batches of all ranks, kept by one of them.

    Every rank multiplies its own rows, one panel of columns at a time, and the owner gets the panels' sums. So all
    ranks must add equally often and in the same order.

    Args:
        size: Number of features d.
        device: Where to compute.
        ranks: Those that add.
        owner: The rank that keeps the sum.

    Attributes:
        kept: The sum, on the owner; None elsewhere.
    """

    def __init__(self, size: int, device: torch.device, ranks: Ranks, owner: int):
        self.size = size
        self.device = device
        self.ranks = ranks
        self.owner = owner
        self.kept = SecondMoment(size, device) if ranks.rank == owner else None

    def add(self, x: Tensor) -> None:
        """Adds ``x^T x`` of every rank's x [n, d]."""
        for number, (first, last) in enumerate(panel_edges(self.size)):
            panel = torch.zeros(last, last - first, device=self.device)
            accumulate_upper([panel], [(first, last)], x)
            self.ranks.reduce(panel, self.owner)
            if self.kept is not None:
                self.kept.add_panel(number, panel)
        if self.kept is not None:
            self.kept.count_batch()

    @property
    def here(self) -> bool:
        """Whether this rank keeps the sum."""
        return self.kept is not None

    @property
    def _own(self) -> SecondMoment:
        if self.kept is None:
            raise RuntimeError(f"the sum is kept by rank {self.owner}, not by rank {self.ranks.rank}")
        return self.kept

    def packed(self) -> Tensor:
        """Upper triangle of the sum as a vector, on its owner."""
        return self._own.packed()

    def load_packed(self, packed: Tensor) -> None:
        """Replaces the sum, on its owner."""
        self._own.load_packed(packed)

    def state(self) -> dict[str, Tensor]:
        """As ``SecondMoment.state``, on its owner."""
        return self._own.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """As ``SecondMoment.load_state``, on its owner."""
        self._own.load_state(state)

    def sum(self) -> Tensor:
        """The symmetric sum, float32 [d, d]; on other ranks one without values (on the meta device)."""
        return torch.empty(self.size, self.size, device="meta") if self.kept is None else self.kept.sum()

    def trace(self) -> Tensor:
        """Trace of the sum, a scalar tensor; 0 on other ranks."""
        return torch.zeros((), device=self.device) if self.kept is None else self.kept.trace()


def sharded_sums(ranks: Ranks, owners: Mapping[str, int], coupled: bool = False) -> Callable[[Layer], FactorSums]:
    """Makes sums of A and G for a ``CurvatureCapture`` that the owner of a layer keeps.

    Args:
        coupled: See ``FactorSums``.
    """

    def sums(layer: Layer) -> FactorSums:
        owner = owners[layer.name]
        return FactorSums(layer, lambda size, device: ShardedMoment(size, device, ranks, owner), coupled)

    return sums
