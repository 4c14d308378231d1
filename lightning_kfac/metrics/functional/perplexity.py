"""Negative log-likelihood of tokens, from which perplexity follows."""

import torch
from torch import Tensor
from torch.nn import functional as F

# So that a large vocabulary's logits are never whole in float32.
POSITIONS_AT_ONCE = 1024


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
    flat, wanted = logits.flatten(0, 1), targets.masked_fill(~valid, 0).flatten()
    nll = []
    for i in range(0, len(flat), POSITIONS_AT_ONCE):
        part = flat[i : i + POSITIONS_AT_ONCE]
        part = part if part.dtype == torch.float64 else part.float()
        nll.append(F.cross_entropy(part, wanted[i : i + POSITIONS_AT_ONCE], reduction="none"))
    return torch.cat(nll).double().masked_fill(~valid.flatten(), 0.0).sum(), valid.sum()
