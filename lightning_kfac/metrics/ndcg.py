"""nDCG@k: how well a model keeps the next-token ranking of a reference model."""

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_kfac.metrics.functional import ndcg


class NDCG(Metric):
    """Mean nDCG@k over valid positions, in float64.

    Example:
        >>> metric = NDCG()
        >>> ranking = torch.arange(10).repeat(1, 3, 1)
        >>> metric.update(ranking, ranking, torch.ones(1, 3, dtype=torch.bool))
        >>> metric.compute().item()
        1.0
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, ranking: Tensor, reference: Tensor, valid: Tensor) -> None:
        """Adds a batch of top tokens (see ``top_tokens``): int64 [B, T, k] twice, valid bool [B, T]."""
        self.total += ndcg(ranking, reference).masked_fill(~valid, 0.0).sum()
        self.count += valid.sum()

    def compute(self) -> Tensor:
        """float64 scalar; NaN before any valid position."""
        return self.total / self.count
