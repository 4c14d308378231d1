"""Negative log-likelihood of tokens, from which perplexity follows."""

import torch
from torch import Tensor
from torch.nn import functional as F

# So that a large vocabulary's logits are never whole in float32.
POSITIONS_AT_ONCE = 1024


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] of each position.

    Args:
        logits: [N, V]; the softmax is taken in float32 (float64 for float64 logits).
        targets: int64 [N].

    Returns:
        float64 [N].

    Example:
        >>> round(token_losses(torch.zeros(1, 4), torch.tensor([2])).exp().item(), 6)
        4.0
    """
    losses = []
    for i in range(0, len(logits), POSITIONS_AT_ONCE):
        part = logits[i : i + POSITIONS_AT_ONCE]
        part = part if part.dtype == torch.float64 else part.float()
        losses.append(F.cross_entropy(part, targets[i : i + POSITIONS_AT_ONCE], reduction="none"))
    return torch.cat(losses).double()
