"""Loss of every held-out row, which is what paired comparisons need."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfac.batch import TokenBatch
from lightning_kfac.math.loss import IGNORED


@torch.no_grad()
def row_losses(model: nn.Module, batches: Iterable[TokenBatch]) -> dict[int, tuple[float, int]]:
    """Summed next-token loss and number of targets of each row that has any, by row number (``sample_index``)."""
    rows = {}
    for tokens in batches:
        losses = token_losses(tokens.logits(model), tokens.targets).sum(1)
        counts = tokens.valid.sum(1)
        for index, loss, count in zip(tokens.sample_index.tolist(), losses.tolist(), counts.tolist(), strict=True):
            if count:
                rows[index] = (loss, count)
    return rows


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] of every token, 0 where there is no target.

    Args:
        logits: [B, T, V].
        targets: int64 [B, T], -100 where there is none.

    Returns:
        float64 [B, T].
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none").double()
