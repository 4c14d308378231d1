"""The model's last layer and the loss, a slice of tokens at a time.

Logits [tokens, vocabulary] are the largest tensor of a language model. Here they never exist whole:
for each slice of tokens the logits, the labels drawn from them, the loss and its gradient with respect
to the hidden states are computed and the logits forgotten.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_kfac.math.loss import IGNORED

# Given the logits of a slice of tokens [n, V] and the slice, the labels of those tokens [n].
Labels = Callable[[Tensor, slice], Tensor]


class HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of hidden states [N, d], of which only the gradient with respect to them is kept."""

    @staticmethod
    @override
    def forward(ctx: Any, hidden: Tensor, head: nn.Linear, labels: Labels, chunk: int) -> Tensor:
        gradient = torch.empty_like(hidden)
        loss = torch.zeros((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        loss = loss.to(hidden.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = F.linear(hidden[part], head.weight, head.bias)
            targets = labels(logits, part)
            loss += summed_loss_and_gradient(logits, targets, head.weight, gradient[part])
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @override
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None


def summed_loss_and_gradient(logits: Tensor, targets: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Sum of -log softmax(logits)[target], and its gradient (softmax - onehot) W written to ``out``.

    Args:
        logits: [n, V].
        targets: int64 [n]; -100 counts neither in the loss nor in the gradient.
        weight: [V, d].
        out: [n, d].
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_normalizer = wide.logsumexp(-1)
    counts = targets != IGNORED
    index = targets.clamp(min=0)[:, None]
    loss = (log_normalizer - wide.gather(1, index).squeeze(1)).masked_fill(~counts, 0).sum()
    probabilities = torch.exp(wide - log_normalizer[:, None])
    probabilities.scatter_add_(1, index, -torch.ones_like(index, dtype=probabilities.dtype))
    probabilities.masked_fill_(~counts[:, None], 0)
    torch.mm(probabilities.to(weight.dtype), weight, out=out)
    return loss
