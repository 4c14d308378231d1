"""Loss of every held-out row, which is what paired comparisons need."""

from collections.abc import Iterable

import torch
from torch import nn

from lightning_kfac.batch import TokenBatch
from lightning_kfac.scoring import target_losses


@torch.no_grad()
def row_losses(model: nn.Module, batches: Iterable[TokenBatch]) -> dict[int, tuple[float, int]]:
    """Summed next-token loss and number of targets of each row that has any, by row number (``sample_index``)."""
    rows = {}
    for tokens in batches:
        losses = target_losses(model, tokens).sum(1)
        counts = tokens.valid.sum(1)
        for index, loss, count in zip(tokens.sample_index.tolist(), losses.tolist(), counts.tolist(), strict=True):
            if count:
                rows[index] = (loss, count)
    return rows
