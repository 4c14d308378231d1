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

from lightning_kfac.math.loss import IGNORED, slices

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
            logits = logits.to(head.weight.dtype)  # under autocast they have fewer digits than the weights
            loss += loss_and_gradient_(logits, targets)
            torch.mm(logits, head.weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @override
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None


def loss_and_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log softmax(logits)[target]; its gradient softmax - onehot takes the place of the logits.

    Args:
        logits: [n, V], overwritten.
        targets: int64 [n]; -100 counts neither in the loss nor in the gradient.

    Returns:
        A scalar, float64 for float64 logits, else float32.
    """
    losses = []
    for part in slices(logits):
        wide = logits[part] if logits.dtype in (torch.float32, torch.float64) else logits[part].float()
        counts = (targets[part] != IGNORED)[:, None]
        index = targets[part].clamp(min=0)[:, None]
        wanted = wide.gather(1, index)
        peaks = wide.amax(1, keepdim=True)
        wide.sub_(peaks).exp_()
        totals = wide.sum(1, keepdim=True)
        losses.append((totals.log() + peaks - wanted).masked_fill(~counts, 0).sum())
        wide.mul_(counts / totals)
        wide.scatter_add_(1, index, -counts.to(wide.dtype))
        logits[part] = wide
    return torch.stack(losses).sum()
