"""Perplexity over exactly counted target tokens."""

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_kfac.metrics.functional import token_nll


class Perplexity(Metric):
    """exp(sum of token NLL / number of target tokens), summed in float64.

    Unlike a mean of batch perplexities it does not depend on how rows are batched or ranked.

    Example:
        >>> metric = Perplexity()
        >>> logits = torch.zeros(1, 3, 50)
        >>> metric.update(logits, torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool))
        >>> round(metric.compute().item(), 4)
        50.0
    """

    full_state_update = False
    higher_is_better = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.add_state("nll", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Adds a batch: logits [B, T, V], targets int64 [B, T], valid bool [B, T]."""
        nll, count = token_nll(logits, targets, valid)
        self.nll += nll
        self.count += count

    def compute(self) -> Tensor:
        """float64 scalar; NaN before any valid token."""
        return (self.nll / self.count).exp()
