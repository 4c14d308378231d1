"""Negative log-likelihood of tokens, from which perplexity follows."""

import torch
from torch import Tensor
from torch.nn import functional as F


def token_nll(logits: Tensor, targets: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of -log softmax(logits)[target] over valid positions, and their number.

    The softmax is taken in float32 (float64 for float64 logits), the sum in float64.

    Args:
        logits: [B, T, V].
        targets: int64 [B, T].
        valid: bool [B, T].

    Returns:
        float64 scalar, int64 scalar.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    nll = F.cross_entropy(logits.flatten(0, 1), targets.masked_fill(~valid, 0).flatten(), reduction="none")
    return nll.double().masked_fill(~valid.flatten(), 0.0).sum(), valid.sum()
